"""The same budget for every layer."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from squeeze.allocations.base import Allocation, Budgets, PromptFacts
from squeeze.allocations.totals import conserve


@dataclass(frozen=True)
class Uniform(Allocation):
    """The budgets of eviction methods by themselves, and the baseline of every other allocation.

    Args:
        ini_size: budget of every layer, as a fraction of `PromptFacts.reach`.
    """

    name = "uniform"
    ini_size: Fraction

    def allocate(self, facts: PromptFacts) -> Budgets:
        return conserve([self.ini_size * reach for reach in facts.reach], facts)
