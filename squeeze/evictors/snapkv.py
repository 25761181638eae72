"""SnapKV: keep what a prompt's last queries attend to, and these last tokens (arXiv 2404.14469)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import avg_pool1d

from squeeze.errors import InputError
from squeeze.evictors.base import Evictor, Tokens
from squeeze.evictors.choice import above_zero, keep_best, slot_beside_chosen
from squeeze.numbers import whole_number


@dataclass(frozen=True)
class SnapKV(Evictor):
    """Observation window and pooled votes (section 4), per KV head.

    The paper leaves what is generated alone. Here it never goes beyond the budget: for a new token that of the prompt
    leaves which has the fewest votes, until the window and what is generated fill half of the budget, and then the
    oldest of these. What the layer's own window has left behind goes first.

    Args:
        window: last tokens of the prompt, whose queries vote and which stay themselves.
        kernel: neighbouring tokens, an odd number, whose mean votes a token gets.
    """

    name = "snapkv"
    needs_scores = True
    updates = "fixed"
    window: int = 32
    kernel: int = 5

    def __post_init__(self) -> None:
        whole_number("window", self.window, 1, "a whole number of tokens")
        whole_number("kernel", self.kernel, 1, "a whole number of tokens")
        if self.kernel % 2 == 0:
            raise InputError(
                f"kernel must be odd, so that a token is in the middle of its neighbours, got {self.kernel}"
            )

    @property
    def observed(self) -> int:
        return self.window

    @property
    def minimum_budget(self) -> int:
        return self.window + 1

    def score(self, tokens: Tokens) -> torch.Tensor:
        """Above 0, the window's votes pooled, where a token came before the window; 0 in it and after it."""
        votes = tokens.attention
        before = votes[:, : -self.window]
        if before.numel() == 0:
            return torch.zeros_like(tokens.positions, dtype=torch.float32)
        pooled = avg_pool1d(before[:, None], self.kernel, stride=1, padding=self.kernel // 2)[:, 0]
        return torch.cat([above_zero(pooled), torch.zeros_like(votes[:, -self.window :])], dim=1)

    def keep(self, length: int, budget: int, scores: torch.Tensor) -> torch.Tensor:
        """The prompt's last tokens, and before them those with the most votes: `(kv_heads, kept)`."""
        return keep_best(length, budget, scores, recent=self.window)

    def slot(
        self, position: torch.Tensor, budget: torch.Tensor, held: torch.Tensor, scores: torch.Tensor
    ) -> torch.Tensor:
        """Slot for the token at `position`: a free one, or that of a token with few votes, or of an old one."""
        return slot_beside_chosen(position, budget, held, scores)
