"""KV-cache budgets per layer for any decoder of transformers: SqueezeAttention (arXiv 2404.04793) and its peers."""

import importlib
from typing import TYPE_CHECKING, Any

from squeeze.cli import interrupt

if interrupt.is_command():
    interrupt.ends()

from squeeze.config import SqueezeConfig
from squeeze.errors import InputError

if TYPE_CHECKING:
    from squeeze.allocations.base import Allocation, Budgets, PromptFacts
    from squeeze.allocations.cake import Cake
    from squeeze.allocations.calibrated import Calibrated
    from squeeze.allocations.calibration import read_calibration
    from squeeze.allocations.explicit import Explicit
    from squeeze.allocations.linear import Linear
    from squeeze.allocations.measured import Measured
    from squeeze.allocations.paper import Paper
    from squeeze.allocations.pyramid import Pyramid
    from squeeze.allocations.squeeze import Squeeze
    from squeeze.allocations.squeeze_log import SqueezeLog
    from squeeze.allocations.totals import conserve
    from squeeze.allocations.uniform import Uniform
    from squeeze.engine.patch import squeezed
    from squeeze.evictors.base import Evictor, Future, Tokens
    from squeeze.evictors.expected_attention import ExpectedAttention
    from squeeze.evictors.h2o import H2O
    from squeeze.evictors.keydiff import KeyDiff
    from squeeze.evictors.knorm import KNorm
    from squeeze.evictors.lagkv import LagKV
    from squeeze.evictors.random import Random
    from squeeze.evictors.sliding_window import SlidingWindow
    from squeeze.evictors.snapkv import SnapKV
    from squeeze.evictors.streaming import StreamingLLM
    from squeeze.evictors.tova import TOVA

#: Where the rest is, imported when it is first asked for: torch and transformers take seconds, `--help` should not.
MODULES = {
    "squeezed": "engine.patch",
    "Evictor": "evictors.base",
    "Future": "evictors.base",
    "Tokens": "evictors.base",
    "SlidingWindow": "evictors.sliding_window",
    "StreamingLLM": "evictors.streaming",
    "H2O": "evictors.h2o",
    "SnapKV": "evictors.snapkv",
    "TOVA": "evictors.tova",
    "ExpectedAttention": "evictors.expected_attention",
    "KNorm": "evictors.knorm",
    "KeyDiff": "evictors.keydiff",
    "LagKV": "evictors.lagkv",
    "Random": "evictors.random",
    "Allocation": "allocations.base",
    "Budgets": "allocations.base",
    "PromptFacts": "allocations.base",
    "Uniform": "allocations.uniform",
    "Explicit": "allocations.explicit",
    "Cake": "allocations.cake",
    "Linear": "allocations.linear",
    "Pyramid": "allocations.pyramid",
    "Squeeze": "allocations.squeeze",
    "SqueezeLog": "allocations.squeeze_log",
    "Paper": "allocations.paper",
    "Calibrated": "allocations.calibrated",
    "Measured": "allocations.measured",
    "conserve": "allocations.totals",
    "read_calibration": "allocations.calibration",
}

__all__ = [
    "H2O",
    "TOVA",
    "Allocation",
    "Budgets",
    "Cake",
    "Calibrated",
    "Evictor",
    "ExpectedAttention",
    "Explicit",
    "Future",
    "InputError",
    "KNorm",
    "KeyDiff",
    "LagKV",
    "Linear",
    "Measured",
    "Paper",
    "PromptFacts",
    "Pyramid",
    "Random",
    "SlidingWindow",
    "SnapKV",
    "Squeeze",
    "SqueezeConfig",
    "SqueezeLog",
    "StreamingLLM",
    "Tokens",
    "Uniform",
    "conserve",
    "read_calibration",
    "squeezed",
]


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    if name == "squeezed":
        from squeeze.compatibility import check_transformers

        check_transformers()
    return getattr(importlib.import_module(f"squeeze.{MODULES[name]}"), name)
