"""Autocast: the dtype that a pass computes in, and blocks in which none is changed."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def as_autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors in autocast's dtype, where it is on: in which the model's own attention would multiply them."""
    dtype = autocast_dtype(tensors[0].device)
    return tensors if dtype is None else tuple(tensor.to(dtype) for tensor in tensors)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of autocast; None where it is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A block in which no dtype is changed: attention has float32 softmax and sums, and products into buffers."""
    on = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()
