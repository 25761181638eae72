"""Budgets in a straight line: the published sequence of PyramidKV, and lines of one's own."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import alike

from squeeze import InputError, Linear, Pyramid


def allocate(allocation, layers=5, length=1000, cap=1064, minimum=1):
    return allocation.allocate(alike(layers, length, cap, minimum)).tokens


def test_a_pyramid_is_the_published_one():
    """Of 32 layers of 96 tokens beside a window of 32: 191.2 (96 * 2 - 96 / 20 + 4) to 4.8 beside it."""
    found = allocate(Pyramid("0.128"), 32, 1000, 1064, 32)
    step = Fraction(2 * 96 - 2 * Fraction(96, 20), 31)
    assert sum(found) == 32 * 128
    for layer, tokens in enumerate(found):
        assert abs(tokens - (32 + 2 * 96 - Fraction(96, 20) - layer * step)) < 1
    assert (found[0], found[-1]) == (219, 37)


def test_a_line_has_the_mean_and_the_end_that_was_asked_for():
    assert allocate(Linear("0.2"), minimum=0) == [300, 250, 200, 150, 100]
    assert allocate(Linear("0.2", last=0), minimum=0) == [400, 300, 200, 100, 0]
    assert allocate(Linear("0.2", last=1)) == [200] * 5


def test_a_line_is_flatter_where_its_start_would_not_fit():
    """At 0.8 the first layer would have 1,560 of 1,000 tokens."""
    assert allocate(Pyramid("0.8"), minimum=0) == [1000, 900, 800, 700, 600]


def test_below_the_minimum_all_layers_have_it():
    assert allocate(Pyramid("0.02"), minimum=33) == [33] * 5


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 4000),
    st.integers(1, 600),
    st.integers(1, 1000),
    st.floats(0, 1, width=32),
    st.integers(1, 40),
)
def test_a_line_falls_and_keeps_the_total(layers, length, new, size, last, minimum):
    ini = Fraction(size, 1000)
    found = allocate(Linear(ini, last=last), layers, length, length + new, minimum)
    assert found == sorted(found, reverse=True)
    floor = min(minimum, length + new)
    assert sum(found) == min(max(int(ini * layers * length), layers * floor), layers * (length + new))
    if ini * length > minimum:
        mean = ini * length - minimum
        assert found[-1] - minimum >= Fraction(str(last)) * mean - 1, "no less than asked for"
        assert found[0] <= length


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Linear("0.2", last=1.5), "last must be from 0 to 1, got 1.5"),
        (lambda: Linear("0.2", last="0.5"), "last must be from 0 to 1, got 0.5"),
        (lambda: Pyramid("0.2", beta=0.5), "beta must be 1 or more, got 0.5"),
    ],
)
def test_numbers_out_of_their_ranges(make, said):
    with pytest.raises(InputError, match=said):
        make()
