"""Linear layers on the CPU with their weights in oneDNN's blocked layout.

PyTorch keeps a weight in rows and has oneDNN or MKL bring it into the kernel's layout at every call, which for the
few rows of a decode step costs more than the product itself. Here that is done once.
"""

from __future__ import annotations

import ctypes

import torch
from torch import nn


class PackedLinear(nn.Module):
    """What `linear` computes, for inference, from a weight packed for the CPU it runs on."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self.register_buffer(
            "packed", torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach()), persistent=False
        )

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(inputs, self.packed, self.bias, "none", [], "")

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def packs(dtype: torch.dtype) -> bool:
    """Whether this machine's oneDNN multiplies packed weights of `dtype`."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


@torch.no_grad()
def pack(model: nn.Module) -> None:
    """Replace the linear layers of `model` that lie on the CPU, in place; the model is for inference from then on.

    Layers that accelerate moves between devices are left as they are, and so is everything where `packs` says no.
    """
    packed = False
    for module in list(model.modules()):
        for name, child in module.named_children():
            if not isinstance(child, nn.Linear) or hasattr(child, "_hf_hook"):
                continue
            if child.weight.device.type == "cpu" and packs(child.weight.dtype):
                setattr(module, name, PackedLinear(child))
                packed = True
    if packed:  # what is left may be all that keeps the file of the weights mapped into memory
        for parameter in model.parameters():
            if parameter.device.type == "cpu":
                parameter.data = parameter.data.clone()
        _give_back_freed_memory()


def _give_back_freed_memory() -> None:
    """To the operating system, where the C library is glibc.

    The rows of weights leave holes between the packed ones, together as large as the model and each too small for
    what comes next, which would stay resident.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
