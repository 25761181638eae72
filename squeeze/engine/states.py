"""What a hybrid model's cache holds beside keys and values: the states of linear attention and state-space layers.

They have one size whatever the prompt, and stay as the model makes them. Some layers have both (Falcon-H1, Zamba).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache

from squeeze.engine.cache_layers import LinearAttentionCacheLayerMixin, LinearAttentionLayer
from squeeze.engine.findings import AttentionLayer, Findings
from squeeze.engine.layer import SqueezeLayer
from squeeze.evictors import Evictor


class HybridLayer(LinearAttentionLayer, SqueezeLayer):
    """Keys and values that are squeezed, and a state beside them."""

    is_compileable = False

    def __init__(self, evictor: Evictor, facts: AttentionLayer, number_of_states: int):
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)
        SqueezeLayer.__init__(self, evictor, facts)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        LinearAttentionLayer.lazy_initialization(self, *args, **kwargs)


def own_layers(findings: Findings) -> list[Any]:
    """The layers of the model's own cache, empty."""
    return DynamicCache(config=findings.decoder.config).layers


def squeeze_layer(evictor: Evictor, facts: AttentionLayer, own: object) -> SqueezeLayer:
    """The layer to put in the place of one of the model's `own`."""
    if isinstance(own, LinearAttentionLayer):
        return HybridLayer(evictor, facts, own.number_of_states)
    return SqueezeLayer(evictor, facts)


def copied(layers: list[Any]) -> dict[int, dict[str, Any]]:
    """Copies of the states in a cache's layers, by their numbers; empty where a model has none."""
    return {
        index: copy.deepcopy({name: vars(layer)[name] for name in _names(layer)})
        for index, layer in enumerate(layers)
        if isinstance(layer, LinearAttentionCacheLayerMixin)
    }


def restore(
    layers: list[Any], states: dict[int, dict[str, Any]], rows: Sequence[int] | None = None, prompts: int = 1
) -> None:
    """Put copies of states back.

    Args:
        rows: of each layer, the sequences that it holds, where the states are those of a few prompts, again and again.
        prompts: that the states are of.
    """
    for index, state in states.items():
        layer = layers[index]
        vars(layer).update(copy.deepcopy(state))
        if rows is not None:
            LinearAttentionCacheLayerMixin.reorder_cache(layer, torch.arange(rows[index]) % prompts)


def _names(layer: Any) -> set[str]:
    """The attributes that a layer without keys and values has."""
    return vars(LinearAttentionLayer(number_of_states=layer.number_of_states)).keys() & vars(layer).keys()
