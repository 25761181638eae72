"""PyramidKV: much for the first layers, little for the last (arXiv 2406.02069)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from squeeze.allocations.base import Allocation, Budgets, PromptFacts
from squeeze.allocations.linear import falling
from squeeze.numbers import number_within


@dataclass(frozen=True)
class Pyramid(Allocation):
    """The published arithmetic sequence (section 3.2), above the minimum: a method's own window is no part of it.

    Args:
        ini_size: mean budget of the layers, as a fraction of `PromptFacts.reach`.
        beta: how steep it is: the last layer gets 1 / `beta` of the mean above the minimum; 1 or more.
    Raises:
        InputError: a number is out of its range.
    """

    name = "pyramid"
    ini_size: Fraction
    beta: float = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        number_within("beta", self.beta, "1 or more", lambda beta: 1 <= beta < math.inf)

    def allocate(self, facts: PromptFacts) -> Budgets:
        """Budgets of the total of uniform ones."""
        return falling(1 / Fraction(str(self.beta)), self.ini_size, facts)
