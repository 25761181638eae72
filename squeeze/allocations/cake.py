"""CAKE: much for layers whose attention is spread wide and shifts (arXiv 2503.12491)."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from squeeze.allocations.base import Allocation, Budgets, PromptFacts
from squeeze.allocations.totals import divide
from squeeze.errors import InputError
from squeeze.numbers import number_within, whole_number


@dataclass(frozen=True)
class Cake(Allocation):
    """Budgets above the minimum by the preference of a layer, for each prompt (section 4.2).

    The preference is `entropy ** (1 / tau1) * variance ** (1 / tau2)` of the attention that a prompt's last queries
    pay to the tokens before them. The paper chooses the exponents for every model and budget; by default they are 1.

    Args:
        ini_size: mean budget of the layers, as a fraction of `PromptFacts.reach`.
        window: last tokens of the prompt, whose queries are looked at.
        tau1, tau2: how little entropy and variance count, above 0.
    Raises:
        InputError: a number is out of its range.
    """

    name = "cake"
    needs = "attention"
    ini_size: Fraction
    window: int = 32
    tau1: float = 1
    tau2: float = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("window", self.window, 2, "a whole number of tokens")
        for name in ("tau1", "tau2"):
            number_within(name, getattr(self, name), "above 0", lambda tau: 0 < tau < np.inf)

    @property
    def observed(self) -> int:  # type: ignore[override]
        return self.window

    def allocate(self, facts: PromptFacts) -> Budgets:
        """Budgets of the total of uniform ones."""
        assert facts.spread is not None
        entropy, variance = (part.astype(np.float64) for part in facts.spread)
        with np.errstate(over="ignore"):
            preference = entropy ** (1 / self.tau1) * variance ** (1 / self.tau2)
        if not np.isfinite(preference).all():
            raise InputError(f"{self} finds layers whose preference is not finite: {preference.tolist()}")
        return divide([Fraction(part) for part in preference.tolist()], self.ini_size, facts)
