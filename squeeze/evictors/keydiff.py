"""KeyDiff: keep the tokens whose keys differ most from the others (arXiv 2504.15364)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import cosine_similarity, normalize

from squeeze.evictors.base import Evictor, Tokens
from squeeze.evictors.choice import keep_best, slot_of_lowest


@dataclass(frozen=True)
class KeyDiff(Evictor):
    """Cosine similarity of a key to the mean direction of all that are held (section 3), per KV head.

    The mean is taken anew at every step. No attention is looked at.
    """

    name = "keydiff"
    needs_scores = True
    observed = 0
    updates = "anew"
    needs_keys = True

    def score(self, tokens: Tokens) -> torch.Tensor:
        """How far a key is from the mean direction: 1 less the cosine similarity, from 0 to 2."""
        keys, there = tokens.keys.float(), (tokens.positions >= 0)[..., None]
        mean = normalize(keys, dim=-1).mul(there).sum(dim=1, keepdim=True)
        return (1 - cosine_similarity(keys, mean, dim=-1)).clamp(min=0)

    def keep(self, length: int, budget: int, scores: torch.Tensor) -> torch.Tensor:
        """Positions of the keys that differ most: `(kv_heads, kept)`."""
        return keep_best(length, budget, scores)

    def slot(
        self, position: torch.Tensor, budget: torch.Tensor, held: torch.Tensor, scores: torch.Tensor
    ) -> torch.Tensor:
        """Slot for the token at `position`: a free one, or that of the key most like the others."""
        return slot_of_lowest(position, budget, held, scores)
