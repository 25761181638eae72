"""The allocations, one file an allocation, and what they share: classes, totals, and budgets from loss curves."""

from __future__ import annotations

from squeeze.allocations.base import Allocation
from squeeze.registry import Registry

ALLOCATIONS: Registry[Allocation] = Registry(
    "allocation",
    "squeeze.allocations",
    Allocation,  # type: ignore[type-abstract]
    {
        "uniform": "squeeze.allocations.uniform:Uniform",
        "squeeze": "squeeze.allocations.squeeze:Squeeze",
        "squeeze-log": "squeeze.allocations.squeeze_log:SqueezeLog",
        "paper": "squeeze.allocations.paper:Paper",
        "linear": "squeeze.allocations.linear:Linear",
        "pyramid": "squeeze.allocations.pyramid:Pyramid",
        "cake": "squeeze.allocations.cake:Cake",
        "calibrated": "squeeze.allocations.calibrated:Calibrated",
        "measured": "squeeze.allocations.measured:Measured",
    },
)

#: The allocation where none is asked for.
DEFAULT = "squeeze"

__all__ = ["ALLOCATIONS", "DEFAULT", "Allocation"]
