"""The layers of a model's own full cache: what a token takes in each of them, and how many tokens it holds.

transformers' cache says it, once it has seen a token: layers that share another's keys and values have no cache of
their own there, and those without attention hold none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, Cache, DynamicCache, PretrainedConfig

from squeeze.allocations.base import CachedLayer


@dataclass(frozen=True)
class OwnLayer:
    """A layer with keys and values in the model's own cache: see `CachedLayer`."""

    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None
    chunk: int | None = None

    def reach(self, tokens: int) -> int:
        return min(tokens, self.window or tokens, self.chunk or tokens)


def layers_of(cache: Cache) -> tuple[OwnLayer, ...]:
    """The attention layers of a cache that holds tokens; a chunk counts as a window there."""
    return tuple(
        OwnLayer(keys.shape[1], keys.shape[3], layer.values.shape[3], getattr(layer, "sliding_window", None))
        for layer in cache.layers
        if (keys := getattr(layer, "keys", None)) is not None
    )


def held_bytes(cache: Cache) -> int:
    """Bytes of all keys and values that a cache holds."""
    layers = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)


@torch.inference_mode()
def own_layers(config: PretrainedConfig) -> tuple[OwnLayer, ...]:
    """The attention layers of the cache of a model that is not loaded: it is run on a token without its weights.

    Returns:
        None of them where it cannot run like that: GPT-2 and some models with experts look at values while they run.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    cache = DynamicCache(config=model.config)
    try:
        model(torch.zeros(1, 1, dtype=torch.long, device="meta"), past_key_values=cache, use_cache=True)
    except (RuntimeError, NotImplementedError):
        return ()
    return layers_of(cache)


def token_bytes(layer: CachedLayer, dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values in a layer."""
    return layer.kv_heads * (layer.key_dim + layer.value_dim) * dtype.itemsize


def full_cache_bytes(layers: Sequence[CachedLayer], length: int, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of `length` tokens in the full cache: those that the next token looks back at.

    In a layer with a window of its own they are one fewer than the window, in which the next token has its place.
    """
    return sum(token_bytes(layer, dtype) * min(length, layer.reach(length + 1) - 1) for layer in layers)
