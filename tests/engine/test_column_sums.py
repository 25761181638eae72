"""Column sums of attention by the GPU's kernel, in Triton's interpreter, against one matrix of probabilities.

Triton decides on interpreting when it is imported, so these tests have a process of their own.
"""

import os
import subprocess
import sys

import pytest
import torch

from squeeze.engine import kernels, prefill_attention
from squeeze.engine.attention import Rule

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytest.importorskip("triton")
inside = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that test_the_interpreter starts")
CASES = [(1, None), (63, None), (150, None), (150, 7), (150, 70), (128, 128)]


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_the_interpreter():
    flags = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *flags], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:]


def whole(queries, keys, scale, window):
    """Logits `(heads, tokens, tokens)`, float64, of a whole prompt."""
    logits = queries.double() @ keys.double().repeat_interleave(len(queries) // len(keys), 0).mT * scale
    distance = torch.arange(keys.shape[1])[:, None] - torch.arange(keys.shape[1])
    return logits.masked_fill((distance < 0) | (distance >= (window or len(distance))), -torch.inf)


def drawn(tokens, dtype, *sizes):
    """Of each size, heads and numbers, a tensor as it comes from a model: tokens lie before heads."""
    generator = torch.Generator().manual_seed(tokens)
    return [
        (2 * torch.randn(tokens, heads, width, generator=generator)).to(dtype).transpose(0, 1)
        for heads, width in sizes
    ]


@inside
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(6, 2, 16), (4, 4, 24), (3, 1, 64)])
@pytest.mark.parametrize(("tokens", "window"), CASES)
def test_sums_are_those_of_one_matrix(tokens, window, heads, kv_heads, width, dtype):
    from squeeze.engine.column_sums import column_sums

    queries, keys = drawn(tokens, dtype, (heads, width), (kv_heads, width))
    logits = whole(queries, keys, width**-0.5, window)
    expected = logits.softmax(-1).sum(1).unflatten(0, (kv_heads, -1)).sum(1)
    found = column_sums(queries, keys, logits.logsumexp(-1).float(), width**-0.5, window)
    assert found.dtype == torch.float32 and found.shape == (kv_heads, tokens)
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)


@inside
def test_the_trial_runs():
    kernels._try_sums(torch.device("cpu"), torch.bfloat16)


@inside
@pytest.mark.parametrize("window", [None, 20])
def test_a_scored_prefill_by_both_kernels_is_that_of_the_blocks(monkeypatch, window):
    """Ragged prompts; in the place of PyTorch's kernel, which needs a GPU, what it is documented to give."""

    def varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux, scale, window_size, enable_gqa):
        assert return_aux.lse and enable_gqa and window_size == (-1 if window is None else window - 1, 0)
        assert cu_seq_q.tolist() == cu_seq_k.tolist() == [0, max_q] and max_q == max_k == len(query)
        logits = whole(query.transpose(0, 1), key.transpose(0, 1), scale, window)
        values = value.transpose(0, 1).double().repeat_interleave(query.shape[1] // value.shape[1], 0)
        return (logits.softmax(-1) @ values).transpose(0, 1).to(value.dtype), logits.logsumexp(-1).float()

    queries, keys, values = (part[None].contiguous() for part in drawn(90, torch.bfloat16, (6, 16), (2, 16), (2, 16)))
    queries, keys, values = (part.repeat(2, 1, 1, 1) for part in (queries, keys, values))
    lengths = [90, 37]
    rest = [[(2, torch.arange(length))] for length in lengths], lengths, Rule(0.3, window), True, None
    exact = prefill_attention.prefill(queries.float(), keys.float(), values.float(), *rest)
    blocks = prefill_attention.prefill(queries, keys, values, *rest)
    monkeypatch.setattr(kernels, "sums_columns", lambda device, dtype: True)
    monkeypatch.setattr(kernels, "varlen_attn", varlen)
    for one, other, of_blocks in zip(
        prefill_attention.prefill(queries, keys, values, *rest), exact, blocks, strict=True
    ):
        torch.testing.assert_close(one.float(), other, atol=0.01, rtol=0.01)
        assert not one.equal(of_blocks), "which round products to 16 bits"
    monkeypatch.setattr(kernels, "varlen_attn", None)
    for one, other in zip(prefill_attention.prefill(queries, keys, values, *rest), blocks, strict=True):
        assert one.equal(other), "without it, blocks"


def test_blocks_are_taken_with_a_sentence_where_the_kernel_does_not_run(monkeypatch):
    assert not kernels.sums_columns(torch.device("cpu"), torch.bfloat16), "without a word: there are no such kernels"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    kernels.sums_columns.cache_clear()
    with pytest.warns(UserWarning, match="compute capability 7.5, and the kernel .* 8.0: blocks of queries"):
        assert not kernels.sums_columns(torch.device("cuda:0"), torch.float16)
    assert not kernels.sums_columns(torch.device("cuda:0"), torch.float16), "said once"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def without_compiler(device, dtype):
        raise RuntimeError("Failed to find C compiler\nand more")

    monkeypatch.setattr(kernels, "_try_sums", without_compiler)
    kernels.sums_columns.cache_clear()
    with pytest.warns(UserWarning, match=r"Triton cannot compile .* \(Failed to find C compiler\): blocks"):
        assert not kernels.sums_columns(torch.device("cuda:0"), torch.float16)
    monkeypatch.setattr(kernels, "_try_sums", lambda device, dtype: None)
    kernels.sums_columns.cache_clear()
    assert kernels.sums_columns(torch.device("cuda:0"), torch.float16)
    assert not kernels.sums_columns(torch.device("cuda:0"), torch.float32)
    kernels.sums_columns.cache_clear()
