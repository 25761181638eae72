"""What allocations share: exact shares become whole budgets, and what a cap leaves over goes evenly to the others."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import alike

from squeeze import Budgets, Explicit, InputError, Squeeze, Uniform, conserve
from squeeze.allocations.base import check_budgets

shares = st.lists(st.fractions(0, 60, max_denominator=12), min_size=1, max_size=8)


def slow(shares, cap, takers):
    """A water level, raised until nothing is left: every taker below its cap has risen by the same."""
    left = sum(max(share - cap, 0) for share in shares)
    found = [min(share, cap) for share in shares]
    for _ in range(len(shares)):
        below = [layer for layer in takers if found[layer] < cap]
        if below:
            step = min([left / len(below), *(cap - found[layer] for layer in below)])
            found = [share + step * (layer in below) for layer, share in enumerate(found)]
            left -= step * len(below)
    return found


@settings(max_examples=300, deadline=None)
@given(shares, st.integers(1, 60), st.integers(0, 8), st.data())
def test_shares_become_budgets_with_the_same_total(shares, cap, minimum, data):
    takers = data.draw(st.none() | st.lists(st.integers(0, len(shares) - 1), unique=True))
    facts = alike(len(shares), 50, cap, minimum)
    got = conserve(shares, facts, takers)
    least, layers = min(minimum, cap), len(shares)
    level = slow(shares, cap, range(layers) if takers is None else takers)
    if takers is None:
        assert sum(got.tokens) == min(max(int(sum(shares)), least * layers), cap * layers)
        assert bool(got.notes) == (sum(got.tokens) != int(sum(shares)))
        check_budgets(got, facts, Uniform(1))
    if min(level) >= least and sum(level) == sum(shares):
        assert all(abs(tokens - share) < 1 for tokens, share in zip(got.tokens, level, strict=True))


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 40), st.fractions(Fraction(1, 100), 1), st.integers(1, 900), st.integers(1, 999), st.integers(1, 6)
)
def test_uniform_is_squeeze_with_nothing_to_move(layers, ini_size, length, cap, minimum):
    facts = alike(layers, length, cap, minimum)
    assert Uniform(ini_size).allocate(facts) == Squeeze(ini_size, ini_size).allocate(facts)
    assert Squeeze(ini_size, ini_size).needs == Uniform(ini_size).needs == "nothing"
    assert Squeeze(ini_size, ini_size / 2).needs == "similarities"


def test_explicit_budgets_are_capped_and_nothing_else():
    facts = alike(3, 10, 12, 2)
    assert Explicit(np.array([5, 12, 40])).allocate(facts) == Budgets([5, 12, 12])


@pytest.mark.parametrize(
    "tokens, said",
    [
        ([3, 4], "must give 3 layers their tokens"),
        ([3, 4, 13], "must give layer 2 a whole number of tokens from 2 to 12"),
        ([1, 3, 4], "must give layer 0 a whole number of tokens from 2 to 12"),
        ([3, 4, 4.0], "must give layer 2 a whole number"),
    ],
)
def test_budgets_of_a_class_of_the_users_own_are_checked(tokens, said):
    with pytest.raises(InputError, match=said):
        check_budgets(Budgets(tokens), alike(3, 10, 12, 2), Uniform(1))
