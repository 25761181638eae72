"""Budgets from loss curves against brute force."""

from fractions import Fraction
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layers import alike

from squeeze.allocations.curves import budgets, greedy, hull, spend

losses = st.integers(0, 40).map(lambda value: value / 8)
curves = st.lists(st.tuples(st.integers(0, 7), losses), min_size=1, max_size=4, unique_by=lambda corner: corner[0])


@given(curves)
def test_a_hull_is_convex_and_the_highest_curve_below(points):
    points = sorted(points)
    corners = hull(*zip(*points, strict=True))
    assert corners[0] == points[0] and set(corners) <= set(points)
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(corners)]
    assert slopes == sorted(slopes) and all(slope < 0 for slope in slopes)
    assert corners[-1][1] == min(loss for _, loss in points)
    assert all(value(corners, tokens) <= loss + 1e-9 for tokens, loss in points)


def value(corners, tokens):
    """A hull at any number of tokens; beyond its last corner nothing more is saved."""
    return float(np.interp(tokens, *zip(*corners, strict=True)))


@given(st.lists(curves, min_size=1, max_size=3), st.integers(0, 24), st.integers(0, 3))
def test_spending_is_as_good_as_brute_force_and_conserves(layers, total, more):
    layers = [hull(*zip(*sorted(points), strict=True)) for points in layers]
    first = [corners[0][0] for corners in layers]
    cap = max(corners[-1][0] for corners in layers) + more
    total = min(max(total, sum(first)), cap * len(layers))
    found = spend(layers, total, [cap] * len(layers), [1] * len(layers))
    assert sum(found) == total
    assert all(low <= tokens <= cap for low, tokens in zip(first, found, strict=True))
    best = min(
        sum(value(corners, tokens) for corners, tokens in zip(layers, choice, strict=True))
        for choice in product(*(range(low, cap + 1) for low in first))
        if sum(choice) == total
    )
    assert sum(value(corners, tokens) for corners, tokens in zip(layers, found, strict=True)) == pytest.approx(best)


def test_what_no_curve_asks_for_goes_evenly_up_to_the_caps():
    flat = [[(2, 1.0)], [(5, 1.0)], [(2, 1.0)]]
    assert spend(flat, 10, [6] * 3, [1] * 3) == [3, 5, 2]
    assert spend(flat, 13, [6] * 3, [1] * 3) == [4, 6, 3]
    assert spend(flat, 18, [6] * 3, [1] * 3) == [6, 6, 6]
    with pytest.raises(ValueError, match=r"total must be in \[9, 18\], got 19"):
        spend(flat, 19, [6] * 3, [1] * 3)


MULTIPLES = [Fraction(1, 4), Fraction(1), Fraction(2), Fraction(4)]


@given(
    st.integers(1, 6).flatmap(
        lambda layers: st.lists(
            st.lists(st.lists(losses, min_size=4, max_size=4), min_size=layers, max_size=layers),
            min_size=1,
            max_size=4,
        )
    ),
    st.fractions(Fraction(1, 100), 1, max_denominator=100),
    st.integers(1, 300),
    st.integers(0, 60),
    st.integers(1, 6),
)
def test_budgets_conserve_to_the_token_within_their_bounds(found, ini_size, length, new, minimum):
    layers, cap = len(found[0]), length + new
    got = budgets(MULTIPLES, np.array(found), ini_size, alike(layers, length, cap, minimum))
    low, wanted = min(minimum, cap), int(layers * ini_size * length)
    assert sum(got.tokens) == min(max(wanted, layers * low), layers * cap)
    assert bool(got.notes) == (sum(got.tokens) != wanted)
    assert all(low <= one <= cap for one in got.tokens)
    each = [greedy(MULTIPLES, np.array(prompt), ini_size, alike(layers, length, cap, minimum)) for prompt in found]
    for layer, tokens in enumerate(got.tokens):
        mean = (sum(one[layer] for one in each) + sum(got.tokens) / layers) / (len(found) + 1)
        assert abs(tokens - mean) < 1, "uniform budgets count as one more"


def test_a_layer_that_loses_more_gets_more():
    steep, flat = [9.0, 3.0, 1.0, 0.0], [0.1, 0.0, 0.0, 0.0]
    found = greedy(MULTIPLES, np.array([flat, steep, flat, flat]), Fraction(1, 5), alike(4, 1000, 1100, 2))
    assert sum(found) == 800
    assert found[1] == max(found) and found[1] >= 400
    assert min(found) >= 50
    mean = budgets(MULTIPLES, np.array([[flat, steep, flat, flat]]), Fraction(1, 5), alike(4, 1000, 1100, 2)).tokens
    assert mean[1] == (found[1] + 200) // 2


def test_no_prompt_outweighs_another():
    """Losses a thousand times as large, of a prompt where everything costs more, change nothing."""
    curves = np.random.default_rng(0).uniform(0, 1, (2, 5, 4))
    first = budgets(MULTIPLES, curves, Fraction(1, 5), alike(5, 1000, 1100, 2))
    assert budgets(MULTIPLES, curves * [[[1000.0]], [[1.0]]], Fraction(1, 5), alike(5, 1000, 1100, 2)) == first
