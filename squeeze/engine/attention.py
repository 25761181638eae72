"""Attention over a prompt, and over the buffers of a SqueezeCache. Plain functions on tensors.

Shapes: queries `(batch, heads, tokens, head_dim)`, keys and values `(batch, kv_heads, tokens, head_dim)`; the query
heads of one KV head are neighbours (grouped-query attention), so `heads = kv_heads * group`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from squeeze.engine.layer import SqueezeLayer

#: Queries walked at a time where attention is not fused, at most: as long as matrix products need to be fast.
BLOCK = 128

#: Logits held at a time there, as numbers: what stays in a CPU's cache; on a GPU, what keeps it busy.
LOGITS = {"cpu": 5 << 20, "cuda": 32 << 20}

#: Numbers of one head that flash-attn's kernel takes at most; keys and values must have as many.
FLASH_WIDTH = 256

#: Keys walked at a time there end at a multiple of this: oneDNN compiles and keeps a kernel for every shape it meets.
COLUMNS = 256


class Rule(NamedTuple):
    """How one layer's attention differs from plain causal attention with a softmax.

    Args:
        scale: of the products of queries and keys.
        window: tokens that a query sees, itself included; None: all before it.
        chunk: a query sees no token before the last multiple of so many; None: all (Llama 4).
        softcap: products are bent to lie within plus and minus so much; None: they are not (Gemma 2).
        sinks: logits of each head, `(heads,)`, that take a share of the softmax and give nothing (gpt-oss); or None.
    """

    scale: float
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether PyTorch's and flash-attn's kernels know all of it."""
        return self.chunk is None and self.softcap is None and self.sinks is None

    def hidden(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Mask of the keys that queries must not see, both by their positions: `(queries, keys)`."""
        queries = queries[:, None]
        hidden = keys > queries
        if self.window is not None:
            hidden |= keys <= queries - self.window
        if self.chunk is not None:
            hidden |= keys < queries // self.chunk * self.chunk
        return hidden


@torch.no_grad()
def prefill(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: Sequence[torch.Tensor],
    lengths: Sequence[int],
    rule: Rule,
    fused: bool,
    with_scores: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of left-padded prompts, one sequence after the other, so that no padding is ever attended.

    Args:
        keys, values: of the prompt, or of a chunk of it after what is kept of earlier ones; left-padded.
        positions: of each sequence's keys, `(keys,)`, ascending.
        lengths: queries of each sequence, which are its last tokens, padding excluded.
        fused: use PyTorch's fused kernel; otherwise blocks of queries with a float32 softmax.
        with_scores: also accumulate attention probabilities, which needs the blocks.
    Returns:
        output, `(batch, heads, tokens, value_dim)` (zeros where there is padding), and scores summed over the queries
        and over the heads of each KV head, float32, `(batch, kv_heads, tokens)`; no elements without `with_scores`.
    """
    batch, heads, tokens, _ = queries.shape
    # The model goes on with tokens before heads, and so they lie.
    output = queries.new_zeros(batch, tokens, heads, values.shape[-1]).transpose(1, 2)
    scores = torch.zeros(keys.shape[:3] if with_scores else 0, dtype=torch.float32, device=keys.device)
    for row, (length, places) in enumerate(zip(lengths, positions, strict=True)):
        if length == 0:  # a sequence that has not begun
            continue
        q, k, v = queries[row, :, -length:], keys[row, :, -len(places) :], values[row, :, -len(places) :]
        if fused and not with_scores and rule.plain:
            output[row, :, -length:] = _fused(q, k, v, places, rule)
        else:
            row_scores = scores[row, :, -length:] if with_scores else None
            output[row, :, -length:] = _blocks(q, k, v, places, rule, row_scores)
    return output, scores


def _fused(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, rule: Rule
) -> torch.Tensor:
    """One sequence with `scaled_dot_product_attention`; a window is walked in blocks that see just what they need.

    Args:
        positions: of the keys, `(keys,)`, ascending; the last keys are the queries' own.
    """
    count, past, window = queries.shape[1], keys.shape[1] - queries.shape[1], rule.window
    q, k, v = queries[None], keys[None], values[None]
    if past == 0 and (window is None or window >= count):
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=rule.scale, enable_gqa=True)[0]
    output = queries.new_empty(*queries.shape[:2], values.shape[-1])
    for start in range(0, count, window or count):
        end = min(start + (window or count), count)
        low, high = 0 if window is None else max(0, past + start - window + 1), past + end
        mask = ~rule.hidden(positions[past + start : high], positions[low:high])
        block = scaled_dot_product_attention(
            q[:, :, start:end], k[:, :, low:high], v[:, :, low:high], attn_mask=mask, scale=rule.scale, enable_gqa=True
        )
        output[:, start:end] = block[0]
    return output


