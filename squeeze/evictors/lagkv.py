"""LagKV: keep the tokens that differ most from the tokens that follow on them (arXiv 2504.04704)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from squeeze.evictors.base import Evictor, Tokens
from squeeze.evictors.choice import keep_best, slot_beside_chosen
from squeeze.numbers import whole_number


@dataclass(frozen=True)
class LagKV(Evictor):
    """Lag-relative information (section 2), per KV head; no attention is looked at.

    The prompt after its first tokens is cut into parts of `lag` tokens. A token's keys and values are scaled to the
    range that each channel has in the next part; how much they vary over channels then ranks it within its own part.
    The last whole part, which has none after it, and what comes after it are recent and stay.

    The paper goes on with parts of what is generated. Here the lowest rank of the prompt leaves for a new token, until
    recent ones fill half of the budget, and then the oldest of these. What the layer's own window has left behind goes
    first.

    Args:
        lag: tokens of a part.
        first: tokens at the start that stay.
    """

    name = "lagkv"
    needs_scores = True
    observed = 0
    updates = "fixed"
    needs_keys = True
    lag: int = 128
    first: int = 4

    def __post_init__(self) -> None:
        whole_number("lag", self.lag, 2, "a whole number of tokens")
        whole_number("first", self.first, 0, "a whole number of tokens")

    @property
    def minimum_budget(self) -> int:
        return self.first + 1

    def score(self, tokens: Tokens) -> torch.Tensor:
        """Infinite for the first tokens, 1 to 2 for those that have a part after theirs, 0 for recent ones."""
        scores = torch.where(tokens.positions < self.first, torch.inf, 0.0)
        end = self._ranked(scores.shape[1])
        if end > self.first:
            parts = [part[:, self.first : end + self.lag].float() for part in (tokens.keys, tokens.values)]
            keys, values = (_variation(part.unflatten(1, (-1, self.lag))) for part in parts)
            ranks = (keys + values).argsort(dim=-1).argsort(dim=-1).flatten(1)
            # Of equal ranks in two parts the later one is ahead, by less than a rank.
            later = tokens.positions[:, self.first : end] / end
            scores[:, self.first : end] = 1 + (ranks + later) / (self.lag + 1)
        return scores

    def _ranked(self, length: int) -> int:
        """Where the tokens of a prompt end that have a whole part after theirs."""
        return self.first + max((length - self.first) // self.lag - 1, 0) * self.lag

    def keep(self, length: int, budget: int, scores: torch.Tensor) -> torch.Tensor:
        """Of a prompt the first tokens, the recent ones, and those that rank highest: `(kv_heads, kept)`."""
        age = torch.arange(length, device=scores.device) / length
        return keep_best(length, budget, torch.where(scores == 0, 2 + age, scores))

    def slot(
        self, position: torch.Tensor, budget: torch.Tensor, held: torch.Tensor, scores: torch.Tensor
    ) -> torch.Tensor:
        """Slot for the token at `position`: a free one, or that of a token of low rank, or of an old one."""
        return slot_beside_chosen(position, budget, held, scores)


def _variation(states: torch.Tensor) -> torch.Tensor:
    """Of parts `(rows, parts, lag, dim)` but the last, each token's share of what varies: `(rows, parts, lag)`."""
    own, following = states[:, :-1], states[:, 1:]
    low, high = following.amin(dim=2, keepdim=True), following.amax(dim=2, keepdim=True)
    return ((own - low) / (high - low)).std(dim=-1).softmax(dim=-1)
