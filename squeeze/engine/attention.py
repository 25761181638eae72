"""Attention over a prompt, and over the buffers of a SqueezeCache. Plain functions on tensors.

Shapes: queries `(batch, heads, tokens, head_dim)`, keys and values `(batch, kv_heads, tokens, head_dim)`; the query
heads of one KV head are neighbours (grouped-query attention), so `heads = kv_heads * group`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch.nn.functional import scaled_dot_product_attention

from squeeze.engine.layer import SqueezeLayer

#: Queries walked at a time where attention is not fused, at most: as long as matrix products need to be fast.
BLOCK = 128

#: Logits held at a time there, as numbers: what stays in a CPU's cache; on a GPU, what keeps it busy.
LOGITS = {"cpu": 5 << 20, "cuda": 32 << 20}

#: Keys walked at a time there end at a multiple of this: oneDNN compiles and keeps a kernel for every shape it meets.
COLUMNS = 256


@torch.no_grad()
def prefill(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: Sequence[int],
    scale: float,
    window: int | None,
    fused: bool,
    with_scores: bool,
    past: Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of left-padded prompts, one sequence after the other, so that no padding is ever attended.

    Args:
        lengths: tokens of each sequence, padding excluded.
        window: the model's own sliding window, or None: a query sees itself and the `window - 1` tokens before it.
        fused: use PyTorch's fused kernel; otherwise blocks of queries with a float32 softmax.
        with_scores: also accumulate attention probabilities, which needs the blocks.
        past: of a prompt's later chunks, without scores: for each sequence the earlier tokens that are attended as
            well, None where there are none. Keys and values `(kv_heads, past, head_dim)`, positions `(past,)`
            ascending; the chunk follows on the last of them.
    Returns:
        output, shape of `queries` (zeros where there is padding), and scores summed over the queries and over the
        heads of each KV head, float32, `(batch, kv_heads, tokens)`; no elements without `with_scores`.
    """
    output = torch.zeros_like(queries)
    scores = torch.zeros(keys.shape[:3] if with_scores else 0, dtype=torch.float32, device=keys.device)
    for row, (length, earlier) in enumerate(zip(lengths, past or [None] * len(lengths), strict=True)):
        if length == 0:  # a sequence that has not begun
            continue
        q, k, v = (tensor[row, :, -length:] for tensor in (queries, keys, values))
        positions = torch.arange(length, device=keys.device)
        if earlier is not None:
            k, v = torch.cat([earlier[0], k], dim=1), torch.cat([earlier[1], v], dim=1)
            positions = torch.cat([earlier[2], earlier[2][-1] + 1 + positions])
        if fused and not with_scores:
            output[row, :, -length:] = _fused(q, k, v, positions, scale, window)
        else:
            row_scores = scores[row, :, -length:] if with_scores else None
            output[row, :, -length:] = _blocks(q, k, v, positions, scale, window, row_scores)
    return output, scores


def _fused(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """One sequence with `scaled_dot_product_attention`; a window is walked in blocks that see just what they need.

    Args:
        positions: of the keys, `(keys,)`, ascending; the last keys are the queries' own.
    """
    count, past = queries.shape[1], keys.shape[1] - queries.shape[1]
    q, k, v = queries[None], keys[None], values[None]
    if past == 0 and (window is None or window >= count):
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)[0]
    output = torch.empty_like(queries)
    for start in range(0, count, window or count):
        end = min(start + (window or count), count)
        low, high = 0 if window is None else max(0, past + start - window + 1), past + end
        mask = ~_hidden(positions[past + start : high], positions[low:high], window)
        block = scaled_dot_product_attention(
            q[:, :, start:end], k[:, :, low:high], v[:, :, low:high], attn_mask=mask, scale=scale, enable_gqa=True
        )
        output[:, start:end] = block[0]
    return output


