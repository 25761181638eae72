"""Budgets in tokens, as they are given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

from squeeze.allocations.base import Allocation, Budgets, PromptFacts
from squeeze.errors import InputError
from squeeze.evictors.base import Evictor


@dataclass(frozen=True)
class Explicit(Allocation):
    """The same tokens whatever the prompt, up to what a layer can hold.

    Args:
        tokens: one entry for each attention layer with a cache of its own.
    """

    name = "explicit"
    tokens: Sequence[int]

    def __post_init__(self) -> None:
        tokens = tuple(self.tokens)
        if not all(isinstance(count, Integral) for count in tokens):
            raise InputError(f"budgets must be whole numbers of tokens, got {list(tokens)}")
        object.__setattr__(self, "tokens", tuple(int(count) for count in tokens))

    def allocate(self, facts: PromptFacts) -> Budgets:
        return Budgets([min(count, cap) for count, cap in zip(self.tokens, facts.caps, strict=True)])

    def check(self, algorithm: str, evictor: Evictor, layers: int) -> None:
        if len(self.tokens) != layers:
            raise InputError(f"budgets must have one entry an attention layer: {layers}, got {len(self.tokens)}")
        least = min(self.tokens)
        if least < evictor.minimum_budget:
            raise InputError(
                f"budgets must be at least {evictor.minimum_budget} tokens for {algorithm}, "
                f"got {least} in layer {self.tokens.index(least)}"
            )
