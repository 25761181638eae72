"""transformers' own layers of a cache, of which its older releases do not have all."""

from __future__ import annotations

from typing import Any

from transformers import cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


class _Absent:
    """Stands in for a class that the installed transformers does not have: nothing is an instance of it."""


def _layer(name: str) -> Any:
    return getattr(cache_utils, name, _Absent)


#: A layer's state in place of keys and values, or beside them; since transformers 5.4 or thereabouts.
LinearAttentionLayer = _layer("LinearAttentionLayer")
LinearAttentionCacheLayerMixin = _layer("LinearAttentionCacheLayerMixin")

#: Layers that hold nothing but keys and values, or a state of linear attention beside them.
CACHE_LAYERS = (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    _layer("LinearAttentionAndFullAttentionLayer"),
    _layer("LinearAttentionAndSlidingWindowAttentionLayer"),
)
