"""The layers of a model's own full cache: how many numbers a token takes in each, and how many tokens it holds."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import Cache, DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer

from squeeze.allocations.base import CachedLayer
from squeeze.compatibility import cache_argument
from squeeze.models.described import META, build, quiet
from squeeze.models.folder_config import text_config


@dataclass(frozen=True)
class OwnLayer:
    """An attention layer of the model's own cache: see `CachedLayer`."""

    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None
    chunk: int | None = None

    def reach(self, tokens: int) -> int:
        return min(tokens, self.window or tokens, self.chunk or tokens)


_known: dict[str, tuple[OwnLayer, ...]] = {}


def own_layers(config: PretrainedConfig) -> tuple[OwnLayer, ...]:
    """Each layer of a model's full cache that holds keys and values: not those of linear attention or state spaces,
    nor those that use another's."""
    described = config.to_json_string(use_diff=False)
    if described not in _known:
        _known[described] = _layers(config)
    return _known[described]


def _layers(config: PretrainedConfig) -> tuple[OwnLayer, ...]:
    """What one forward pass leaves in a cache, on PyTorch's `meta` device.

    A few architectures look at numbers, of which there are none there, and stop after their first layers: then the
    widest layer seen stands for all, or what the configuration says.
    """
    with quiet():
        model = build(config).eval()
    cache, whole = DynamicCache(config=config), False
    with torch.no_grad(), suppress(RuntimeError, NotImplementedError, ValueError):
        given = {"input_ids": torch.zeros(1, 1, dtype=torch.long, device=META), cache_argument(): cache}
        model(**given, use_cache=True)
        whole = True
    if whole:
        return layers_of(cache)
    seen = layers_of(cache) or [_said(text_config(config))]
    widest = max(seen, key=lambda layer: layer.kv_heads * (layer.key_dim + layer.value_dim))
    attending = [layer for layer in cache.layers if isinstance(layer, DynamicLayer)]
    return tuple(replace(widest, window=getattr(layer, "sliding_window", None)) for layer in attending)


def _said(config: PretrainedConfig) -> OwnLayer:
    """A layer as the configuration has it, where all are alike."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return OwnLayer(heads, dim, dim)


def layers_of(cache: Cache) -> tuple[OwnLayer, ...]:
    """Each layer that holds keys and values, of a full cache that has seen a token; a chunk counts as a window."""
    found = [(_shape(layer), getattr(layer, "sliding_window", None)) for layer in cache.layers]
    return tuple(OwnLayer(*shape, window) for shape, window in found if shape)


def held_bytes(cache: Cache) -> int:
    """Bytes of all keys and values that a full cache holds."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if _shape(layer))


def _shape(layer: Any) -> tuple[int, int, int] | None:
    """KV heads and numbers of a key and a value; None of a layer that holds no token."""
    if getattr(layer, "keys", None) is None:
        return None
    return layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]


def token_bytes(layer: CachedLayer, dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values in a layer."""
    return layer.kv_heads * (layer.key_dim + layer.value_dim) * dtype.itemsize


def full_cache_bytes(layers: Sequence[CachedLayer], length: int, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of `length` tokens in the full cache: those that the next token looks back at.

    In a layer with a window of its own they are one fewer than the window, in which the next token has its place.
    """
    return sum(token_bytes(layer, dtype) * min(length, layer.reach(length + 1) - 1) for layer in layers)
