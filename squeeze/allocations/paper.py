"""SqueezeAttention to the letter (arXiv 2404.04793, algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from squeeze.allocations.base import PromptFacts
from squeeze.allocations.squeeze import Squeeze


@dataclass(frozen=True)
class Paper(Squeeze):
    """The published formula: every budget is truncated and capped by itself, which can lose part of the total."""

    name = "paper"

    def shares(self, classes: list[int], facts: PromptFacts) -> list[Fraction]:
        return [
            Fraction(min(int(share), cap))
            for share, cap in zip(super().shares(classes, facts), facts.caps, strict=True)
        ]
