"""SqueezeAttention with its classes on a log scale."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from squeeze.allocations.classes import classify
from squeeze.allocations.squeeze import Squeeze


@dataclass(frozen=True)
class SqueezeLog(Squeeze):
    """`Squeeze` with KMeans on `-log(1 - similarity)`.

    Similarities crowd near 1, and on the plain scale one or two outlying layers can take classes 1 and 2 for
    themselves.
    """

    name = "squeeze-log"

    def classify(self, similarities: np.ndarray) -> list[int]:
        return classify(similarities, log_scale=True)
