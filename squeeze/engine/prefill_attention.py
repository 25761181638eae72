"""Attention over a prompt, or a chunk of it. Plain functions on tensors; shapes as in `squeeze.engine.attention`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from squeeze.engine import kernels
from squeeze.engine.attention import Rule, softmax_with_sinks_

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
    positions: Sequence[Sequence[tuple[int, torch.Tensor]]],
    lengths: Sequence[int],
    rule: Rule,
    fused: bool,
    observed: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of left-padded prompts, one sequence after the other, so that no padding is ever attended.

    Args:
        keys, values: of the prompt, or of a chunk of it after what is kept of earlier ones; left-padded.
        positions: of each sequence's keys, `(keys,)`, ascending; for so many of the cache's heads after the others.
        lengths: queries of each sequence, which are its last tokens, padding excluded.
        fused: use PyTorch's fused kernel; otherwise blocks of queries with a float32 softmax.
        observed: of the last queries of each sequence, how many have their attention probabilities summed up, for
            which they go through the blocks; None: all of them, on a GPU by a kernel after the fused one where it runs
            (`squeeze.engine.kernels.sums_columns`).
    Returns:
        output, `(batch, heads, tokens, value_dim)` (zeros where there is padding), and scores summed over the observed
        queries and over the heads of each KV head, float32, `(batch, kv_heads, tokens)`; no elements where none are.
    """
    batch, heads, tokens, _ = queries.shape
    # The model goes on with tokens before heads, and so they lie.
    output = queries.new_zeros(batch, tokens, heads, values.shape[-1]).transpose(1, 2)
    scores = torch.zeros(0 if observed == 0 else keys.shape[:3], dtype=torch.float32, device=keys.device)
    for row, (length, places) in enumerate(zip(lengths, positions, strict=True)):
        if length == 0:  # a sequence that has not begun
            continue
        cached = sum(count for count, _ in places)
        end = 0
        for count, own in places:
            first, end = end, end + count * keys.shape[1] // cached
            group = heads // keys.shape[1]
            asking = slice(first * group, end * group)
            q = queries[row, asking, -length:]
            k, v = keys[row, first:end, -len(own) :], values[row, first:end, -len(own) :]
            row_scores = scores[row, first:end, -length:] if observed != 0 else None
            if fused and observed is not None and rule.plain:
                output[row, asking, -length:] = _fused(q, k, v, own, rule)
            elif fused and observed is None and _sums_after(q, k, v, rule):
                output[row, asking, -length:], scores[row, first:end, -length:] = _fused_and_summed(q, k, v, rule)
            else:
                all_scores = row_scores if observed is None else None
                output[row, asking, -length:] = _blocks(q, k, v, own, rule, all_scores)
            if observed:
                _blocks(q[:, -observed:], k, v, own, rule, row_scores)
    return output, scores


@torch.no_grad()
def spread(queries: torch.Tensor, keys: torch.Tensor, lengths: Sequence[int], rule: Rule, count: int) -> torch.Tensor:
    """How the last `count` queries of left-padded prompts spread their attention over the tokens before these.

    Returns:
        `(batch, 2)` float32: the entropy of their probabilities, in nats, summed over queries and heads; and the
        variance of each token's probabilities over the queries, summed over tokens and heads (CAKE, arXiv 2503.12491,
        section 4.1).
    """
    found = queries.new_zeros(len(lengths), 2, dtype=torch.float32)
    group = queries.shape[1] // keys.shape[1]
    for row, length in enumerate(lengths):
        places = torch.arange(length, device=keys.device)
        hidden = rule.hidden(places[-count:], places)
        if length <= count:
            continue
        for head in range(keys.shape[1]):  # one at a time: all of them together are as large as a layer's cache
            own = queries[row, head * group : (head + 1) * group, -count:] * rule.scale
            logits = (own @ keys[row, head, -length:].T).float()
            rule.bend_(logits).masked_fill_(hidden, -torch.inf)
            if rule.sinks is None:
                probabilities = logits.softmax(dim=-1)
            else:
                sinks = rule.sinks[head * group : (head + 1) * group].view(-1, 1, 1)
                probabilities = softmax_with_sinks_(logits, sinks)
            before = probabilities[..., :-count]
            found[row, 0] -= torch.xlogy(before, before).sum()
            found[row, 1] += before.var(dim=1).sum()
    return found


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


def _sums_after(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rule: Rule) -> bool:
    """Whether the probabilities of one whole sequence can be summed up after the fused kernel."""
    fits = rule.plain and queries.shape[1] == keys.shape[1] and kernels.flash_takes(keys, values)
    return fits and kernels.varlen_attn is not None and kernels.sums_columns(queries.device, queries.dtype)


def _fused_and_summed(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rule: Rule
) -> tuple[torch.Tensor, torch.Tensor]:
    """`_fused` of one whole sequence, and its probabilities summed over queries, `(kv_heads, tokens)` float32."""
    from torch.nn.attention.varlen import AuxRequest

    from squeeze.engine.column_sums import column_sums

    assert kernels.varlen_attn is not None
    tokens, device = queries.shape[1], queries.device
    bounds = torch.tensor([0, tokens], dtype=torch.int32, device=device)
    q, k, v = (part.transpose(0, 1) for part in (queries, keys, values))
    left = -1 if rule.window is None else rule.window - 1
    more: dict[str, Any] = {"scale": rule.scale, "window_size": (left, 0), "enable_gqa": True}
    output, lse = kernels.varlen_attn(q, k, v, bounds, bounds, tokens, tokens, return_aux=AuxRequest(lse=True), **more)
    return output.transpose(0, 1), column_sums(queries, keys, lse, rule.scale, rule.window)


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
        by_query = rule.bend_(logits).unflatten(1, (-1, end - start))
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
