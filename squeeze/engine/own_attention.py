"""Attention that a model computes by itself, and not through AttentionInterface (Falcon, GPT-J, CodeGen).

It fills the same cache by the same `update`. While a prompt is read it has the mask that the model makes; in a decode
step it is given one that shows the slots which hold a token. H2O's scores come from the probabilities that such
modules return under `eager`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from squeeze.engine.findings import AttentionLayer
from squeeze.engine.interface import current_cache
from squeeze.engine.layer import SqueezeLayer
from squeeze.errors import InputError
from squeeze.evictors.base import Future


def listen(facts: AttentionLayer) -> Callable[[], None]:
    """Put hooks on an attention module; what comes back takes them away."""
    hooks = (
        facts.module.register_forward_pre_hook(_give_mask, with_kwargs=True),
        facts.module.register_forward_hook(_take),
    )

    def remove() -> None:
        for hook in hooks:
            hook.remove()

    return remove


def _give_mask(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    cache = current_cache()
    if cache is None or not cache.compressed:
        return None
    stream = args[0] if args else kwargs["hidden_states"]
    return args, kwargs | {"attention_mask": slot_mask(cache.by_module[module], stream.dtype)}


def slot_mask(layer: SqueezeLayer, dtype: torch.dtype) -> torch.Tensor:
    """What is added to the logits of a decode step: 0, or `dtype`'s least for empty slots.

    Returns:
        `(batch, kv_heads, 1, slots)`, or `(batch, 1, 1, slots)` where the heads of a sequence are alike.
    """
    empty, budgets = layer.empty(layer.padded_length)[:, :, None], layer.layout.budgets
    if (budgets == budgets[:, :1]).all():
        empty = empty[:, :1]
    return torch.zeros(empty.shape, dtype=dtype, device=empty.device).masked_fill_(empty, torch.finfo(dtype).min)


def _take(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    cache = current_cache()
    if cache is None:
        return
    layer = cache.by_module[module]
    scores = torch.empty(0)
    observed = layer.evictor.observed if layer.reading is not None else None if layer.evictor.watches else 0
    if observed != 0:
        probabilities = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if probabilities is None:
            raise InputError(
                f"{layer.evictor.name} needs attention probabilities, and {type(module).__name__} gives none: take "
                "another method"
            )
        probabilities = probabilities.detach().float()  # (batch, heads, queries, keys)
        if layer.reading is not None:
            lengths = torch.tensor(layer.reading.lengths, device=probabilities.device)[:, None]
            tokens = probabilities.shape[2]
            assert not isinstance(observed, Future), "refused for a model whose queries are not known"
            asking = lengths if observed is None else lengths.clamp(max=observed)
            others = torch.arange(tokens, device=probabilities.device) < tokens - asking
            probabilities = probabilities.masked_fill(others[:, None, :, None], 0.0)
        scores = probabilities.sum(dim=2)
    if layer.reading is not None:
        layer.take(scores)
    elif scores.numel():
        layer.watch(scores)
