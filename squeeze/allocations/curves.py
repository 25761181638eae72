"""Loss curves → budgets in tokens. No torch, no model.

A layer's curve says what the output loses when that layer's cache is cut to a size. On one prompt tokens go where the
next one saves the most: along the lower convex hulls of the curves, the steepest piece first, which is the best choice
for the hulls. That is all or nothing, and noise in a curve moves much; so budgets are averaged over all measurements,
among which uniform budgets count as one.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

import numpy as np

from squeeze.allocations.base import Budgets
from squeeze.allocations.totals import round_to, within


def hull(tokens: Sequence[int], losses: Sequence[float]) -> list[tuple[int, float]]:
    """The lower convex hull of a curve, up to its lowest point: more tokens never cost anything.

    Args:
        tokens: sizes, strictly ascending.
        losses: at each size.
    Returns:
        Corners `(tokens, loss)` whose slopes are negative and ascend towards 0; a single one where nothing is saved.
    """
    corners: list[tuple[int, float]] = []
    for x, y in zip(tokens, losses, strict=True):
        while len(corners) >= 2 and _slope(corners[-2], corners[-1]) >= _slope(corners[-1], (x, y)):
            corners.pop()
        corners.append((x, y))
    lowest = min(range(len(corners)), key=lambda i: (corners[i][1], i))
    return corners[: lowest + 1]


def _slope(left: tuple[int, float], right: tuple[int, float]) -> float:
    return (right[1] - left[1]) / (right[0] - left[0])


def spend(curves: Sequence[Sequence[tuple[int, float]]], total: int, cap: int) -> list[int]:
    """Give `total` tokens to layers along the hulls of their curves.

    Args:
        curves: of each layer, from `hull`; the first corner is the fewest tokens that it gets.
        total: tokens of all layers together, from the sum of the first corners to `cap` times the layers.
        cap: the most tokens that a layer can hold.
    Returns:
        Tokens of each layer, `total` together, none above `cap`. Steeper pieces go first, and the lower layer where
        they are equally steep; what no curve asks for goes evenly to all, up to their caps.
    Raises:
        ValueError: `total` is out of its range.
    """
    tokens = [corners[0][0] for corners in curves]
    if not sum(tokens) <= total <= cap * len(tokens):
        raise ValueError(f"total must be in [{sum(tokens)}, {cap * len(tokens)}], got {total}")
    pieces = [
        (_slope(left, right), layer, right[0] - left[0])
        for layer, corners in enumerate(curves)
        for left, right in pairwise(corners)
    ]
    left_over = total - sum(tokens)
    for _, layer, length in sorted(pieces, key=lambda piece: piece[:2]):
        given = min(length, left_over, cap - tokens[layer])
        tokens[layer] += given
        left_over -= given
    while left_over:
        open_layers = [layer for layer, count in enumerate(tokens) if count < cap]
        each, more = divmod(left_over, len(open_layers))
        for order, layer in enumerate(open_layers):
            given = min(each + (order < more), cap - tokens[layer])
            tokens[layer] += given
            left_over -= given
    return tokens


def greedy(
    multiples: Sequence[Fraction], losses: np.ndarray, ini_size: Fraction, length: int, cap: int, minimum: int
) -> list[int]:
    """Budgets along the hulls of one prompt's curves.

    Args:
        multiples: sizes at which the curves are known, as multiples of `ini_size`, ascending.
        losses: `(layers, multiples)`.
        length: prompt tokens of the sequence that budgets are made for.
        cap, minimum: the most and the fewest tokens of a layer.
    Returns:
        Tokens of each layer, together what `budgets` says.
    """
    minimum = min(minimum, cap)
    total, _ = within(int(len(losses) * ini_size * length), len(losses), cap, minimum)
    known: dict[int, int] = {}  # tokens to the first multiple that comes to so many
    for index, multiple in enumerate(multiples):
        known.setdefault(min(max(int(multiple * ini_size * length), minimum), cap), index)
    tokens, columns = list(known), list(known.values())
    return spend([hull(tokens, curve) for curve in losses[:, columns].tolist()], total, cap)


def budgets(
    multiples: Sequence[Fraction], losses: np.ndarray, ini_size: Fraction, length: int, cap: int, minimum: int
) -> Budgets:
    """Budgets from several measurements: the mean of each one's `greedy` and of uniform budgets.

    Args:
        multiples, ini_size, length, cap, minimum: see `greedy`.
        losses: `(measurements, layers, multiples)`; only differences within a measurement matter.
    Returns:
        Tokens of each layer, `floor(layers * ini_size * length)` together, as far as `cap` and `minimum` allow.
    """
    count, layers, _ = losses.shape
    each = [greedy(multiples, measurement, ini_size, length, cap, minimum) for measurement in losses]
    total, notes = within(int(layers * ini_size * length), layers, cap, min(minimum, cap))
    shares = [(sum(tokens) + Fraction(total, layers)) / (count + 1) for tokens in zip(*each, strict=True)]
    return Budgets(round_to(shares, total), notes=notes)
