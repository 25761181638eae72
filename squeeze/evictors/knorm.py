"""Keep the tokens whose keys are shortest (arXiv 2406.11430)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from squeeze.evictors.base import Tokens
from squeeze.evictors.choice import BestScores


@dataclass(frozen=True)
class KNorm(BestScores):
    """A key with a small norm tends to get much attention (section 3), per KV head; no attention is looked at."""

    name = "knorm"
    observed = 0
    updates = "fixed"
    needs_keys = True

    def score(self, tokens: Tokens) -> torch.Tensor:
        """The higher, the shorter a key is: `1 / (1 + norm)`."""
        return 1 / (1 + torch.linalg.vector_norm(tokens.keys.float(), dim=-1))
