"""Attention over prompts, in blocks and fused, against one matrix of probabilities written out in float64."""

import pytest
import torch

from squeeze.engine import decode_attention, prefill_attention
from squeeze.engine.attention import Rule

HEADS, KV_HEADS, HEAD_DIM, VALUE_DIM = 6, 2, 8, 8
SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0, 3.0])
RULES = {
    "plain": Rule(0.3),
    "window of 7": Rule(0.3, window=7),
    "window of 40": Rule(0.3, window=40),
    "chunks of 16": Rule(0.3, chunk=16),
    "softcap": Rule(0.3, softcap=2.0),
    "sinks": Rule(0.3, sinks=SINKS),
    "window, softcap and sinks": Rule(0.3, window=7, softcap=2.0, sinks=SINKS),
}


def tensors(tokens, batch=2, seed=0, dtype=torch.float32, value_dim=VALUE_DIM):
    generator = torch.Generator().manual_seed(seed)
    sizes = [(HEADS, HEAD_DIM), (KV_HEADS, HEAD_DIM), (KV_HEADS, value_dim)]
    return [(2 * torch.randn((batch, heads, tokens, width), generator=generator)).to(dtype) for heads, width in sizes]


def prefill(queries, keys, values, lengths, rule, fused, observed):
    """Of whole prompts."""
    positions = [[(keys.shape[1], torch.arange(length))] for length in lengths]
    return prefill_attention.prefill(queries, keys, values, positions, lengths, rule, fused, observed)


def whole(queries, keys, values, length, rule):
    """Output and column sums of one sequence, from `(heads, length, length)` probabilities."""
    q, k, v = (tensor[:, -length:].double() for tensor in (queries, keys, values))
    group = HEADS // KV_HEADS
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    logits = q @ k.mT * rule.scale
    if rule.softcap is not None:
        logits = rule.softcap * torch.tanh(logits / rule.softcap)
    token = torch.arange(length)
    distance = token[:, None] - token
    hidden = (distance < 0) | (distance >= (rule.window or length))
    if rule.chunk is not None:
        hidden |= token[:, None] // rule.chunk != token // rule.chunk
    logits = logits.masked_fill(hidden, -torch.inf)
    if rule.sinks is not None:
        logits = torch.cat([logits, rule.sinks.double().view(-1, 1, 1).expand(-1, length, 1)], dim=-1)
    probabilities = logits.softmax(-1)[..., :length]
    return probabilities @ v, probabilities.sum(1).unflatten(0, (KV_HEADS, group)).sum(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("logits", [1, 600, 1200, 4 << 20])
def test_blocks_of_any_size_give_what_one_matrix_gives(monkeypatch, logits, rule, dtype):
    """From a query at a time to the whole prompt at once; 47 and 50 tokens are no multiple of a block."""
    monkeypatch.setattr(prefill_attention, "BLOCK", 16 if logits == 1200 else 128)
    monkeypatch.setitem(prefill_attention.LOGITS, "cpu", logits)
    queries, keys, values = tensors(50, dtype=dtype, value_dim=5)
    lengths = [50, 47]
    output, scores = prefill(queries, keys, values, lengths, rule, fused=True, observed=None)
    close = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.06, "rtol": 0.02}
    for row, length in enumerate(lengths):
        expected, sums = whole(queries[row], keys[row], values[row], length, rule)
        torch.testing.assert_close(output[row, :, -length:].double(), expected, **close)
        torch.testing.assert_close(scores[row, :, -length:].double(), sums, **close)
        assert not output[row, :, :-length].any() and not scores[row, :, :-length].any()


@pytest.mark.parametrize("value_dim", [8, 5])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_the_fused_kernel_gives_what_one_matrix_gives(rule, value_dim):
    """Where a kernel does not know the rule, the blocks stand in for it."""
    queries, keys, values = tensors(50, value_dim=value_dim)
    output, scores = prefill(queries, keys, values, [50, 31], rule, fused=True, observed=0)
    assert not scores.numel()
    for row, length in enumerate([50, 31]):
        expected, _ = whole(queries[row], keys[row], values[row], length, rule)
        torch.testing.assert_close(output[row, :, -length:].double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_the_last_queries_alone_are_observed(rule, fused):
    """As many as there are in a prompt that is shorter; what is attended to does not change by it."""
    queries, keys, values = tensors(50, value_dim=8)
    lengths = [50, 5]
    output, scores = prefill(queries, keys, values, lengths, rule, fused, observed=7)
    expected, nothing = prefill(queries, keys, values, lengths, rule, fused, observed=0)
    assert output.equal(expected) and not nothing.numel()
    for row, length in enumerate(lengths):
        _, every = whole(queries[row], keys[row], values[row], length, rule)
        earlier = torch.zeros_like(every)
        if length > 7:
            _, earlier[:, :-7] = whole(queries[row, :, :-7], keys[row, :, :-7], values[row, :, :-7], length - 7, rule)
        torch.testing.assert_close(scores[row, :, -length:].double(), every - earlier, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 1000])
def test_the_memory_of_scored_attention_does_not_grow_with_the_prompt_squared(monkeypatch, window, dtype):
    """All that is allocated, were nothing ever freed: one block's logits, and what grows with the tokens."""
    monkeypatch.setitem(prefill_attention.LOGITS, "cpu", 1 << 18)
    tokens = 2000
    queries, keys, values = tensors(tokens, batch=1, dtype=dtype)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        prefill(queries, keys, values, [tokens], Rule(0.3, window), fused=True, observed=None)
    allocated = sum(max(0, event.cpu_memory_usage) for event in profile.events() if event.cpu_parent is None)
    logits = 6 << 18  # float32, and 16 bits beside it
    assert 0 < allocated < logits + 32 * (queries.nbytes + keys.nbytes + values.nbytes), allocated


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [None, (17, 1, 9, 16, 3)])
@pytest.mark.parametrize("value_dim", [8, 4])
def test_the_kernels_of_a_cpu_decode_alike(monkeypatch, dtype, lengths, value_dim):
    """Where heads have two widths no fused one takes them, and grouped products stand in."""
    generator = torch.Generator().manual_seed(1)
    shapes = (5, 3, 8), (5, 17, 8), (5, 17, value_dim)
    given = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    given.append(None if lengths is None else torch.tensor(lengths)[:, None])
    plain, _ = decode_attention._rows(*given, None, Rule(0.3), None, "grouped")
    fused, probabilities = decode_attention._rows(*given, None, Rule(0.3), None, "sdpa by group")
    torch.testing.assert_close(fused, plain, atol=1e-6 if dtype == torch.float32 else 2e-2, rtol=1e-5)
    assert (probabilities.numel() == 0) == (value_dim == 8), "a fused kernel gives none"
    monkeypatch.setattr(decode_attention.kernels, "FEW_SLOTS", 5 * 17 - 1)
    many, probabilities = decode_attention._rows(*given, None, Rule(0.3), None, "sdpa by group")
    assert probabilities.numel() > 0 and many.equal(plain)
