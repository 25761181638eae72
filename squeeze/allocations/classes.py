"""From layer similarities to classes, and from classes to shares of tokens.

SqueezeAttention (arXiv 2404.04793, section 4.2 and algorithm 1): cluster the layers into three classes by how much
their self-attention changes the residual stream, cut class 3 (which changes it least) and give what that frees to
the other layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

CLASS_3 = 3


def classify(similarities: np.ndarray, log_scale: bool = False) -> list[int]:
    """Sort layers into three classes by KMeans: class 1 has the lowest similarities, class 3 the highest.

    KMeans starts from the best classes that there are, and stays there: no other start finds better ones.

    Args:
        similarities: `(layers,)` mean cosine similarity of each layer.
        log_scale: cluster `-log(max(1 - similarity, 1e-7))` instead (`squeeze-log`): it keeps the order and spreads
            the values that crowd near 1.
    Returns:
        a class per layer. Two distinct values are classes 1 and 3; a single one makes every layer class 3.
    Raises:
        ValueError: a similarity is not finite.
    """
    from sklearn.cluster import KMeans  # takes a second, which `--help` and checking flags should not

    values = np.asarray(similarities, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"similarities must be finite, got {values.tolist()}")
    if log_scale:
        values = -np.log(np.maximum(1 - values, 1e-7))
    centres, labels = values, np.arange(len(values))
    if len(np.unique(values)) >= 3:
        kmeans = KMeans(n_clusters=3, n_init=1, init=best_centres(values)[:, None]).fit(values[:, None])
        centres, labels = kmeans.cluster_centers_[:, 0], kmeans.labels_
    ordered = np.unique(centres[labels]).tolist()  # the centres that have a layer, lowest first
    names = {1: [CLASS_3], 2: [1, CLASS_3], 3: [1, 2, CLASS_3]}[len(ordered)]
    return [names[ordered.index(centres[label])] for label in labels]


def best_centres(values: np.ndarray) -> np.ndarray:
    """Means of the three classes whose values are nearest to them by squares: `(3,)`, ascending.

    Classes of numbers are stretches of them in order, so that all pairs of borders are all there is to try.

    Args:
        values: three different ones or more.
    """
    ordered, counts = np.unique(values, return_counts=True)
    # Squares about the middle of all values lose no digits to a mean far from 0.
    middle = values.mean()
    weights, sums, squares = (
        np.concatenate([[0.0], np.cumsum(counts * (ordered - middle) ** power)]) for power in (0, 1, 2)
    )
    first, second = np.triu_indices(len(ordered) - 1, 1)
    edges = np.stack([np.zeros_like(first), first + 1, second + 1, np.full_like(first, len(ordered))])
    weight, total, square = (np.diff(part[edges], axis=0) for part in (weights, sums, squares))
    means = total / weight
    best = (square - total * means).sum(axis=0).argmin()
    return means[:, best] + middle


def formula(
    classes: Sequence[int], ini_size: Fraction, kv_class3: Fraction, reach: Sequence[int], weights: Sequence[int]
) -> list[Fraction]:
    """The published formula, exactly: class 3 gets `kv_class3` of its reach, the other layers share what that frees.

    With all layers in one class there is nothing to move, and every layer gets `ini_size` of its reach (uniform).

    Args:
        classes: of each layer.
        reach: tokens of the prompt that each layer reaches; published for layers that all reach the whole prompt.
        weights: of one token in each layer; published for layers that are all alike.
    Returns:
        Tokens of each layer, of the same total weight as uniform ones.
    """
    third = sum(r * w for c, r, w in zip(classes, reach, weights, strict=True) if c == CLASS_3)
    whole = sum(r * w for r, w in zip(reach, weights, strict=True))
    if third in (0, whole):
        return [ini_size * tokens for tokens in reach]
    other = (whole * ini_size - third * kv_class3) / (whole - third)
    return [(kv_class3 if c == CLASS_3 else other) * tokens for c, tokens in zip(classes, reach, strict=True)]
