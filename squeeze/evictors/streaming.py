"""StreamingLLM: keep the first tokens, on which attention rests, and the most recent ones (arXiv 2309.17453)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from squeeze.evictors.base import Evictor
from squeeze.evictors.ring import ring_keep, ring_slot
from squeeze.numbers import whole_number


@dataclass(frozen=True)
class StreamingLLM(Evictor):
    """Attention sinks and a rolling cache (section 3.2).

    The method measures distance inside the cache. Recent tokens have the right distance as they are; that of the
    sinks is corrected at every step (`squeeze.engine.schedule`).

    Args:
        sinks: tokens at the start of the sequence that are never evicted (`start_size`).
    """

    name = "streaming"
    fixed_slots = True
    sinks: int = 4

    def __post_init__(self) -> None:
        whole_number("sinks", self.sinks, 0, "a whole number of tokens")

    def keep(self, length: int, budget: int, scores: torch.Tensor) -> torch.Tensor:
        """The sinks and the last `budget - sinks` positions of a prompt, in slot order: `(1, kept)`."""
        return ring_keep(length, budget, self.sinks)

    def slot(
        self, position: torch.Tensor, budget: torch.Tensor, held: torch.Tensor, scores: torch.Tensor
    ) -> torch.Tensor:
        """Slot for the token at `position`, of a ring as long as `budget`; all of one shape."""
        return ring_slot(position, budget, self.sinks)
