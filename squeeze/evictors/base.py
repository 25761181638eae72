"""The interface of an eviction method: which tokens survive prefill, and which slot a new token takes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from squeeze.registry import Strategy

if TYPE_CHECKING:
    import torch


class Future(NamedTuple):
    """Attention that is expected of queries to come, and not observed.

    Args:
        tokens: after the prompt; their queries are taken to be distributed as the prompt's, at their own positions.
        skipped: tokens at the start of the prompt that are left out, as queries and as what is attended to.
    """

    tokens: int
    skipped: int


@dataclass(frozen=True)
class Tokens:
    """Tokens of some rows, as an eviction method sees them when it scores them. A row is one KV head of one sequence.

    Args:
        positions: in their sequence, -1 where there is none, int64, `(rows, tokens)`.
        heads: number of each row's KV head among all of the model's, `(rows, 1)`.
        keys: after RoPE, at their original positions, `(rows, tokens, head_dim)`.
        values: `(rows, tokens, value_dim)`.
        attention: probabilities that the queries of `Evictor.observed` gave them, summed over these queries and over
            the query heads of the KV head, float32, `(rows, tokens)`; of a future, those that one of its queries is
            expected to give. No elements where none are observed, and while tokens are generated.
    """

    positions: torch.Tensor
    heads: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    attention: torch.Tensor


class Evictor(Strategy, ABC):
    """An eviction method: a frozen dataclass whose fields are its parameters.

    `score` and `keep` run after prefill, once per layer and sequence, `keep` there for each budget that some KV heads
    have; `slot` runs at every decode step for the whole batch. All are pure functions of tensors: what a method needs
    to remember (positions and scores of the tokens it holds) belongs to the cache layer. The tokens of a KV head are
    always in its first slots.

    Attributes:
        needs_scores: whether the tokens that are held have scores, which `slot` is given. Where a token has left the
            layer's own window or chunk its score is -1, and should be less than any other: it is the first to go.
        observed: of a prompt's last queries, how many have their attention probabilities summed up for `score`; None:
            all of them, which the fused kernel alone does not give. Or the future whose queries `score` is given the
            expected attention of. By default all for a method that needs scores.
        updates: what becomes of the scores of tokens that are held while others are generated. `add`: a new token has
            0, and each step's attention probabilities are added. `replace`: they are the last step's. `fixed`: they
            stay what `score` says of the token alone when it comes. `anew`: what `score` says of all that are held,
            at every step.
        heads_agree: whether attention probabilities are averaged over a layer's KV heads, so that all of them keep
            the same tokens.
        needs_keys: whether `score` looks at keys or values.
        sinks: tokens at the start of a sequence that stay in the first slots. Their keys are turned as if they moved
            closer to the recent ones while tokens between are evicted, as StreamingLLM does.
        fixed_slots: whether a token's slot does not depend on the tokens after it, so that a prompt can be prefilled
            and evicted in chunks.
        minimum_budget: the fewest tokens of a layer that the method works with.
    """

    needs_scores: bool = False
    updates: Literal["add", "replace", "fixed", "anew"] = "add"
    heads_agree: bool = False
    needs_keys: bool = False
    sinks: int = 0
    fixed_slots: bool = False

    @property
    def observed(self) -> int | Future | None:
        return None if self.needs_scores else 0

    @property
    def minimum_budget(self) -> int:
        return self.sinks + 1

    @property
    def scores_prompts(self) -> bool:
        """Whether the tokens of a prompt have scores, which `keep` is given."""
        return self.needs_scores or self.observed != 0

    @property
    def watches(self) -> bool:
        """Whether decode steps must give attention probabilities."""
        return self.needs_scores and self.updates in ("add", "replace")

    def score(self, tokens: Tokens) -> torch.Tensor:
        """Scores of tokens, 0 or more, `(rows, tokens)`: the higher, the longer a token stays."""
        return tokens.attention

    @abstractmethod
    def keep(self, length: int, budget: int, scores: torch.Tensor) -> torch.Tensor:
        """Positions that survive a prompt of `length` tokens, in the order of their slots.

        Args:
            scores: of the prompt's tokens, `(kv_heads, length)`; no elements where the method has none.
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
