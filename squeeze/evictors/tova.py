"""TOVA: the token goes to which the newest query attends least (arXiv 2401.06104)."""

from __future__ import annotations

from dataclasses import dataclass

from squeeze.evictors.choice import BestScores


@dataclass(frozen=True)
class TOVA(BestScores):
    """Token omission via attention (section 3.2): attention of the newest query, averaged over a layer's heads.

    All KV heads of a layer keep the same tokens. What the layer's own window has left behind goes first.
    """

    name = "tova"
    observed = 1
    updates = "replace"
    heads_agree = True
    minimum_budget = 2
