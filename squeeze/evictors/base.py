"""The interface of an eviction method: which tokens survive prefill, and which slot a new token takes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from squeeze.registry import Strategy

if TYPE_CHECKING:
    import torch


class Evictor(Strategy, ABC):
    """An eviction method: a frozen dataclass whose fields are its parameters.

    `keep` runs after prefill, once per layer and sequence, and for each budget that some KV heads have there; `slot`
    runs at every decode step for the whole batch. Both are pure functions of tensors: what a method needs to remember
    (positions and scores of the tokens it holds) belongs to the cache layer. The tokens of a KV head are always in its
    first slots.

    Attributes:
        needs_scores: whether attention probabilities are accumulated for the method. They are float32, added up over
            all queries so far and over the query heads of a KV head; -1 where a token has left the layer's own window
            or chunk: less than any other, so that it is the first to go.
        sinks: tokens at the start of a sequence that stay in the first slots. Their keys are turned as if they moved
            closer to the recent ones while tokens between are evicted, as StreamingLLM does.
        fixed_slots: whether a token's slot does not depend on the tokens after it, so that a prompt can be prefilled
            and evicted in chunks.
        minimum_budget: the fewest tokens of a layer that the method works with.
    """

    needs_scores: bool = False
    sinks: int = 0
    fixed_slots: bool = False

    @property
    def minimum_budget(self) -> int:
        return self.sinks + 1

    @abstractmethod
    def keep(self, length: int, budget: int, scores: torch.Tensor) -> torch.Tensor:
        """Positions that survive a prompt of `length` tokens, in the order of their slots.

        Args:
            scores: of the prompt's tokens, `(kv_heads, length)`; no elements where the method needs none.
        Returns:
            `(kv_heads, kept)`, or `(1, kept)` where all heads keep the same; `kept` is `min(length, budget)`.
        """

    @abstractmethod
    def slot(
        self, position: torch.Tensor, budget: torch.Tensor, held: torch.Tensor, scores: torch.Tensor
    ) -> torch.Tensor:
        """Slot for the token at `position`: the next free one, or that of the token which is evicted.

        A row is one KV head of one sequence.

        Args:
            position: tokens before this one in its sequence, `(rows, 1)`; where the method needs no scores, of all
                layers at once, `(layers, rows, 1)`.
            budget: slots, of the same shape.
            held: position of the token in each slot, -1 where a slot is empty, `(rows, 1, slots)`; no elements where
                the method needs no scores.
            scores: of the tokens held, same shape.
        Returns:
            The shape of `budget`.
        """
