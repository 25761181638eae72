"""The attention function that a squeezed model's own code calls, through transformers' AttentionInterface.

A model hands it queries, keys and values after RoPE, norms and whatever else it does to them, just after it has called
`update` on the cache. The function is registered as long as any model is squeezed, and looked up only in passes with a
SqueezeCache.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, PretrainedConfig

from squeeze.engine import decode_attention, prefill_attention
from squeeze.engine.attention import Rule
from squeeze.engine.autocast import as_autocast, without_autocast
from squeeze.engine.cache import SqueezeCache
from squeeze.engine.compiling import Compiled
from squeeze.engine.expected import expected_attention
from squeeze.engine.layer import SqueezeLayer
from squeeze.evictors.base import Future

#: The function's name in the AttentionInterface.
NAME = "squeeze"

_registering = threading.Lock()
_registered = 0


class _Pass(threading.local):
    """The forward pass under way on a thread, which hooks may start within another one.

    Attributes:
        cache: that it fills or reads; None in passes without a squeezed cache, and between passes.
        own: the attention functions' names before the outermost pass, by the `id` of the configuration that
            holds them.
    """

    cache: SqueezeCache | None = None

    def __init__(self) -> None:
        self.own: dict[int, str | None] = {}


_under_way = _Pass()


@contextmanager
def registered() -> Iterator[None]:
    """A block in which the AttentionInterface knows the function; it may be entered many times at once."""
    global _registered
    with _registering:
        if _registered == 0:
            AttentionInterface.register(NAME, attend)
        _registered += 1
    try:
        yield
    finally:
        with _registering:
            _registered -= 1
            if _registered == 0:
                del AttentionInterface._global_mapping[NAME]


@contextmanager
def forward_pass(cache: SqueezeCache | None, configs: Sequence[PretrainedConfig], name: str | None) -> Iterator[None]:
    """A block that holds one forward pass.

    Args:
        cache: the squeezed cache that it works on, or None.
        configs: by which the model's modules look up their attention function.
        name: that they find inside the block; None: the model's own.
    """
    outer, before = (_under_way.cache, _under_way.own), [config._attn_implementation_internal for config in configs]
    _under_way.cache, _under_way.own = cache, dict(zip(map(id, configs), before, strict=True)) | _under_way.own
    try:
        for config in configs:
            config._attn_implementation_internal = name or _under_way.own[id(config)]
        yield
    finally:
        _under_way.cache, _under_way.own = outer
        for config, was in zip(configs, before, strict=True):
            config._attn_implementation_internal = was


def current_cache() -> SqueezeCache | None:
    """The squeezed cache of the forward pass under way on this thread."""
    return _under_way.cache


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention over what a SqueezeCache returned from `update`.

    Args:
        query: `(batch, heads, tokens, head_dim)`.
        key, value: `(batch, kv_heads, keys, head_dim)`.
        attention_mask: not looked at, since the cache knows each sequence's length.
        scaling: of the products; None: one over the root of `head_dim`.
        softcap, s_aux: see `Rule`.
    Returns:
        `(batch, tokens, heads, head_dim)`, and no probabilities.
    """
    if not torch.compiler.is_compiling():
        layer = _layer_of(module)
    elif Compiled.layer is not None:
        layer = Compiled.layer
    else:  # a decoder layer that its user compiled
        return _break_graph(module, query, key, value, scaling=scaling, softcap=softcap, s_aux=s_aux)
    facts = layer.facts
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    rule = Rule(scale, facts.window, facts.chunk, softcap, s_aux)
    # The module whose keys these are; others may look at them again (Gemma 3n).
    own = not layer.shared or module is facts.module
    [query] = as_autocast(query)
    with without_autocast(query.device):
        if layer.reading is None:
            asking = query.to(key.dtype)
            if layer.following:
                attended = _one_by_one(asking, key, value, layer, rule)
            else:
                attended = decode_attention.decode(asking, key, value, layer, rule, own)
            return attended.to(query.dtype).transpose(1, 2), None
        reading, observed = layer.reading, layer.evictor.observed if own else 0
        future = observed if isinstance(observed, Future) else None
        now = 0 if isinstance(observed, Future) else observed
        attended, scores = prefill_attention.prefill(
            query, key, value, layer.places, reading.lengths, rule, fused=reading.fused, observed=now
        )
        if own and layer.pending is not None:  # DiffLlama attends twice
            if future is not None:
                scores = expected_attention(query, key, reading.lengths, scale, facts.rotation, future)
            if reading.looking:
                layer.spread = prefill_attention.spread(query, key, reading.lengths, rule, reading.looking)
            layer.take(scores)
    return attended.transpose(1, 2), None


def _one_by_one(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, layer: SqueezeLayer, rule: Rule
) -> torch.Tensor:
    """Attention of several tokens on a cut cache, each of which is taken in before the next one asks."""
    attended = []
    for number, (step, seen) in enumerate(layer.following):
        query, key, value = (part[:, :, number : number + 1] for part in (queries, keys, values))
        layer.begin(step, seen)
        attended.append(decode_attention.decode(query, *layer.take_in(key, value), layer, rule, counted=True))
    return torch.cat(attended, dim=2)


@torch.compiler.disable
def _break_graph(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    """`attend`, outside of the graph that is being traced."""
    return attend(*args, **kwargs)


def _layer_of(module: torch.nn.Module) -> SqueezeLayer:
    cache = _under_way.cache
    if cache is None:
        raise ValueError(
            "a model that shares its configuration object with a squeezed one was run during a pass of that one: give "
            "it a copy, such as copy.deepcopy(config)"
        )
    return cache.by_module[module]
