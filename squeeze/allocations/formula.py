"""From layer similarities to classes, and from classes to budgets in tokens. NumPy only: no torch, no model.

SqueezeAttention (arXiv 2404.04793, section 4.2 and algorithm 1): cluster the layers into three classes by how much
their self-attention changes the residual stream, cut class 3 (which changes it least) and give what that frees to
the other layers. `paper` is the formula as published; `squeeze` and `squeeze-log` spend the same total to the token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from sklearn.cluster import KMeans

CLASS_3 = 3


@dataclass(frozen=True)
class Budgets:
    """Tokens per layer, and what the user should know about how they came out.

    Attributes:
        tokens: one budget a layer.
        classes: class of each layer (1, 2 or 3), or None where no similarity was measured.
        notes: sentences, empty when the total is what was asked for.
    """

    tokens: list[int]
    classes: list[int] | None = None
    notes: tuple[str, ...] = ()


def classify(similarities: np.ndarray, log_scale: bool = False) -> list[int]:
    """Sort layers into three classes by KMeans: class 1 has the lowest similarities, class 3 the highest.

    Args:
        similarities: `(layers,)` mean cosine similarity of each layer.
        log_scale: cluster `-log(max(1 - similarity, 1e-7))` instead (`squeeze-log`): it keeps the order and spreads
            the values that crowd near 1.
    Returns:
        a class per layer. Two distinct values are classes 1 and 3; a single one makes every layer class 3.
    Raises:
        ValueError: a similarity is not finite.
    """
    values = np.asarray(similarities, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"similarities must be finite, got {values.tolist()}")
    if log_scale:
        values = -np.log(np.maximum(1 - values, 1e-7))
    centres, labels = values, np.arange(len(values))
    if len(np.unique(values)) >= 3:
        kmeans = KMeans(n_clusters=3, n_init=10, random_state=0).fit(values[:, None])
        centres, labels = kmeans.cluster_centers_[:, 0], kmeans.labels_
    ordered = np.unique(centres[labels]).tolist()  # the centres that have a layer, lowest first
    names = {1: [CLASS_3], 2: [1, CLASS_3], 3: [1, 2, CLASS_3]}[len(ordered)]
    return [names[ordered.index(centres[label])] for label in labels]


def formula(classes: Sequence[int], ini_size: Fraction, kv_class3: Fraction, length: int) -> list[Fraction]:
    """The published formula, exactly: class 3 gets `kv_class3 * length`, the other layers share what that frees.

    With all layers in one class there is nothing to move, and every layer gets `ini_size * length` (uniform).
    """
    count, count3 = len(classes), sum(c == CLASS_3 for c in classes)
    if count3 in (0, count):
        return [ini_size * length] * count
    other = (count * ini_size - count3 * kv_class3) / (count - count3)
    return [(kv_class3 if c == CLASS_3 else other) * length for c in classes]


def allocate(
    similarities: np.ndarray,
    *,
    allocation: str,
    ini_size: Fraction,
    kv_class3: Fraction,
    length: int,
    cap: int,
    minimum: int,
) -> Budgets:
    """Budgets of all layers for one prompt.

    Args:
        similarities: `(layers,)`.
        allocation: `squeeze`, `squeeze-log` or `paper`.
        ini_size, kv_class3: fractions of `length`.
        length: prompt tokens of this sequence, padding excluded.
        cap: the most tokens a layer can hold: prompt plus new tokens, or the model's attention window.
        minimum: the fewest tokens the eviction method works with.
    Returns:
        for `squeeze` and `squeeze-log`, budgets whose sum is `floor(layers * ini_size * length)` unless the caps or
        the minimums of all layers leave no such choice (a note says so); for `paper`, each layer's budget truncated
        and capped by itself, and the minimums taken out of the layers above theirs.
    """
    classes = classify(similarities, log_scale=allocation == "squeeze-log")
    shares = formula(classes, ini_size, kv_class3, length)
    minimum = min(minimum, cap)
    wanted = int(len(classes) * ini_size * length)
    if allocation == "paper":
        shares = [Fraction(min(int(share), cap)) for share in shares]
        wanted = int(sum(shares))
    total, notes = within(wanted, len(classes), cap, minimum)
    if allocation != "paper":
        shares = _give_back(shares, classes, cap)
    shares = _raise_to(shares, minimum)
    return Budgets(round_to(shares, total), classes, notes)


def within(total: int, layers: int, cap: int, minimum: int) -> tuple[int, tuple[str, ...]]:
    """Tokens that all layers together can have, and a sentence where that is not `total`."""
    if total < layers * minimum:
        return layers * minimum, (
            f"{total} tokens do not give {layers} layers their minimum of {minimum}: the total grows",
        )
    if total > layers * cap:
        unused = total - layers * cap
        return layers * cap, (f"the layers can hold {cap} tokens each, so {unused} of {total} stay unused",)
    return total, ()


def _give_back(shares: list[Fraction], classes: Sequence[int], cap: int) -> list[Fraction]:
    """Cap every share; what is left over goes evenly to class 3, up to the same cap."""
    left = sum((max(share - cap, Fraction(0)) for share in shares), Fraction(0))
    shares = [min(share, Fraction(cap)) for share in shares]
    layers = [i for i, c in enumerate(classes) if c == CLASS_3]
    if layers and left:
        # Class 3 layers have equal shares, so an even part each fills them all alike.
        each = min(left / len(layers), cap - shares[layers[0]])
        for i in layers:
            shares[i] += each
    return shares


def _raise_to(shares: list[Fraction], minimum: int) -> list[Fraction]:
    """Raise low shares to `minimum`; the layers above pay, each in proportion to what it has above the minimum."""
    missing = sum((max(minimum - share, Fraction(0)) for share in shares), Fraction(0))
    above = sum((max(share - minimum, Fraction(0)) for share in shares), Fraction(0))
    if not missing:
        return shares
    kept = max(1 - missing / above, Fraction(0)) if above else Fraction(0)
    return [minimum + max(share - minimum, Fraction(0)) * kept for share in shares]


def round_to(shares: Sequence[Fraction], total: int) -> list[int]:
    """Largest-remainder rounding to whole tokens that sum to `total`; equal remainders favour the lower layer."""
    tokens = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: (tokens[i] - shares[i], i))
    for i in by_remainder[: total - sum(tokens)]:
        tokens[i] += 1
    return tokens
