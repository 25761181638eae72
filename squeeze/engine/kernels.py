"""Which kernel decodes: see docs/gpu.md for what was measured."""

from __future__ import annotations

import importlib.util

import torch

#: Dtypes that flash-attn's kernels take.
FLASH_DTYPES = (torch.float16, torch.bfloat16)


def decode_kernel(device: torch.device, dtype: torch.dtype, scored: bool) -> str:
    """Kernel of decode steps: `grouped` matrix products, or a fused one, `flash` (flash-attn) or `sdpa` (PyTorch).

    On CPUs, and on GPUs in float32, grouped products are faster, by measurement (docs/gpu.md). With `scored` attention
    probabilities are wanted, which fused kernels do not give.
    """
    if device.type != "cuda" or dtype not in FLASH_DTYPES or scored:
        return "grouped"
    return "flash" if importlib.util.find_spec("flash_attn") is not None else "sdpa"
