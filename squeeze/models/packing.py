"""Linear layers on the CPU with their weights in oneDNN's blocked layout.

PyTorch keeps a weight in rows and has oneDNN or MKL bring it into the kernel's layout at every call, which for the
few rows of a decode step costs more than the product itself. Here that is done once. Layers that multiply the same
input become one product: starting a small one costs as much as reading its weight.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


def packed_linear(inputs: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`(…, in_features)` times a packed weight: `(…, out_features)`."""
    return torch.ops.mkldnn._linear_pointwise(inputs, packed, bias, "none", [], "")


LIBRARY = torch.library.Library("squeeze", "DEF")
LIBRARY.define("packed_linear(Tensor inputs, Tensor packed, Tensor? bias) -> Tensor")
LIBRARY.impl("packed_linear", packed_linear, "CPU")
LIBRARY.impl("packed_linear", packed_linear, "MkldnnCPU")


@torch.library.register_fake("squeeze::packed_linear", lib=LIBRARY)
def _shape_of_packed_linear(inputs: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return inputs.new_empty(*inputs.shape[:-1], packed.shape[0])


class PackedLinear(nn.Module):
    """The products of `linears` side by side, for inference, from one weight packed for the CPU it runs on."""

    packed: torch.Tensor

    def __init__(self, *linears: nn.Linear):
        super().__init__()
        self.in_features, self.sizes = linears[0].in_features, [linear.out_features for linear in linears]
        weight = torch.cat([linear.weight.detach() for linear in linears])
        self.bias = _joined_bias(linears)
        self.register_buffer("packed", torch.ops.mkldnn._reorder_linear_weight(weight), persistent=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():  # its own rule for oneDNN's operator wants weights that never change
            return torch.ops.squeeze.packed_linear(inputs, self.packed, self.bias)
        return packed_linear(inputs, self.packed, self.bias)

    @property
    def weight(self) -> torch.Tensor:
        """`(out_features, in_features)` in rows again, made for those who ask: some modules look at a layer's."""
        return self.packed.to_dense()

    @property
    def out_features(self) -> int:
        return sum(self.sizes)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.sizes}, bias={self.bias is not None}"


def _joined_bias(linears: Sequence[nn.Linear]) -> torch.Tensor | None:
    if all(linear.bias is None for linear in linears):
        return None
    return torch.cat(
        [linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias for linear in linears]
    ).detach()


class Parts:
    """The product of several layers at once, handed out piece by piece.

    Module code asks one layer after the other with the same input: the first one asked multiplies for all, and the
    last one lets go of input and output. Where threads ask in between each other, some of them multiply again.
    """

    def __init__(self, packed: PackedLinear):
        self.packed = packed
        self.held: tuple[torch.Tensor, tuple[torch.Tensor, ...]] | None = None

    def take(self, index: int, inputs: torch.Tensor) -> torch.Tensor:
        """Output of layer `index`, a view of the whole product."""
        held = self.held  # read once: another thread may put its own there
        if held is None or held[0] is not inputs:
            self.held = held = inputs, self.packed(inputs).split(self.packed.sizes, dim=-1)
        if index == len(self.packed.sizes) - 1:
            self.held = None
        return held[1][index]


class PackedPart(nn.Module):
    """Stand-in for one of the layers in `Parts`."""

    def __init__(self, parts: Parts, index: int):
        super().__init__()
        self.parts, self.index = parts, index
        self.in_features, self.out_features = parts.packed.in_features, parts.packed.sizes[index]
        if index == 0:
            self.packed = parts.packed  # a module's child, once, so that it counts as part of the model

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.parts.take(self.index, inputs)

    @property
    def weight(self) -> torch.Tensor:
        return self.parts.packed.weight.split(self.parts.packed.sizes)[self.index]

    @property
    def bias(self) -> torch.Tensor | None:
        joined = self.parts.packed.bias
        return None if joined is None else joined.split(self.parts.packed.sizes)[self.index]


def packs(dtype: torch.dtype) -> bool:
    """Whether this machine's oneDNN multiplies packed weights of `dtype`."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


@torch.no_grad()
def pack(model: PreTrainedModel) -> None:
    """Replace the linear layers of `model` that lie on the CPU, in place; the model is for inference from then on.

    Layers that accelerate moves between devices are left as they are, and so is everything where `packs` says no.
    """
    fit = [
        (module, name, child)
        for module in model.modules()
        for name, child in module.named_children()
        if type(child) is nn.Linear and _can_pack(child)  # what is made of one may do more than multiply
    ]
    if not fit:
        return
    together = _same_inputs(model, fit)
    for module, name, child in fit:
        group = together.get(child, [(name, child)])
        if group[0][1] is child:
            packed = PackedLinear(*(linear for _, linear in group))
            parts = Parts(packed)
            for index, (member, _) in enumerate(group):
                setattr(module, member, PackedPart(parts, index) if len(group) > 1 else packed)
    del fit, together  # what is left may be all that keeps the file of the weights mapped into memory
    for parameter in model.parameters():
        if parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()
    _give_back_freed_memory()


Named = tuple[str, nn.Linear]


def _same_inputs(
    model: PreTrainedModel, fit: Sequence[tuple[nn.Module, str, nn.Linear]]
) -> dict[nn.Linear, list[Named]]:
    """The layers of a module that it gives one and the same input, in the order in which it asks them: queries, keys
    and values mostly. Found in a forward pass of two tokens; what is asked in another way, or not at all, is alone."""
    runs: list[tuple[nn.Module, torch.Tensor, torch.Tensor, list[Named]]] = []
    asked: Counter[nn.Linear] = Counter()

    def note(module: nn.Module, name: str, linear: nn.Linear, given: tuple[Any, ...]) -> None:
        asked[linear] += 1
        inputs = given[0]
        if runs and runs[-1][0] is module and runs[-1][1] is inputs and torch.equal(runs[-1][2], inputs):
            runs[-1][3].append((name, linear))
        else:
            runs.append((module, inputs, inputs.clone(), [(name, linear)]))

    with ExitStack() as stack:
        for module, name, child in fit:
            hook = child.register_forward_pre_hook(lambda *given, at=(module, name): note(*at, *given))
            stack.callback(hook.remove)
        model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)
    groups = [group for *_, group in runs if all(asked[linear] == 1 for _, linear in group)]
    return {linear: group for group in groups for _, linear in group}


def _can_pack(linear: nn.Linear) -> bool:
    return not hasattr(linear, "_hf_hook") and linear.weight.device.type == "cpu" and packs(linear.weight.dtype)


def _give_back_freed_memory() -> None:
    """Return freed memory to the operating system, where the C library is glibc.

    The rows of weights leave holes between the packed ones, together as large as the model and each too small for
    what comes next, which would stay resident.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
