"""Allocation: conserving to the token, faithful to the formula, for any similarities, sizes, lengths and caps."""

from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import alike
from sklearn.cluster import KMeans

from squeeze import Paper, Squeeze, SqueezeLog
from squeeze.allocations.classes import best_centres, classify, formula

ALLOCATIONS = {"squeeze": Squeeze, "squeeze-log": SqueezeLog, "paper": Paper}

similarities = st.lists(st.floats(-1, 1, allow_nan=False), min_size=1, max_size=40)
fractions = st.integers(1, 1000).map(lambda n: Fraction(n, 1000))

#: SmolLM2-135M on a samsum prompt of 2,000 tokens, rounded: two outliers, the rest crowded near 1.
# fmt: off
SMOLLM2 = np.array([
    0.2, 0.62, 0.931, 0.951, 0.944, 0.962, 0.958, 0.949, 0.957, 0.964, 0.953, 0.970, 0.972, 0.975, 0.968, 0.961,
    0.974, 0.978, 0.971, 0.980, 0.983, 0.985, 0.982, 0.972, 0.861, 0.979, 0.984, 0.986, 0.981, 0.970,
])
# fmt: on


def run(values, allocation="squeeze", ini="0.2", class3="0.1", length=1000, cap=1064, minimum=2):
    facts = alike(len(values), length, cap, minimum, None if values[0] is None else np.array(values))
    return ALLOCATIONS[allocation](ini, class3).allocate(facts)


@settings(max_examples=400, deadline=None)
@given(
    values=similarities,
    allocation=st.sampled_from(["squeeze", "squeeze-log"]),
    ini=fractions,
    ratio=fractions,
    length=st.integers(1, 5000),
    new=st.integers(1, 600),
    window=st.none() | st.integers(5, 3000),
    minimum=st.integers(1, 5),
)
def test_the_total_is_conserved_to_the_token(values, allocation, ini, ratio, length, new, window, minimum):
    cap = length + new if window is None else min(length + new, window)
    got = run(values, allocation, ini, ini * ratio, length, cap, minimum)
    floor = min(minimum, cap)
    wanted = int(len(values) * ini * length)
    assert sum(got.tokens) == min(max(wanted, len(values) * floor), len(values) * cap)
    assert all(floor <= tokens <= cap for tokens in got.tokens)
    assert bool(got.notes) == (sum(got.tokens) != wanted)


@settings(max_examples=200, deadline=None)
@given(values=similarities, ini=fractions, ratio=fractions, length=st.integers(1, 5000))
def test_away_from_caps_and_minimums_every_layer_is_within_a_token_of_the_formula(values, ini, ratio, length):
    got = run(values, "squeeze", ini, ini * ratio, length, cap=10**9, minimum=0)
    exact = formula(got.classes, ini, ini * ratio, [length] * len(values), [1] * len(values))
    assert all(abs(tokens - share) < 1 for tokens, share in zip(got.tokens, exact, strict=True))


@settings(max_examples=200, deadline=None)
@given(values=similarities, ini=fractions, length=st.integers(1, 5000))
def test_equal_fractions_are_uniform(values, ini, length):
    got = run(values, "squeeze", ini, ini, length, cap=length + 10, minimum=0)
    assert max(got.tokens) - min(got.tokens) <= 1
    assert got.tokens == sorted(got.tokens, reverse=True), "ties go to the lower layer"


@settings(max_examples=200, deadline=None)
@given(
    values=similarities,
    allocation=st.sampled_from(["squeeze", "squeeze-log", "paper"]),
    ini=fractions,
    length=st.integers(1, 5000),
    cap=st.integers(1, 5600),
    minimum=st.integers(1, 5),
)
def test_equal_fractions_need_no_similarities(values, allocation, ini, length, cap, minimum):
    """A bounded prefill asks for budgets before any similarity is known."""
    measured, unknown = (run(v, allocation, ini, ini, length, cap, minimum) for v in (values, [None] * len(values)))
    assert (measured.tokens, measured.notes) == (unknown.tokens, unknown.notes)


def test_decimal_text_is_exact():
    assert sum(run(np.linspace(0.1, 0.9, 30), ini="0.03", class3="0.03", length=100, cap=200).tokens) == 90
    assert int(30 * 0.03 * 100) == 89, "what binary floating point would have given"


