"""Which kernels attend: see docs/gpu.md for what was measured."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from functools import cache
from inspect import signature
from typing import Any

import torch

from squeeze.text import message_of

#: Dtypes that flash-attn's kernels take, and PyTorch's.
FLASH_DTYPES = (torch.float16, torch.bfloat16)

#: Numbers of one head that they take at most.
FLASH_WIDTH = 256

#: Slots of a group of rows up to which PyTorch's fused kernel takes them on a CPU, in 16 bits. Where there are more,
#: matrix products read memory faster; but oneDNN compiles one for every shape, and forgets those beyond 1,024, as many
#: small groups of many lengths would need at every step.
FEW_SLOTS = 4096

#: The oldest GPUs that these kernels run on, by compute capability (Ampere).
OLDEST = 8, 0


def _varlen_kernel() -> Callable[..., Any] | None:
    """PyTorch's attention for sequences of any lengths, where it is there and takes how much of each is used."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # before PyTorch 2.10
        return None
    return varlen_attn if {"seqused_k", "enable_gqa"} <= signature(varlen_attn).parameters.keys() else None


varlen_attn = _varlen_kernel()


def flash_takes(keys: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether these kernels take heads of such widths, the last dimension of both."""
    return keys.shape[-1] == values.shape[-1] <= FLASH_WIDTH and keys.shape[-1] % 8 == 0


def decode_kernel(device: torch.device, dtype: torch.dtype, scored: bool) -> str:
    """Kernel of decode steps: `grouped` matrix products, or a fused one.

    In float32 grouped products are taken: on GPUs they are faster (docs/gpu.md), on a CPU sometimes, and sometimes not
    (docs/speed.md). With `scored` attention probabilities are wanted, which fused kernels do not give.

    Returns:
        `grouped`; on a GPU `flash` (flash-attn) or `sdpa` (PyTorch), or for rows of several lengths PyTorch's
        `varlen_attn`; on a CPU `sdpa by group`: PyTorch's, for small groups of rows of one length (`FEW_SLOTS`).
    """
    if dtype not in FLASH_DTYPES or scored:
        return "grouped"
    if device.type != "cuda":
        return "sdpa by group"
    return "flash" if importlib.util.find_spec("flash_attn") is not None else "sdpa"


@cache
def sums_columns(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a scored prefill takes PyTorch's fused kernel and `squeeze.engine.column_sums` after it.

    Where a GPU can not, in half precision, a warning says so once: blocks of queries, which are slower, stand in.
    """
    if device.type != "cuda" or dtype not in FLASH_DTYPES:
        return False
    reason, capability = None, torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        own, oldest = (".".join(map(str, pair)) for pair in (capability, OLDEST))
        reason = f"this GPU has compute capability {own}, and the kernel that sums attention up needs {oldest}"
    elif importlib.util.find_spec("triton") is None:
        reason = "Triton is not installed (pip install triton), and the kernel that sums attention up needs it"
    else:
        try:
            _try_sums(device, dtype)
        except Exception as error:  # whatever a missing compiler raises, which shows in no other way
            reason = f"Triton cannot compile the kernel that sums attention up ({message_of(error)})"
    if reason is not None:
        warnings.warn(f"{reason}: blocks of queries take its place in the prefill", stacklevel=2)
    return reason is None


def _try_sums(device: torch.device, dtype: torch.dtype) -> None:
    """Run the kernel on a few zeros."""
    from squeeze.engine.column_sums import column_sums

    zeros = torch.zeros(1, 16, 16, device=device, dtype=dtype)
    column_sums(zeros, zeros, torch.zeros(1, 16, device=device), 1.0, None)
