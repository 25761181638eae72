"""Keep the tokens whose keys are shortest (arXiv 2406.11430)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from squeeze.evictors.base import Evictor, Tokens
from squeeze.evictors.choice import keep_best, slot_of_lowest


@dataclass(frozen=True)
class KNorm(Evictor):
    """A key with a small norm tends to get much attention (section 3), per KV head; no attention is looked at."""

    name = "knorm"
    needs_scores = True
    observed = 0
    updates = "fixed"
    needs_keys = True

    def score(self, tokens: Tokens) -> torch.Tensor:
        """The higher, the shorter a key is: `1 / (1 + norm)`."""
        return 1 / (1 + torch.linalg.vector_norm(tokens.keys.float(), dim=-1))

    def keep(self, length: int, budget: int, scores: torch.Tensor) -> torch.Tensor:
        """Positions of the shortest keys: `(kv_heads, kept)`."""
        return keep_best(length, budget, scores)

    def slot(
        self, position: torch.Tensor, budget: torch.Tensor, held: torch.Tensor, scores: torch.Tensor
    ) -> torch.Tensor:
        """Slot for the token at `position`: a free one, or that of the longest key."""
        return slot_of_lowest(position, budget, held, scores)
