"""Sliding window: keep the most recent tokens, at their original positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from squeeze.evictors.base import Evictor
from squeeze.evictors.ring import ring_keep, ring_slot


@dataclass(frozen=True)
class SlidingWindow(Evictor):
    """Local attention as in Longformer (arXiv 2004.05150, section 3.1), the baseline of the SqueezeAttention paper."""

    name = "sliding_window"
    fixed_slots = True

    def keep(self, length: int, budget: int, scores: torch.Tensor) -> torch.Tensor:
        """The last `budget` positions of a prompt of `length` tokens, in slot order: `(1, kept)`."""
        return ring_keep(length, budget, sinks=0)

    def slot(
        self, position: torch.Tensor, budget: torch.Tensor, held: torch.Tensor, scores: torch.Tensor
    ) -> torch.Tensor:
        """Slot for the token at `position`, of a ring as long as `budget`; all of one shape."""
        return ring_slot(position, budget, sinks=0)
