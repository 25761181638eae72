"""Budgets that fall in a straight line from the first layer to the last."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from squeeze.allocations.base import Allocation, Budgets, PromptFacts
from squeeze.allocations.totals import divide
from squeeze.numbers import number_within


@dataclass(frozen=True)
class Linear(Allocation):
    """A straight line, whose mean over the layers is what uniform budgets are: see `falling`.

    Args:
        ini_size: mean budget of the layers, as a fraction of `PromptFacts.reach`.
        last: what the last layer gets above the minimum, as a fraction of the mean, from 0 to 1.
    Raises:
        InputError: a number is out of its range.
    """

    name = "linear"
    ini_size: Fraction
    last: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        number_within("last", self.last, "from 0 to 1", lambda last: 0 <= last <= 1)

    def allocate(self, facts: PromptFacts) -> Budgets:
        """Budgets of the total of uniform ones."""
        return falling(Fraction(str(self.last)), self.ini_size, facts)


def falling(last: Fraction, ini_size: Fraction, facts: PromptFacts) -> Budgets:
    """Budgets above the minimum of every layer in a straight line: 2 - `last` times their mean to `last` times it.

    Where the first layers would have more than the whole prompt the line is flatter, as flat as that takes.
    """
    bounds = list(zip(facts.reach, facts.least, strict=True))
    above = [(tokens - least, ini_size * tokens - least) for tokens, least in bounds]
    room = [most / mean for most, mean in above if mean > 0]
    first = min(2 - last, *room) if room else Fraction(1)
    steps = max(facts.layers - 1, 1)
    return divide([first + (2 - 2 * first) * layer / steps for layer in range(facts.layers)], ini_size, facts)
