"""Loss curves → budgets in tokens. No torch, no model.

A layer's curve says what the output loses when that layer's cache is cut to a size. On one prompt tokens go where the
next one saves the most for its bytes: along the lower convex hulls of the curves, the steepest piece first, which is
the best choice for the hulls. That is all or nothing, and noise in a curve moves much; so budgets are averaged over
all measurements, among which uniform budgets count as one.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from operator import mul

import numpy as np

from squeeze.allocations.base import Budgets, PromptFacts
from squeeze.allocations.totals import bounded, round_to, weigh, within


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


def spend(
    curves: Sequence[Sequence[tuple[int, float]]], total: int, caps: Sequence[int], weights: Sequence[int]
) -> list[int]:
    """Give a total to layers along the hulls of their curves.

    Args:
        curves: of each layer, from `hull`; the first corner is the fewest tokens that it gets.
        total: of all layers together, where a token counts its layer's weight: from that of the first corners to that
            of the caps.
        caps: the most tokens that each layer can hold.
        weights: of one token in each layer.
    Returns:
        Tokens of each layer, of `total` together, or less than one more token of any open layer below it. Pieces that
        save more for their weight go first, and the lower layer where they save the same; what no curve asks for goes
        evenly to all, up to their caps.
    Raises:
        ValueError: `total` is out of its range.
    """
    tokens = [corners[0][0] for corners in curves]
    lowest, highest = (sum(map(mul, some, weights)) for some in (tokens, caps))
    if not lowest <= total <= highest:
        raise ValueError(f"total must be in [{lowest}, {highest}], got {total}")
    pieces = [
        (_slope(left, right) / weights[layer], layer, right[0] - left[0])
        for layer, corners in enumerate(curves)
        for left, right in pairwise(corners)
    ]
    left_over = total - lowest
    for _, layer, length in sorted(pieces, key=lambda piece: piece[:2]):
        given = min(length, left_over // weights[layer], caps[layer] - tokens[layer])
        tokens[layer] += given
        left_over -= given * weights[layer]
    while open_layers := [
        layer for layer, count in enumerate(tokens) if count < caps[layer] and weights[layer] <= left_over
    ]:
        each, more = divmod(left_over, sum(weights[layer] for layer in open_layers))
        for layer in open_layers:
            one_more = weights[layer] <= more
            more -= weights[layer] * one_more
            given = min(each + one_more, caps[layer] - tokens[layer])
            tokens[layer] += given
            left_over -= given * weights[layer]
    return tokens


def greedy(multiples: Sequence[Fraction], losses: np.ndarray, ini_size: Fraction, facts: PromptFacts) -> list[int]:
    """Budgets along the hulls of one prompt's curves.

    Args:
        multiples: sizes at which the curves are known, as multiples of `ini_size`, ascending.
        losses: `(layers, multiples)`.
        facts: about the prompt that budgets are made for.
    Returns:
        Tokens of each layer, together what `budgets` says.
    """
    total, _ = within(int(weigh([ini_size * tokens for tokens in facts.reach], facts)), facts)
    curves = []
    for curve, reach, least, cap in zip(losses.tolist(), facts.reach, facts.least, facts.caps, strict=True):
        known: dict[int, float] = {}  # tokens to the loss of the first multiple that comes to so many
        for multiple, loss in zip(multiples, curve, strict=True):
            known.setdefault(min(max(int(multiple * ini_size * reach), least), cap), loss)
        curves.append(hull(list(known), list(known.values())))
    return spend(curves, total, facts.caps, facts.weights)


def budgets(multiples: Sequence[Fraction], losses: np.ndarray, ini_size: Fraction, facts: PromptFacts) -> Budgets:
    """Budgets from several measurements: the mean of each one's `greedy` and of uniform budgets.

    Args:
        multiples, ini_size, facts: see `greedy`.
        losses: `(measurements, layers, multiples)`; only differences within a measurement matter.
    Returns:
        Tokens of each layer, of the total of uniform budgets as `conserve` makes them.
    """
    uniform = [ini_size * tokens for tokens in facts.reach]
    total, notes = within(int(weigh(uniform, facts)), facts)
    each = [greedy(multiples, measurement, ini_size, facts) for measurement in losses]
    means = [sum(tokens, Fraction(0)) / (len(each) + 1) for tokens in zip(*each, bounded(uniform, facts), strict=True)]
    return Budgets(round_to(means, total, facts.weights), notes=notes)
