"""Random tokens: the control that tells how much of a method's quality is its choice."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from squeeze.evictors.base import Tokens
from squeeze.evictors.choice import BestScores
from squeeze.numbers import whole_number


@dataclass(frozen=True)
class Random(BestScores):
    """Each token of each KV head has a random score for life, and the lowest goes.

    The score follows from position, head and seed alone, so that a run can be repeated and a batch changes nothing.

    Args:
        seed: of the scores.
    """

    name = "random"
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