def test_worked_example():
    """10 layers of which 6 are class 3, T = 1000: 0.1 each for class 3, (10 * 0.2 - 6 * 0.1) / 4 = 0.35 else."""
    values = [0.1, 0.11, 0.5, 0.51, 0.9, 0.9, 0.9, 0.91, 0.91, 0.91]
    got = run(values)
    assert got.classes == [1, 1, 2, 2, 3, 3, 3, 3, 3, 3]
    assert got.tokens == [350] * 4 + [100] * 6


def test_paper_truncates_and_loses_what_a_layer_cannot_use():
    values = [0.1, 0.5, 0.9, 0.9, 0.9, 0.9]
    # (6 * 0.6 - 4 * 0.2) / 2 = 1.4 of a prompt of 101 tokens, of which 101 + 9 can be held.
    paper = run(values, "paper", "0.6", "0.2", length=101, cap=110)
    assert paper.tokens == [110, 110, 20, 20, 20, 20]
    low = run(values, "paper", "0.1", "0.01", length=100, cap=110, minimum=5)
    assert (low.tokens, low.notes) == ([20, 20, 5, 5, 5, 5], ()), "28, 28, 1, 1, 1, 1 with the minimum paid for"
    squeeze = run(values, "squeeze", "0.6", "0.2", length=101, cap=110)
    assert sum(squeeze.tokens) == int(Fraction("3.6") * 101) == 363
    assert squeeze.tokens == [110, 110, 36, 36, 36, 35], "what the cap leaves over goes evenly to class 3"


def test_minimums_are_paid_by_the_layers_above():
    values = [0.1, 0.5, 0.9, 0.9]
    got = run(values, ini="0.04", class3="0.01", length=100, cap=200, minimum=3)
    # The formula gives 7, 7, 1, 1; four tokens are missing, and both others have four above the minimum.
    assert got.tokens == [5, 5, 3, 3]
    assert not got.notes


def test_the_sum_grows_only_when_the_minimums_exceed_it():
    got = run([0.1, 0.5, 0.9, 0.9], ini="0.01", class3="0.01", length=100, cap=200, minimum=5)
    assert got.tokens == [5, 5, 5, 5]
    assert "the total grows" in got.notes[0]


def test_classes_are_scikit_learns_and_ordered_by_centre():
    for log_scale in (False, True):
        values = -np.log(np.maximum(1 - SMOLLM2, 1e-7)) if log_scale else SMOLLM2
        kmeans = KMeans(3, n_init=10, random_state=0).fit(values.reshape(-1, 1))
        centres = sorted(kmeans.cluster_centers_.ravel())
        expected = [centres.index(kmeans.cluster_centers_.ravel()[label]) + 1 for label in kmeans.labels_]
        assert classify(SMOLLM2, log_scale) == expected
    plain, log = classify(SMOLLM2), classify(SMOLLM2, log_scale=True)
    assert plain.count(3) > log.count(3), "the log scale spreads the layers that crowd near 1"


@given(st.lists(st.integers(0, 40), min_size=3, max_size=9).filter(lambda found: len(set(found)) > 2))
def test_the_classes_are_the_best_that_there_are(numbers):
    values = np.array(sorted(numbers)) / 41 + 0.02
    splits = [np.split(values, borders) for borders in combinations(range(1, len(values)), 2)]
    costs = [sum(((part - part.mean()) ** 2).sum() for part in split) for split in splits]
    found = best_centres(values)
    assert ((values[:, None] - found) ** 2).min(axis=1).sum() == pytest.approx(min(costs), abs=1e-12)
    assert list(found) == sorted(found)
    classes = classify(values)
    assert classes == sorted(classes) and set(classes) == {1, 2, 3}
    assert [values[np.array(classes) == one].mean() for one in (1, 2, 3)] == pytest.approx(found)


def test_few_distinct_values():
    assert classify(np.array([0.5, 0.9, 0.5])) == [1, 3, 1]
    assert run([0.7] * 4).tokens == [200] * 4
    with pytest.raises(ValueError, match="finite"):
        classify(np.array([0.5, np.nan, 0.7]))
