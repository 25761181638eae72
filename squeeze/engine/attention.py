"""Attention over a prompt, and over the buffers of a SqueezeCache. Plain functions on tensors.

Shapes: queries `(batch, heads, tokens, head_dim)`, keys and values `(batch, kv_heads, tokens, head_dim)`; the query
heads of one KV head are neighbours (grouped-query attention), so `heads = kv_heads * group`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from squeeze.engine import kernels
from squeeze.engine.layer import SqueezeLayer


def _varlen_kernel() -> Callable[..., Any] | None:
    """PyTorch's attention for sequences of any lengths, where it is there and takes how much of each is used."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # before PyTorch 2.10
        return None
    return varlen_attn if "seqused_k" in signature(varlen_attn).parameters else None


varlen_attn = _varlen_kernel()

#: Queries walked at a time where attention is not fused, at most: as long as matrix products need to be fast.
BLOCK = 128

#: Logits held at a time there, as numbers: what stays in a CPU's cache; on a GPU, what keeps it busy.
LOGITS = {"cpu": 5 << 20, "cuda": 32 << 20}

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
            if rule.softcap is not None:
                logits = (logits / rule.softcap).tanh() * rule.softcap
            logits.masked_fill_(hidden, -torch.inf)
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
    return fits and varlen_attn is not None and kernels.sums_columns(queries.device, queries.dtype)


