"""The layers of a model's own full cache: how many numbers a token takes in each, and how many tokens it holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from squeeze.allocations.base import CachedLayer
from squeeze.models.folder_config import own_window


@dataclass(frozen=True)
class OwnLayer:
    """An attention layer of the model's own cache: see `CachedLayer`."""

    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None
    chunk: int | None = None

    def reach(self, tokens: int) -> int:
        return min(tokens, self.window or tokens, self.chunk or tokens)


def own_layers(config: PretrainedConfig) -> tuple[OwnLayer, ...]:
    """The layers of a Llama's or a Mistral's cache."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layer = OwnLayer(config.num_key_value_heads, head_dim, head_dim, own_window(config))
    return (layer,) * config.num_hidden_layers


def token_bytes(layer: CachedLayer, dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values in a layer."""
    return layer.kv_heads * (layer.key_dim + layer.value_dim) * dtype.itemsize


def full_cache_bytes(layers: Sequence[CachedLayer], length: int, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of `length` tokens in the full cache: those that the next token looks back at.

    In a layer with a window of its own they are one fewer than the window, in which the next token has its place.
    """
    return sum(token_bytes(layer, dtype) * min(length, layer.reach(length + 1) - 1) for layer in layers)
