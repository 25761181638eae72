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


def slot_beside_chosen(
    position: torch.Tensor, budget: torch.Tensor, held: torch.Tensor, scores: torch.Tensor
) -> torch.Tensor:
    """Slot for the token at `position` where tokens of the prompt were chosen by scores, and others are recent.

    A free slot; else that of the oldest token below 0. Else the lowest score above 0 leaves, as long as recent tokens,
    whose score is 0, hold less than half of the budget; and then the oldest of them. Infinite scores never leave.
    """
    hidden, recent = (held >= 0) & (scores < 0), (held >= 0) & (scores == 0)
    chosen = scores.masked_fill((held < 0) | hidden | recent, torch.inf)
    out_of_sight = hidden.any(dim=-1, keepdim=True)
    oldest = held.masked_fill(~hidden.where(out_of_sight, recent), torch.iinfo(held.dtype).max).argmin(dim=-1)
    enough = (recent.sum(dim=-1) >= budget // 2) | chosen.amin(dim=-1).isinf()
    leaving = oldest.where(out_of_sight[..., 0] | enough, chosen.argmin(dim=-1))
    return leaving.where(position >= budget, position)
