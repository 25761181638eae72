"""The device that a model runs on: which one, in which dtype, its clock and its memory."""

from __future__ import annotations

import gc
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import torch

from squeeze.config import DTYPES
from squeeze.errors import InputError
from squeeze.text import shortened

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")

#: Seconds by the name of a `section`, while `section_seconds` collects them.
_seconds: dict[str, float] | None = None


def pick_device(device: str | None, local_rank: int = 0) -> torch.device:
    """Read `--device`; None is a GPU, or the CPU where there is none.

    Args:
        local_rank: which of several processes on this machine this is: the GPU that it gets unless `device` names one.
    Raises:
        InputError: there is no such device.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{local_rank}"
    try:
        target = torch.device(device)
    except RuntimeError:
        target = None
    if target is None or target.type not in ("cpu", "cuda"):
        raise InputError(f"--device must be cpu, cuda or cuda:N, got {shortened(device)}")
    if target.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {device}: PyTorch finds no CUDA here; use --device cpu")
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {device}: there are {torch.cuda.device_count()} GPUs, counted from cuda:0")
    return target


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Read `--dtype`; auto is bfloat16 on a GPU, and on a CPU that multiplies it in hardware, else float32.

    Raises:
        InputError: it is none of `DTYPES`, or bfloat16 on a GPU that has none.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {shortened(dtype)}")
    on_gpu = device.type == "cuda"
    if dtype == "auto":
        dtype = "bfloat16" if on_gpu or _cpu_multiplies_bfloat16() else "float32"
    if dtype == "bfloat16" and on_gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise InputError(f"{torch.cuda.get_device_name(device)} has no bfloat16: use --dtype float16 or float32")
    return getattr(torch, dtype)


def _cpu_multiplies_bfloat16() -> bool:
    """True with AVX512-BF16 or AMX: without them it is emulated, and float32 is faster."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def input_device(model: PreTrainedModel) -> torch.device:
    """Where a model takes its token ids; the CPU for one whose embeddings accelerate brings in when they are asked."""
    device = model.get_input_embeddings().weight.device
    return torch.device("cpu") if device.type == "meta" else device


def now(device: torch.device) -> float:
    """Seconds on a clock, once all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def section(name: str, device: torch.device) -> Iterator[None]:
    """Time a part of the work, where `section_seconds` asks for it; elsewhere nothing is waited for."""
    if _seconds is None:
        yield
        return
    start = now(device)
    yield
    _seconds[name] = _seconds.get(name, 0.0) + now(device) - start


@contextmanager
def section_seconds() -> Iterator[dict[str, float]]:
    """Collect the seconds that each `section` of this process takes inside the block, by name."""
    global _seconds
    _seconds = {}
    try:
        yield _seconds
    finally:
        _seconds = None


def peak_memory(device: torch.device) -> int:
    """The most bytes this process has held so far: on GPUs, tensors; on the CPU, all of its resident memory."""
    if device.type == "cuda":
        return sum(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count())))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def unless_out_of_memory(work: Callable[[], T]) -> T | None:
    """The result of `work`, or None where memory ran out; what the attempt held is free again on return."""
    try:
        return work()
    except (torch.OutOfMemoryError, MemoryError):
        pass
    except RuntimeError as error:  # PyTorch's allocator on the CPU has no exception of its own
        if "can't allocate memory" not in str(error):
            raise
    gc.collect()
    torch.cuda.empty_cache()
    return None