def _blocks(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
    window: int | None,
    scores: torch.Tensor | None,
) -> torch.Tensor:
    """`_fused`, some queries at a time in O(tokens) memory; adds column sums of probabilities to `scores`.

    All blocks share their memory: a new tensor for each costs the operating system more than the products cost.
    """
    heads, count, _ = queries.shape
    length = keys.shape[1]
    past = length - count
    columns = length if window is None else min(length, window + BLOCK + 2 * COLUMNS)
    rows = min(BLOCK, count)
    while rows > 1 and heads * rows * columns > LOGITS[queries.device.type]:
        rows //= 2
    memory = torch.empty(heads * rows * columns, dtype=torch.float32, device=queries.device)
    products = memory if queries.dtype == torch.float32 else torch.empty_like(memory, dtype=queries.dtype)
    grouped = queries.unflatten(0, (len(keys), -1))
    output = torch.empty_like(queries)
    for start in range(0, count, rows):
        end = min(start + rows, count)
        high = min(-(-(past + end) // COLUMNS) * COLUMNS, length)
        low = 0 if window is None else max(0, past + start - window + 1) // COLUMNS * COLUMNS
        block = grouped[:, :, start:end].flatten(1, 2) * scale
        shape = (*block.shape[:2], high - low)
        logits, weights = (tensor[: math.prod(shape)].view(shape) for tensor in (memory, products))
        torch.bmm(block, keys[:, low:high].transpose(1, 2), out=weights)
        if weights.dtype != torch.float32:
            logits.copy_(weights)
        # Without a window only the last columns, the block's own tokens and later ones, can lie in the future.
        first = low if window is not None else past + start
        hidden = _hidden(positions[past + start : past + end], positions[first:high], window)
        logits.unflatten(1, (-1, end - start))[..., first - low :].masked_fill_(hidden, -torch.inf)
        probabilities = torch.softmax(logits, dim=-1, out=logits)
        if scores is not None:
            scores[:, low:high] += probabilities.sum(dim=1)
        if weights.dtype != torch.float32:
            weights.copy_(probabilities)
        attended = torch.bmm(weights, values[:, low:high])
        output[:, start:end] = attended.unflatten(1, (-1, end - start)).flatten(0, 1)
    return output


def _hidden(queries: torch.Tensor, keys: torch.Tensor, window: int | None) -> torch.Tensor:
    """Mask of the keys that the queries must not see, both by their positions: `(queries, keys)`."""
    hidden = keys > queries[:, None]
    return hidden if window is None else hidden | (keys <= queries[:, None] - window)


@torch.no_grad()
def decode(queries: torch.Tensor, layer: SqueezeLayer, scale: float) -> torch.Tensor:
    """Attention of one new token per sequence over its layer's buffer, the new token's slot included.

    The queries of a KV head meet its keys together, so keys are read once and never repeated. H2O's scores grow by
    the probabilities.

    Args:
        queries: `(batch, heads, 1, head_dim)`, after RoPE.
        layer: its `write` has placed the new token.
    Returns:
        `(batch, heads, 1, head_dim)`.
    """
    count = layer.longest
    keys, values = layer.keys[:, :, :count], layer.values[:, :, :count]
    if layer.kernel != "grouped":
        return _fused_decode(queries, keys, values, layer, scale)
    batch, kv_heads, _, head_dim = keys.shape
    grouped = queries.reshape(batch * kv_heads, -1, head_dim) * scale
    logits = torch.bmm(grouped, keys.flatten(0, 1).transpose(1, 2)).view(batch, kv_heads, -1, count)
    if layer.ragged:
        logits = logits.masked_fill(_empty(layer, count), -torch.inf)
    probabilities = logits.softmax(dim=-1, dtype=torch.float32)
    if layer.evictor.needs_scores:
        layer.scores[:, :, :count] += probabilities.sum(dim=2)
    attended = torch.bmm(probabilities.to(values.dtype).flatten(0, 1), values.flatten(0, 1))
    return attended.view_as(queries)


def _empty(layer: SqueezeLayer, count: int) -> torch.Tensor:
    """Mask of the slots without a token among the first `count`: `(batch, 1, 1, count)`."""
    return (torch.arange(count, device=layer.lengths.device) >= layer.lengths)[:, None, None]


def _fused_decode(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, layer: SqueezeLayer, scale: float
) -> torch.Tensor:
    """`decode` with flash-attn or with `scaled_dot_product_attention`."""
    if layer.kernel == "flash":
        from flash_attn import flash_attn_with_kvcache

        tokens_first = (tensor.transpose(1, 2) for tensor in (queries, keys, values))
        seqlens = layer.lengths[:, 0].int()
        return flash_attn_with_kvcache(*tokens_first, cache_seqlens=seqlens, softmax_scale=scale).transpose(1, 2)
    # The queries that share a KV head stand where a prompt's tokens would: no head is repeated.
    grouped = queries.view(*keys.shape[:2], -1, keys.shape[3])
    mask = ~_empty(layer, keys.shape[2]) if layer.ragged else None
    return scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scale).reshape(queries.shape)
