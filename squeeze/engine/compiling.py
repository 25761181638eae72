"""`torch.compile` for the decode step, where it can work: one graph for all decoder layers that are alike."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch

from squeeze.engine.cache import SqueezeCache
from squeeze.engine.findings import AttentionLayer, Findings
from squeeze.engine.layer import SqueezeLayer
from squeeze.errors import InputError
from squeeze.text import message_of

#: Variants of one function: sequences of one length or several, one or more of them, full buffers or not, gradients
#: off in one way or another.
VARIANTS = 32


def compiled(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """`function`, compiled when it is called; sizes and counts may change from call to call.

    Raises:
        InputError: nothing can be compiled for `device` on this machine. A small function is tried, since what is
            needed (a C++ compiler and Python's headers, or Triton) shows in no other way.
    """
    try:
        torch.compile(torch.sin, dynamic=True)(torch.ones(3, device=device))
    except Exception as error:  # whatever the compiler's absence raises
        need = "Triton" if device.type == "cuda" else "a C++ compiler such as g++, and Python's headers"
        raise InputError(f"--compile needs {need} ({message_of(error)}): install it, or leave --compile out") from None
    more: dict[str, Any] = {}
    if "recompile_limit" in signature(torch.compile).parameters:  # which its type hints forgot
        more["recompile_limit"] = VARIANTS
    return torch.compile(function, dynamic=True, **more)


class Compiled:
    """The cache layer that a compiled decoder layer has just updated, where `interface.attend` finds it.

    It is written and read inside one graph, in which it is no lookup at all.
    """

    layer: SqueezeLayer | None = None


def forget() -> None:
    """Let go of the layer, whose cache would live on."""
    Compiled.layer = None


class OneLayer:
    """Stands in for the cache in a compiled decoder layer, whose number is not looked at: so layers share a graph."""

    def __init__(self, layer: SqueezeLayer):
        self.layer = layer

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any):
        """As `SqueezeLayer.update`."""
        Compiled.layer = self.layer
        return self.layer.update(keys, values)


def decode_block(block: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A decoder layer's own forward pass, for `torch.compile`."""
    return type(block).forward(block, *args, **kwargs)


class CompiledBlock:
    """Stands in for a decoder layer's forward pass where its decode step is compiled.

    What would tell layers apart, and have a graph made for each, is the same for all of them during the step: where
    parts of larger tensors begin, and the number that attention gives to `update`, of which transformers' own code
    makes no other use. Others' code may, and is compiled for each number.

    Args:
        step: `decode_block`, compiled.
        number: of the cache layer that it works on, among those that are squeezed.
        layer: attention and the decoder layer around it.
    """

    def __init__(self, step: Callable[..., Any], number: int, layer: AttentionLayer):
        self.step, self.number, self.block, self.original = step, number, layer.block, layer.block.forward
        own, known = vars(layer.module), type(layer.module).__module__.startswith("transformers.")
        self.numbered = own if known and "layer_idx" in own else None

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, SqueezeCache)), None)
        if cache is None or not cache.compressed:
            return self.original(*args, **kwargs)
        layer = cache.squeezed[self.number]
        for name in ("position", "budget", "lengths", "rows"):
            setattr(layer, name, getattr(layer, name).clone())
        given = {id(cache): OneLayer(layer), id(kwargs.get("attention_mask")): None}  # which `attend` does not look at
        args, kwargs = (
            tuple(given.get(id(value), value) for value in args),
            {name: given.get(id(value), value) for name, value in kwargs.items()},
        )
        if self.numbered is None:
            return self.step(self.block, *args, **kwargs)
        index, self.numbered["layer_idx"] = self.numbered["layer_idx"], 0
        try:
            return self.step(self.block, *args, **kwargs)
        finally:
            self.numbered["layer_idx"] = index


def check_blocks(findings: Findings) -> None:
    """Raises InputError unless every decoder layer keeps the cache of one plain attention layer, and nothing else."""
    blocks = {layer.block for layer in findings.layers}
    other = findings.others or len(blocks) < len(findings.layers)
    if other or any(layer.hybrid or layer.chunk or not layer.interface for layer in findings.layers):
        raise InputError(
            "compile needs decoder layers with one attention layer each, which goes through transformers' "
            "AttentionInterface and has no chunks, and nothing else that is cached; this model has others: leave "
            "compile out"
        )
