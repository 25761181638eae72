"""Choosing tokens by their scores: what several methods have in common."""

from __future__ import annotations

import torch

from squeeze.evictors.base import Evictor


class BestScores(Evictor):
    """A method that keeps the tokens with the highest scores, in the prompt and afterwards; what they are, it says."""

    needs_scores = True

    def keep(self, length: int, budget: int, scores: torch.Tensor) -> torch.Tensor:
        """Positions of the highest scores, ascending: `(kv_heads, kept)`."""
        return keep_best(length, budget, scores)

    def slot(
        self, position: torch.Tensor, budget: torch.Tensor, held: torch.Tensor, scores: torch.Tensor
    ) -> torch.Tensor:
        """Slot for the token at `position`: a free one, or that of the lowest score."""
        lowest = scores.masked_fill(held < 0, torch.inf).argmin(dim=-1)
        return lowest.where(position >= budget, position)


def keep_best(length: int, budget: int, scores: torch.Tensor, recent: int = 0) -> torch.Tensor:
    """Positions of a prompt's `recent` last tokens, and of the highest scores before them, ascending.

    Args:
        scores: `(kv_heads, length)`.
    Returns:
        `(kv_heads, min(length, budget))`.
    """
    positions = torch.arange(length, device=scores.device).expand(len(scores), -1)
    if length <= budget:
        return positions
    best = scores[:, : length - recent].topk(budget - recent, dim=-1).indices.sort(dim=-1).values
    return torch.cat([best, positions[:, length - recent :]], dim=1)


def above_zero(scores: torch.Tensor) -> torch.Tensor:
    """Scores of 0 or more, all of them above 0 and in their order: sums with 1 would lose the small ones."""
    return scores.clamp(min=torch.finfo(scores.dtype).tiny)


def slot_of_oldest(
    position: torch.Tensor, budget: torch.Tensor, held: torch.Tensor, scores: torch.Tensor
) -> torch.Tensor:
    """The next free slot, or that of the oldest token with a score of 0, those below 0 before others."""
    classes = scores.sign()
    lowest = classes.masked_fill(held < 0, torch.inf).amin(dim=-1, keepdim=True)
    oldest = held.masked_fill((held < 0) | (classes > lowest), torch.iinfo(held.dtype).max).argmin(dim=-1)
    return oldest.where(position >= budget, position)
