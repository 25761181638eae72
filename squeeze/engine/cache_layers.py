"""transformers' own layers of a cache, of which its older releases do not have all."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


class _Absent:
    """Stands in for a class that the installed transformers does not have: nothing is an instance of it."""


def _with_state(name: str) -> Any:
    """A class of layers with a state of linear attention; those before transformers 5.14 are others."""
    layer = getattr(cache_utils, "LinearAttentionLayer", _Absent)
    known = "number_of_states" in inspect.signature(layer.__init__).parameters
    return getattr(cache_utils, name, _Absent) if known else _Absent


LinearAttentionLayer = _with_state("LinearAttentionLayer")
LinearAttentionCacheLayerMixin = _with_state("LinearAttentionCacheLayerMixin")

#: Layers that hold nothing but keys and values, or a state of linear attention beside them.
CACHE_LAYERS = (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    _with_state("LinearAttentionAndFullAttentionLayer"),
    _with_state("LinearAttentionAndSlidingWindowAttentionLayer"),
)
