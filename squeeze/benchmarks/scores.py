"""Scores of samples → the score of a data set, with a bootstrap interval, and the difference between two runs."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from statistics import fmean
from typing import Any

CONFIDENCE, RESAMPLES = 0.95, 10_000


def dataset_score(scores: Sequence[float]) -> float:
    """Mean in percent, rounded to two decimals, as LongBench gives it."""
    return round(100 * sum(scores) / len(scores), 2)


def scored(scores: Sequence[float]) -> dict[str, Any]:
    """A data set's part of `result_detail.json`, in percent: its score with an interval, and every sample's.

    Args:
        scores: of each sample, in [0, 1].
    """
    low, high = interval(scores)
    return {
        "score": dataset_score(scores),
        "samples": len(scores),
        "interval": [round(100 * low, 2), round(100 * high, 2)],
        "per_sample": [{"score": round(100 * score, 2)} for score in scores],
    }


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95% bootstrap interval (percentiles) of the mean of `values`; the same for the same values."""
    import numpy as np  # half a second to import both, of which --help knows nothing
    from scipy.stats import bootstrap

    if len(set(values)) == 1:
        return values[0], values[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        limits = bootstrap(
            (np.asarray(values, dtype=float),),
            np.mean,
            n_resamples=RESAMPLES,
            batch=1000,
            confidence_level=CONFIDENCE,
            method="percentile",
            rng=np.random.default_rng(0),
        ).confidence_interval
    return float(limits.low), float(limits.high)


def difference(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float]:
    """Mean of `second - first`, sample by sample, and its 95% bootstrap interval: (mean, low, high).

    Both runs answered the same samples, so the difference is resampled in pairs.
    """
    differences = [b - a for a, b in zip(first, second, strict=True)]
    return (fmean(differences), *interval(differences))
