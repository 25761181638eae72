"""TOVA: the token goes to which the newest query attends least (arXiv 2401.06104)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from squeeze.evictors.base import Evictor
from squeeze.evictors.choice import keep_best, slot_of_lowest


@dataclass(frozen=True)
class TOVA(Evictor):
    """Token omission via attention (section 3.2): attention of the newest query, averaged over a layer's heads.

    All KV heads of a layer keep the same tokens. What the layer's own window has left behind goes first.
    """

    name = "tova"
    needs_scores = True
    observed = 1
    updates = "replace"
    heads_agree = True
    minimum_budget = 2

    def keep(self, length: int, budget: int, scores: torch.Tensor) -> torch.Tensor:
        """Positions that the prompt's last query attends to most: `(kv_heads, kept)`."""
        return keep_best(length, budget, scores)

    def slot(
        self, position: torch.Tensor, budget: torch.Tensor, held: torch.Tensor, scores: torch.Tensor
    ) -> torch.Tensor:
        """Slot for the token at `position`: a free one, or that of the token that the last query attended to least."""
        return slot_of_lowest(position, budget, held, scores)
