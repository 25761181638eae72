"""Budgets from a model's loss curves, measured once by `python -m squeeze.calibrate`."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from squeeze.allocations import curves
from squeeze.allocations.base import Allocation, Budgets, PromptFacts
from squeeze.allocations.calibration import Calibration
from squeeze.errors import InputError
from squeeze.evictors.base import Evictor


@dataclass(frozen=True)
class Calibrated(Allocation):
    """Tokens go where the next one saves the most, on other prompts than the one that is run.

    Args:
        ini_size: mean budget of the layers, as a fraction of `PromptFacts.reach`.
        calibration: the curves, from `read_calibration`.
    """

    name = "calibrated"
    by_head = True
    ini_size: Fraction
    calibration: Calibration | None = None

    def allocate(self, facts: PromptFacts) -> Budgets:
        assert self.calibration is not None
        multiples, losses = self.calibration.multiples, self.calibration.measurements(self.ini_size)
        return curves.budgets(multiples, losses, self.ini_size, facts)

    def check(self, algorithm: str, evictor: Evictor, layers: int) -> None:
        if self.calibration is None:
            raise InputError(f"the allocation {self} needs loss curves: calibration=read_calibration(FILE)")
        self.calibration.check(algorithm, evictor, layers)
