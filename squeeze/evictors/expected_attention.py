"""Expected Attention: keep what queries to come are expected to attend to (arXiv 2510.00636)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from squeeze.evictors.base import Evictor, Future, Tokens
from squeeze.evictors.choice import above_zero, keep_best, slot_beside_chosen
from squeeze.numbers import whole_number


@dataclass(frozen=True)
class ExpectedAttention(Evictor):
    """Expected attention times the length of the value (section 3), per KV head; attention itself is not looked at.

    What is generated has no such score. Here the lowest score of the prompt leaves for a new token, until what is
    generated fills half of the budget, and then the oldest of that. What the layer's own window has left behind goes
    first.

    Args:
        future: tokens after the prompt whose attention is expected.
        first: tokens at the start that stay, and whose queries are not taken for usual ones.
    """

    name = "expected_attention"
    needs_scores = True
    updates = "fixed"
    needs_keys = True
    future: int = 512
    first: int = 4

    def __post_init__(self) -> None:
        for name, least in (("future", 1), ("first", 0)):
            whole_number(name, getattr(self, name), least, "a whole number of tokens")

    @property
    def observed(self) -> Future:
        return Future(self.future, self.first)

    @property
    def minimum_budget(self) -> int:
        return self.first + 1

    def score(self, tokens: Tokens) -> torch.Tensor:
        """Above 0 for tokens of the prompt, more for its first ones than for all others; 0 for what is generated."""
        if tokens.attention.numel() == 0:
            return torch.zeros_like(tokens.positions, dtype=torch.float32)
        scores = above_zero(tokens.attention * tokens.values.float().norm(dim=-1))
        return scores.where(tokens.positions >= self.first, torch.inf)

    def keep(self, length: int, budget: int, scores: torch.Tensor) -> torch.Tensor:
        """Positions of the highest scores, ascending: `(kv_heads, kept)`."""
        return keep_best(length, budget, scores)

    def slot(
        self, position: torch.Tensor, budget: torch.Tensor, held: torch.Tensor, scores: torch.Tensor
    ) -> torch.Tensor:
        """Slot for the token at `position`: a free one, or that of a token of the prompt or of what is generated."""
        return slot_beside_chosen(position, budget, held, scores)
