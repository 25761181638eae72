"""Budgets in tokens, as they are given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

from squeeze.allocations.base import Allocation, Budgets, PromptFacts
from squeeze.errors import InputError
from squeeze.evictors.base import Evictor
from squeeze.numbers import shown


@dataclass(frozen=True)
class Explicit(Allocation):
    """The same tokens whatever the prompt, up to what a layer can hold.

    Args:
        tokens: one entry for each attention layer with a cache of its own: tokens, or those of each of its KV heads.
    """

    name = "explicit"
    tokens: Sequence[int | Sequence[int]]

    def __post_init__(self) -> None:
        tokens = tuple(self.tokens)
        if not all(isinstance(count, Integral) for own in tokens for count in _heads(own)):
            raise InputError(f"budgets must be whole numbers of tokens, got {shown(list(tokens))}")
        if len({isinstance(own, Sequence) for own in tokens}) > 1:
            raise InputError("budgets must be one number a layer, or in every layer one a KV head, and not both")
        object.__setattr__(
            self, "tokens", tuple(tuple(map(int, own)) if isinstance(own, Sequence) else int(own) for own in tokens)
        )

    @property
    def per_head(self) -> bool:
        """Whether KV heads have budgets of their own."""
        return any(isinstance(own, tuple) for own in self.tokens)

    def allocate(self, facts: PromptFacts) -> Budgets:
        capped = [[min(count, cap) for count in _heads(own)] for own, cap in zip(self.tokens, facts.caps, strict=True)]
        return Budgets(capped if self.per_head else [tokens for [tokens] in capped])

    def check(self, algorithm: str, evictor: Evictor, layers: int) -> None:
        if len(self.tokens) != layers:
            raise InputError(f"budgets must have one entry an attention layer: {layers}, got {len(self.tokens)}")
        for layer, own in enumerate(self.tokens):
            least = min(_heads(own), default=0)
            if least < evictor.minimum_budget:
                raise InputError(
                    f"budgets must be at least {evictor.minimum_budget} tokens for {algorithm}, "
                    f"got {least} in layer {layer}"
                )

    def check_heads(self, kv_heads: Sequence[int]) -> None:
        """Raises InputError unless budgets by head are as many in each layer as it has KV heads."""
        for layer, (own, heads) in enumerate(zip(self.tokens, kv_heads, strict=True)):
            if isinstance(own, tuple) and len(own) != heads:
                raise InputError(
                    f"budgets by head must be {heads} in layer {layer}, one a KV head, and are {len(own)}"
                )


def _heads(own: int | Sequence[int]) -> Sequence[int]:
    """A layer's budgets: of each KV head, or the one of all."""
    return own if isinstance(own, Sequence) else [own]
