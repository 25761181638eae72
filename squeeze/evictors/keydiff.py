"""KeyDiff: keep the tokens whose keys differ most from the others (arXiv 2504.15364)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import cosine_similarity, normalize

from squeeze.evictors.base import Tokens
from squeeze.evictors.choice import BestScores


@dataclass(frozen=True)
class KeyDiff(BestScores):
    """Cosine similarity of a key to the mean direction of all that are held (section 3), per KV head.

    The mean is taken anew at every step. No attention is looked at.
    """

    name = "keydiff"
    observed = 0
    updates = "anew"
    needs_keys = True

    def score(self, tokens: Tokens) -> torch.Tensor:
        """How far a key is from the mean direction: 1 less the cosine similarity, from 0 to 2."""
        keys, there = tokens.keys.float(), (tokens.positions >= 0)[..., None]
        mean = normalize(keys, dim=-1).mul(there).sum(dim=1, keepdim=True)
        return (1 - cosine_similarity(keys, mean, dim=-1)).clamp(min=0)