def _fused_and_summed(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rule: Rule
) -> tuple[torch.Tensor, torch.Tensor]:
    """`_fused` of one whole sequence, and its probabilities summed over queries, `(kv_heads, tokens)` float32."""
    from torch.nn.attention.varlen import AuxRequest

    from squeeze.engine.column_sums import column_sums

    assert varlen_attn is not None
    tokens, device = queries.shape[1], queries.device
    bounds = torch.tensor([0, tokens], dtype=torch.int32, device=device)
    q, k, v = (part.transpose(0, 1) for part in (queries, keys, values))
    left = -1 if rule.window is None else rule.window - 1
    more: dict[str, Any] = {"scale": rule.scale, "window_size": (left, 0), "enable_gqa": True}
    output, lse = varlen_attn(q, k, v, bounds, bounds, tokens, tokens, return_aux=AuxRequest(lse=True), **more)
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
    """Attention of one new token per sequence over its layer's buffers, the new token's slots included.

    The queries of a KV head meet its keys together, so keys are read once and never repeated. H2O's scores grow by
    the probabilities.

    Args:
        queries: `(batch, heads, 1, head_dim)`, after RoPE.
        keys, values: what the layer's `update` has returned, or what the model made of that (latent attention), whose
            heads are then a multiple of the layer's.
        layer: its `update` has placed the new token.
        counted: whether these queries count for scores.
    Returns:
        `(batch, heads, 1, value_dim)`.
    """
    batch, heads, _, head_dim = queries.shape
    rows = batch * (layer.layout.heads if layer.apart else keys.shape[1])
    grouped = queries.reshape(rows, -1, head_dim)
    sinks = None if rule.sinks is None else rule.sinks.view(rows // batch, -1).repeat(batch, 1)
    if not layer.apart:
        attended = _together(grouped, keys, values, layer, rule, sinks, counted)
    else:
        grouped, sinks = layer.arranged(grouped), None if sinks is None else layer.arranged(sinks)
        one_kernel = layer.kernel != "grouped" and rule.plain and varlen_attn is not None
        if one_kernel and kernels.flash_takes(keys, values):
            attended = _varlen(grouped, layer, rule.scale)
        else:
            attended = _by_group(grouped, layer, rule, sinks, counted)
        attended = layer.restored(attended)
    return attended.reshape(batch, heads, 1, -1)


def _together(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    layer: SqueezeLayer,
    rule: Rule,
    sinks: torch.Tensor | None,
    counted: bool,
) -> torch.Tensor:
    """All rows at once, over keys `(batch, kv_heads, slots, head_dim)` of which some may be no token's."""
    batch, kv_heads, count, _ = keys.shape
    more = kv_heads // layer.layout.heads  # heads that the model made of a cached one (latent attention)
    lengths = earlier = None
    if not layer.layout.alike or layer.seen[0].ragged:
        lengths = layer.restored(layer.lengths).repeat_interleave(more, dim=0)
    if rule.chunk is not None:
        begun = layer.restored(layer.position).view(batch, -1, 1) // rule.chunk * rule.chunk
        earlier = (layer.padded(layer.slot_positions) < begun).repeat_interleave(more, dim=1).flatten(0, 1)
    attended, probabilities = _rows(
        queries, keys.flatten(0, 1), values.flatten(0, 1), lengths, earlier, rule, sinks, layer.kernel
    )
    if counted and layer.evictor.watches:
        layer.watch(probabilities.sum(dim=1).view(batch, kv_heads, count))
    return attended


def _by_group(
    queries: torch.Tensor, layer: SqueezeLayer, rule: Rule, sinks: torch.Tensor | None, counted: bool
) -> torch.Tensor:
    """Rows in the order of the layer's buffers, one group of them after the other."""
    outputs = []
    for seen in layer.seen:
        part = seen.group.part
        earlier = None
        if rule.chunk is not None:
            earlier = seen.view(layer.slot_positions) < part(layer.position) // rule.chunk * rule.chunk
        attended, probabilities = _rows(
            part(queries),
            seen.view(layer.keys),
            seen.view(layer.values),
            part(layer.lengths) if seen.ragged else None,
            earlier,
            rule,
            None if sinks is None else part(sinks),
            layer.kernel,
        )
        if counted and layer.evictor.watches:
            layer.watch_group(seen, probabilities.sum(dim=1))
        outputs.append(attended)
    return torch.cat(outputs)


def _rows(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor | None,
    earlier: torch.Tensor | None,
    rule: Rule,
    sinks: torch.Tensor | None,
    kernel: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of rows with as many slots each.

    Args:
        queries: `(rows, group, head_dim)`.
        keys, values: `(rows, slots, dim)`.
        lengths: tokens in each row's first slots, `(rows, 1)`; None: all slots hold one.
        earlier: mask of the tokens before the query's chunk, `(rows, slots)`; or None.
        sinks: of the rule, `(rows, group)`.
        kernel: see `decode_kernel`.
    Returns:
        `(rows, group, value_dim)`, and the probabilities, float32 `(rows, group, slots)`; none where the kernel is
        fused.
    """
    if kernel != "grouped" and rule.plain:
        return _fused_rows(queries, keys, values, lengths, rule.scale, kernel), torch.empty(0)
    logits = torch.bmm(queries * rule.scale, keys.transpose(1, 2))
    if rule.softcap is not None:
        logits = torch.tanh(logits / rule.softcap) * rule.softcap
    if lengths is not None:
        logits = logits.masked_fill(_empty(lengths, keys.shape[1])[:, None], -torch.inf)
    if earlier is not None:
        logits = logits.masked_fill(earlier[:, None], -torch.inf)
    if sinks is None:
        probabilities = logits.softmax(dim=-1, dtype=torch.float32)
    else:
        probabilities = softmax_with_sinks_(logits.float(), sinks[..., None])
    return torch.bmm(probabilities.to(values.dtype), values), probabilities


def _empty(lengths: torch.Tensor, count: int) -> torch.Tensor:
    """Mask of the slots without a token among the first `count`: `(rows, count)`."""
    return torch.arange(count, device=lengths.device) >= lengths


def _fused_rows(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor | None,
    scale: float,
    kernel: str,
) -> torch.Tensor:
    """`_rows` with flash-attn or with `scaled_dot_product_attention`: the rows as a batch with one KV head."""
    if kernel == "flash" and kernels.flash_takes(keys, values):
        from flash_attn import flash_attn_with_kvcache

        held = None if lengths is None else lengths[:, 0].int()
        keys, values = keys[:, :, None], values[:, :, None]
        return flash_attn_with_kvcache(queries[:, None], keys, values, cache_seqlens=held, softmax_scale=scale)[:, 0]
    # The queries of a KV head stand where a prompt's tokens would: no head is repeated.
    mask = None if lengths is None else ~_empty(lengths, keys.shape[1])[:, None, None]
    q, k, v = queries[:, None], keys[:, None], values[:, None]
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)[:, 0]


def _varlen(queries: torch.Tensor, layer: SqueezeLayer, scale: float) -> torch.Tensor:
    """All groups at once by PyTorch's kernel for sequences of any lengths: a row is one, with one token that asks.

    Args:
        queries: `(rows, group, head_dim)`, in the order of the layer's buffers.
    """
    layout, lengths = layer.layout, layer.lengths[:, 0].int()
    assert varlen_attn is not None
    return varlen_attn(
        queries,
        layer.keys[:, None],
        layer.values[:, None],
        torch.arange(len(queries) + 1, dtype=torch.int32, device=queries.device),
        layer.bounds,
        1,
        layout.groups[-1].slots,
        scale=scale,
        enable_gqa=True,
        seqused_k=lengths,
    )
