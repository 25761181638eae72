"""Random tokens: the control that tells how much of a method's quality is its choice."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from squeeze.evictors.base import Evictor, Tokens
from squeeze.evictors.choice import keep_best, slot_of_lowest
from squeeze.numbers import whole_number


@dataclass(frozen=True)
class Random(Evictor):
    """Each token of each KV head has a random score for life, and the lowest goes.

    The score follows from position, head and seed alone, so that a run can be repeated and a batch changes nothing.

    Args:
        seed: of the scores.
    """

    name = "random"
    needs_scores = True
    observed = 0
    updates = "fixed"
    seed: int = 0

    def __post_init__(self) -> None:
        whole_number("seed", self.seed, 0)

    def score(self, tokens: Tokens) -> torch.Tensor:
        """Uniform in [0, 1): SplitMix64's mixing of position, head and seed."""
        state = tokens.positions + 1 + (tokens.heads + 1) * (1 << 40) + self.seed * 0x632BE59BD9B4E019
        state = state * (0x9E3779B97F4A7C15 - (1 << 64))
        for shift, factor in ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64))):
            state = (state ^ (state >> shift & ((1 << (64 - shift)) - 1))) * factor
        return ((state >> 40) & 0xFFFFFF).float() / (1 << 24)

    def keep(self, length: int, budget: int, scores: torch.Tensor) -> torch.Tensor:
        """Positions of the highest scores: `(kv_heads, kept)`."""
        return keep_best(length, budget, scores)

    def slot(
        self, position: torch.Tensor, budget: torch.Tensor, held: torch.Tensor, scores: torch.Tensor
    ) -> torch.Tensor:
        """Slot for the token at `position`: a free one, or that of the lowest score."""
        return slot_of_lowest(position, budget, held, scores)
