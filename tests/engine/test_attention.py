"""Attention over prompts, in blocks and fused, against one matrix of probabilities written out in float64."""

import pytest
import torch

from squeeze.engine import attention

HEADS, KV_HEADS, HEAD_DIM = 6, 2, 8


def tensors(tokens, batch=2, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, tokens, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return [(2 * torch.randn(shape, generator=generator)).to(dtype) for shape in shapes]


def whole(queries, keys, values, length, window):
    """Output and column sums of one sequence, from `(heads, length, length)` probabilities."""
    q, k, v = (tensor[:, -length:].double() for tensor in (queries, keys, values))
    group = HEADS // KV_HEADS
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    distance = torch.arange(length)[:, None] - torch.arange(length)
    hidden = (distance < 0) | (distance >= (window or length))
    probabilities = (q @ k.mT * 0.3).masked_fill(hidden, -torch.inf).softmax(-1)
    return probabilities @ v, probabilities.sum(1).unflatten(0, (KV_HEADS, group)).sum(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 7, 40])
@pytest.mark.parametrize("logits", [1, 600, 1200, 4 << 20])
def test_blocks_of_any_size_give_what_one_matrix_gives(monkeypatch, logits, window, dtype):
    """From a query at a time to the whole prompt at once; 47 and 50 tokens are no multiple of a block."""
    monkeypatch.setattr(attention, "BLOCK", 16 if logits == 1200 else 128)
    monkeypatch.setitem(attention.LOGITS, "cpu", logits)
    queries, keys, values = tensors(50, dtype=dtype)
    lengths = [50, 47]
    output, scores = attention.prefill(queries, keys, values, lengths, 0.3, window, fused=True, with_scores=True)
    close = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.06, "rtol": 0.02}
    for row, length in enumerate(lengths):
        expected, sums = whole(queries[row], keys[row], values[row], length, window)
        torch.testing.assert_close(output[row, :, -length:].double(), expected, **close)
        torch.testing.assert_close(scores[row, :, -length:].double(), sums, **close)
        assert not output[row, :, :-length].any() and not scores[row, :, :-length].any()


@pytest.mark.parametrize("window", [None, 7])
def test_the_fused_kernel_gives_what_one_matrix_gives(window):
    queries, keys, values = tensors(50)
    output, scores = attention.prefill(queries, keys, values, [50, 31], 0.3, window, fused=True, with_scores=False)
    assert not scores.numel()
    for row, length in enumerate([50, 31]):
        expected, _ = whole(queries[row], keys[row], values[row], length, window)
        torch.testing.assert_close(output[row, :, -length:].double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 1000])
def test_the_memory_of_scored_attention_does_not_grow_with_the_prompt_squared(monkeypatch, window, dtype):
    """All that is allocated, were nothing ever freed: one block's logits, and what grows with the tokens."""
    monkeypatch.setitem(attention.LOGITS, "cpu", 1 << 18)
    tokens = 2000
    queries, keys, values = tensors(tokens, batch=1, dtype=dtype)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        attention.prefill(queries, keys, values, [tokens], 0.3, window, fused=True, with_scores=True)
    allocated = sum(max(0, event.cpu_memory_usage) for event in profile.events() if event.cpu_parent is None)
    logits = 6 << 18  # float32, and 16 bits beside it
    assert 0 < allocated < logits + 32 * (queries.nbytes + keys.nbytes + values.nbytes), allocated
