"""Which positions a layer holds, as explicit lists: the eviction methods in plain words, without buffers or slots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from squeeze.evictors import Evictor


class Kept:
    """The positions that one attention layer holds for one sequence.

    Args:
        evictor: sliding window, StreamingLLM or H2O.
        budget: tokens, or those of each KV head.
        kv_heads: of the layer's cache.
        window, chunk: of the layer's own attention, or None.
    Attributes:
        held: for each KV head its positions, ascending.
        scores: attention that each position has gathered, `(kv_heads, tokens so far)`; without H2O from the prompt.
        query_heads: that attend to it, once there are `scores`.
    """

    def __init__(
        self, evictor: Evictor, budget: int | Sequence[int], kv_heads: int, window: int | None, chunk: int | None
    ):
        self.method, self.sinks, self.kv_heads = evictor.name, evictor.sinks, kv_heads
        self.budgets = [budget] * kv_heads if isinstance(budget, int) else list(budget)[:kv_heads]
        self.window, self.chunk = window, chunk
        self.held: list[list[int]] = []
        self.scores = torch.empty(kv_heads, 0)
        self.query_heads = kv_heads

    def add(self, scores: torch.Tensor) -> None:
        """Add the attention that each position got in a forward pass, `(kv_heads, tokens so far)`."""
        self.scores = torch.nn.functional.pad(self.scores, (0, scores.shape[1] - self.scores.shape[1])) + scores

    def first_seen(self, position: int) -> int:
        """The first token that the layer's own attention shows to the one at `position`."""
        if self.chunk is not None:
            return position // self.chunk * self.chunk
        return 0 if self.window is None else max(position - self.window + 1, 0)

    def prefill(self, tokens: int) -> None:
        """Keep what a prompt of so many tokens leaves."""
        self.held = [self._survivors(head, list(range(tokens))) for head in range(self.kv_heads)]

    def _survivors(self, head: int, positions: list[int]) -> list[int]:
        budget = self.budgets[head]
        if len(positions) <= budget:
            return positions
        if self.method == "sliding_window":
            return positions[-budget:]
        if self.method == "streaming":
            return positions[: self.sinks] + positions[len(positions) - (budget - self.sinks) :]
        recent = positions[len(positions) - budget // 2 :]
        older = positions[: -len(recent)]
        first = self.first_seen(len(positions))
        heavy = sorted(older, key=lambda position: (position < first, -self.scores[head, position].item()))
        return sorted(heavy[: budget - len(recent)]) + recent

    def admit(self, position: int) -> None:
        """Hold the token at `position`, for which a head that is full evicts one first."""
        for head, held in enumerate(self.held):
            if len(held) == self.budgets[head]:
                held.remove(self._victim(head, position))
            held.append(position)

    def _victim(self, head: int, position: int) -> int:
        held = self.held[head]
        if self.method == "sliding_window":
            return held[0]
        if self.method == "streaming":
            return held[self.sinks]
        # The new token counts as recent, so one less of those that are held does.
        older = held[: len(held) - (self.budgets[head] // 2 - 1)]
        first = self.first_seen(position)
        return min(older, key=lambda other: (other >= first, self.scores[head, other].item()))
