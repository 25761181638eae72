"""Budgets from loss curves that are measured on each prompt's own last tokens."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from squeeze.allocations import curves
from squeeze.allocations.base import Allocation, Budgets, PromptFacts


@dataclass(frozen=True)
class Measured(Allocation):
    """`squeeze.engine.loss_curves` measures them, which costs several prefills: for studies.

    Args:
        ini_size: mean budget of the layers, as a fraction of `PromptFacts.reach`.
    """

    name = "measured"
    by_head = True
    needs = "loss_curves"
    ini_size: Fraction

    def allocate(self, facts: PromptFacts) -> Budgets:
        assert facts.curves is not None
        return curves.budgets(*facts.curves, self.ini_size, facts)
