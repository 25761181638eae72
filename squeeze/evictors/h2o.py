"""H2O: keep the tokens that have gathered the most attention, and the most recent ones (arXiv 2306.14048)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from squeeze.evictors.base import Evictor


@dataclass(frozen=True)
class H2O(Evictor):
    """Heavy-hitter oracle (section 4, algorithm 1), per KV head.

    Of a budget, `budget // 2` are the recent window (the new token counts) and the rest heavy hitters. Scores are
    attention probabilities accumulated over all queries so far, summed over the query heads of a KV head. What the
    layer's own window has left behind is no heavy hitter.
    """

    name = "h2o"
    needs_scores = True
    minimum_budget = 2

    def keep(self, length: int, budget: int, scores: torch.Tensor) -> torch.Tensor:
        """Positions that survive a prompt, from its tokens' `scores` `(kv_heads, length)`: `(kv_heads, kept)`."""
        positions = torch.arange(length, device=scores.device).expand(len(scores), -1)
        if length <= budget:
            return positions
        recent = budget // 2
        heavy = scores[:, : length - recent].topk(budget - recent).indices.sort().values
        return torch.cat([heavy, positions[:, length - recent :]], dim=1)

    def slot(
        self, position: torch.Tensor, budget: torch.Tensor, held: torch.Tensor, scores: torch.Tensor
    ) -> torch.Tensor:
        """Slot for the token at `position`: a free one, or that of the lowest score outside the recent window."""
        evictable = (held >= 0) & (held <= (position - budget // 2)[..., None])
        lowest = scores.masked_fill(~evictable, torch.inf).argmin(dim=-1)
        return torch.where(position < budget, position, lowest)
