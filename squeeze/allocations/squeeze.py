"""SqueezeAttention with its total kept to the token (arXiv 2404.04793, section 4.2 and algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from squeeze.allocations.base import Allocation, Budgets, Needs, PromptFacts
from squeeze.allocations.classes import CLASS_3, formula
from squeeze.allocations.totals import conserve


@dataclass(frozen=True)
class Squeeze(Allocation):
    """The published classes and formula; what a cap leaves over goes to class 3, so that no token is lost.

    Args:
        ini_size: budget of every layer before squeezing, as a fraction of `PromptFacts.reach`, in (0, 1].
        class3: budget of the layers in class 3, as such a fraction, in (0, `ini_size`] (`KV_class3`); equal to
            `ini_size`, budgets are uniform and need no similarities.
    Raises:
        InputError: a size is out of its range.
    """

    name = "squeeze"
    ini_size: Fraction
    class3: Fraction

    @property
    def needs(self) -> Needs:  # type: ignore[override]
        return "nothing" if self.class3 == self.ini_size else "similarities"

    def allocate(self, facts: PromptFacts) -> Budgets:
        """Budgets of the total of uniform ones, see `conserve`, unless a note says why they cannot be."""
        classes = None if facts.similarities is None else self.classify(facts.similarities)
        shares = self.shares(classes or [CLASS_3] * facts.layers, facts)
        takers = [layer for layer, layer_class in enumerate(classes or []) if layer_class == CLASS_3]
        return conserve(shares, facts, takers, classes)

    def shares(self, classes: list[int], facts: PromptFacts) -> list[Fraction]:
        """Tokens of each layer before bounds and rounding."""
        return formula(classes, self.ini_size, self.class3, facts.reach, facts.weights)