def _blocks(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    rule: Rule,
    scores: torch.Tensor | None,
) -> torch.Tensor:
    """`_fused`, some queries at a time in O(tokens) memory; adds column sums of probabilities to `scores`.

    All blocks share their memory: a new tensor for each costs the operating system more than the products cost.
    """
    heads, count, _ = queries.shape
    length, window = keys.shape[1], rule.window
    past = length - count
    columns = length if window is None else min(length, window + BLOCK + 2 * COLUMNS)
    rows = min(BLOCK, count)
    while rows > 1 and heads * rows * columns > LOGITS[queries.device.type]:
        rows //= 2
    memory = torch.empty(heads * rows * columns, dtype=torch.float32, device=queries.device)
    products = memory if queries.dtype == torch.float32 else torch.empty_like(memory, dtype=queries.dtype)
    grouped = queries.unflatten(0, (len(keys), -1))
    output = queries.new_empty(heads, count, values.shape[-1])
    for start in range(0, count, rows):
        end = min(start + rows, count)
        high = min(-(-(past + end) // COLUMNS) * COLUMNS, length)
        low = 0 if window is None else max(0, past + start - window + 1) // COLUMNS * COLUMNS
        block = grouped[:, :, start:end].flatten(1, 2) * rule.scale
        shape = (*block.shape[:2], high - low)
        logits, weights = (tensor[: math.prod(shape)].view(shape) for tensor in (memory, products))
        torch.bmm(block, keys[:, low:high].transpose(1, 2), out=weights)
        if weights.dtype != torch.float32:
            logits.copy_(weights)
        if rule.softcap is not None:
            logits.div_(rule.softcap).tanh_().mul_(rule.softcap)
        by_query = logits.unflatten(1, (-1, end - start))
        # Without a window or a chunk only the last columns, the block's own tokens and later ones, can lie in the
        # future.
        first = past + start if window is None and rule.chunk is None else low
        hidden = rule.hidden(positions[past + start : past + end], positions[first:high])
        by_query[..., first - low :].masked_fill_(hidden, -torch.inf)
        if rule.sinks is None:
            torch.softmax(logits, dim=-1, out=logits)
        else:
            softmax_with_sinks_(by_query, rule.sinks.view(len(keys), -1, 1, 1))
        if scores is not None:
            scores[:, low:high] += logits.sum(dim=1)
        if weights.dtype != torch.float32:
            weights.copy_(logits)
        attended = torch.bmm(weights, values[:, low:high])
        output[:, start:end] = attended.unflatten(1, (-1, end - start)).flatten(0, 1)
    return output


def softmax_with_sinks_(logits: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """Softmax of float32 `logits` in place, with one more logit in each sum, `sinks` `(…, 1)`, that gives nothing."""
    sinks = sinks.float()
    top = torch.maximum(logits.amax(dim=-1, keepdim=True), sinks)
    logits.sub_(top).exp_()
    return logits.div_(logits.sum(dim=-1, keepdim=True) + (sinks - top).exp())


@torch.no_grad()
def decode(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, layer: SqueezeLayer, rule: Rule, counted: bool
) -> torch.Tensor:
    """Attention of one new token per sequence over its layer's buffer, the new token's slot included.

    The queries of a KV head meet its keys together, so keys are read once and never repeated. H2O's scores grow by
    the probabilities.

    Args:
        queries: `(batch, heads, 1, head_dim)`, after RoPE.
        keys, values: the layer's slots that are attended to, or what the model made of them (latent attention), whose
            heads are then a multiple of the layer's.
        layer: its `update` has placed the new token.
        counted: whether these queries count for scores.
    Returns:
        `(batch, heads, 1, value_dim)`.
    """
    if layer.kernel != "grouped" and rule.plain:
        return _fused_decode(queries, keys, values, layer, rule.scale)
    batch, kv_heads, count, head_dim = keys.shape
    grouped = queries.reshape(batch * kv_heads, -1, head_dim) * rule.scale
    logits = torch.bmm(grouped, keys.flatten(0, 1).transpose(1, 2)).view(batch, kv_heads, -1, count)
    if rule.softcap is not None:
        logits = torch.tanh(logits / rule.softcap) * rule.softcap
    if layer.ragged:
        logits = logits.masked_fill(_empty(layer, count), -torch.inf)
    if rule.chunk is not None:
        begun = (layer.position // rule.chunk * rule.chunk)[..., None]
        earlier = layer.slot_positions[:, :, :count] < begun  # of each of the cache's heads
        logits = logits.masked_fill(
            earlier.repeat_interleave(kv_heads // earlier.shape[1], dim=1)[:, :, None], -torch.inf
        )
    if rule.sinks is None:
        probabilities = logits.softmax(dim=-1, dtype=torch.float32)
    else:
        probabilities = softmax_with_sinks_(logits.float(), rule.sinks.view(kv_heads, -1, 1))
    if counted and layer.evictor.needs_scores:
        layer.add_scores(probabilities.sum(dim=2))
    attended = torch.bmm(probabilities.to(values.dtype).flatten(0, 1), values.flatten(0, 1))
    return attended.view(batch, -1, 1, values.shape[-1])


def _empty(layer: SqueezeLayer, count: int) -> torch.Tensor:
    """Mask of the slots without a token among the first `count`: `(batch, 1, 1, count)`."""
    return (torch.arange(count, device=layer.lengths.device) >= layer.lengths)[:, None, None]


def _fused_decode(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, layer: SqueezeLayer, scale: float
) -> torch.Tensor:
    """`decode` with flash-attn or with `scaled_dot_product_attention`."""
    if layer.kernel == "flash" and keys.shape[3] == values.shape[3] <= FLASH_WIDTH:
        from flash_attn import flash_attn_with_kvcache

        tokens_first = (tensor.transpose(1, 2) for tensor in (queries, keys, values))
        seqlens = layer.lengths[:, 0].int()
        return flash_attn_with_kvcache(*tokens_first, cache_seqlens=seqlens, softmax_scale=scale).transpose(1, 2)
    # The queries that share a KV head stand where a prompt's tokens would: no head is repeated.
    grouped = queries.view(*keys.shape[:2], -1, keys.shape[3])
    mask = ~_empty(layer, keys.shape[2]) if layer.ragged else None
    attended = scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scale)
    return attended.reshape(*queries.shape[:3], values.shape[-1])
