"""`torch.compile` for the decode step, where it can work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from squeeze.errors import InputError

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
        lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.endswith(":")]
        need = "Triton" if device.type == "cuda" else "a C++ compiler such as g++, and Python's headers"
        reason = lines[0] if lines else type(error).__name__
        raise InputError(f"--compile needs {need} ({reason}): install it, or leave --compile out") from None
    more: dict[str, Any] = {"recompile_limit": VARIANTS}  # which PyTorch's own type hints forgot
    return torch.compile(function, dynamic=True, **more)
