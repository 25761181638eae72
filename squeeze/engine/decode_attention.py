"""Attention of new tokens over the buffers of a SqueezeCache. Plain functions on tensors; shapes as in
`squeeze.engine.attention`."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from squeeze.engine import kernels
from squeeze.engine.attention import Rule, softmax_with_sinks_
from squeeze.engine.layer import SqueezeLayer


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
        one_kernel = layer.kernel in ("flash", "sdpa") and rule.plain and kernels.varlen_attn is not None
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
    fused = kernel != "grouped"
    if kernel == "sdpa by group":  # there is none for heads of two widths
        fused = keys.shape[0] * keys.shape[1] <= kernels.FEW_SLOTS and keys.shape[-1] == values.shape[-1]
    if fused and rule.plain:
        return _fused_rows(queries, keys, values, lengths, rule.scale, kernel), torch.empty(0)
    logits = rule.bend_(torch.bmm(queries * rule.scale, keys.transpose(1, 2)))
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
    assert kernels.varlen_attn is not None
    return kernels.varlen_attn(
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
