"""Layers that reach and hold different numbers of tokens, of different widths: the total of bytes is conserved."""

from dataclasses import replace
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import alike, fractions, unlike, weight
from test_allocation import SMOLLM2

from squeeze import Explicit, Linear, Paper, PromptFacts, Pyramid, Squeeze, SqueezeLog, Uniform, conserve
from squeeze.allocations.base import check_budgets, reach
from squeeze.allocations.classes import CLASS_3, formula
from squeeze.allocations.curves import budgets, greedy, spend
from squeeze.allocations.totals import bounded
from squeeze.models.cached_layers import OwnLayer

MULTIPLES = [Fraction(1, 4), Fraction(1), Fraction(2), Fraction(4)]

#: As docs/budgets.md has it: 18 layers, a window of 512 in all but each sixth, one KV head of 256 numbers.
GEMMA3 = [OwnLayer(1, 256, 256, None if layer % 6 == 5 else 512) for layer in range(18)]


def measured(facts, seed, count=2):
    return np.random.default_rng(seed).integers(0, 40, (count, facts.layers, len(MULTIPLES))) / 8


def allocated(facts, ini, ratio, seed):
    """Budgets by every allocation that conserves, by name."""
    facts = replace(facts, similarities=np.array(facts.similarities))
    found = {
        "uniform": Uniform(ini).allocate(facts),
        "squeeze": Squeeze(ini, ini * ratio).allocate(facts),
        "linear": Linear(ini, last=float(ratio)).allocate(facts),
        "pyramid": Pyramid(ini).allocate(facts),
        "squeeze-log": SqueezeLog(ini, ini * ratio).allocate(facts),
        "curves": budgets(MULTIPLES, measured(facts, seed), ini, facts),
    }
    alone = greedy(MULTIPLES, measured(facts, seed)[0], ini, facts)
    return found | {"greedy": replace(found["curves"], tokens=alone)}


@settings(max_examples=150, deadline=None)
@given(unlike(), fractions, fractions, st.integers(0, 99))
def test_the_total_of_bytes_is_conserved_within_one_token_and_the_bounds(facts, ini, ratio, seed):
    wanted = ini * weight(facts.reach, facts)
    lowest, highest = weight(facts.least, facts), weight(facts.caps, facts)
    for name, got in allocated(facts, ini, ratio, seed).items():
        check_budgets(got, facts, Uniform(ini))
        found, bound = weight(got.tokens, facts), min(max(wanted, lowest), highest)
        assert bound - max(facts.widths) < found <= bound, name
        assert bool(got.notes) == (int(wanted / np.gcd.reduce(facts.widths)) != bound // np.gcd.reduce(facts.widths))


@settings(max_examples=150, deadline=None)
@given(unlike(widths=st.just(512)), fractions, fractions, st.integers(0, 99))
def test_of_layers_equally_wide_it_is_conserved_to_the_token(facts, ini, ratio, seed):
    wanted = int(ini * sum(facts.reach))
    for name, got in allocated(facts, ini, ratio, seed).items():
        assert sum(got.tokens) == min(max(wanted, sum(facts.least)), sum(facts.caps)), name


@settings(max_examples=100, deadline=None)
@given(unlike(), fractions, fractions)
def test_uniform_budgets_are_each_layers_own_fraction_and_grow_with_it(facts, one, other):
    small, large = (Uniform(size).allocate(facts).tokens for size in sorted((one, other)))
    assert weight(small, facts) <= weight(large, facts) + max(facts.widths)
    exact = bounded([max(one, other) * tokens for tokens in facts.reach], facts)
    assert all(abs(tokens - share) < 1 for tokens, share in zip(large, exact, strict=True))
    if min(max(one, other) * tokens - least for tokens, least in zip(facts.reach, facts.least, strict=True)) >= 0:
        assert exact == [max(one, other) * tokens for tokens in facts.reach], "no bound is in the way"


@settings(max_examples=100, deadline=None)
@given(unlike(), fractions, fractions)
def test_the_formula_moves_bytes_from_class_3_to_the_others(facts, ini, ratio):
    classes = Squeeze(ini, ini).classify(np.array(facts.similarities))
    shares = formula(classes, ini, ini * ratio, facts.reach, facts.widths)
    assert weight(shares, facts) == ini * weight(facts.reach, facts)
    of_class = {}
    for layer_class, share, tokens in zip(classes, shares, facts.reach, strict=True):
        of_class.setdefault(layer_class == CLASS_3, set()).add(share / tokens)
    assert all(len(fractions) == 1 for fractions in of_class.values()), "one fraction for class 3, one for the others"
    if len(of_class) == 2:
        assert of_class[True] == {ini * ratio} and min(of_class[False]) >= ini


@settings(max_examples=100, deadline=None)
@given(unlike(), fractions, fractions)
def test_paper_loses_what_a_layer_cannot_hold(facts, ini, ratio):
    facts = replace(facts, minimum=0, similarities=np.array(facts.similarities))
    got = Paper(ini, ini * ratio).allocate(facts)
    exact = formula(got.classes, ini, ini * ratio, facts.reach, facts.weights)
    assert got.tokens == [min(int(share), cap) for share, cap in zip(exact, facts.caps, strict=True)]


def slow(shares, facts, takers):
    """What caps leave over, handed on byte by byte: a little to each of the takers, then to each of the others."""
    found, step = [min(share, cap) for share, cap in zip(shares, facts.caps, strict=True)], Fraction(1, 500)
    left = weight(shares, facts) - weight(found, facts)
    for group in (takers, range(len(shares))):
        while left > 0 and (below := [layer for layer in group if found[layer] < facts.caps[layer]]):
            for layer in below:
                given_ = min(step, facts.caps[layer] - found[layer])
                found[layer] += given_
                left -= given_ * facts.widths[layer]
    return found


@settings(max_examples=40, deadline=None)
@given(unlike(most=5, widths=st.sampled_from([1, 2, 3])), st.data())
def test_what_a_cap_leaves_over_goes_to_the_takers_and_then_to_the_others(facts, data):
    facts = replace(facts, minimum=0, caps=tuple(1 + cap % 12 for cap in facts.caps))
    layers = facts.layers
    shares = data.draw(st.lists(st.fractions(0, 14, max_denominator=4), min_size=layers, max_size=layers))
    takers = data.draw(st.lists(st.integers(0, layers - 1), unique=True))
    expected = slow(shares, facts, takers)
    assert [float(one) for one in bounded(shares, facts, takers)] == pytest.approx(
        list(map(float, expected)), abs=0.05
    )
    got = conserve(shares, facts, takers)
    assert weight(got.tokens, facts) > min(weight(shares, facts), weight(facts.caps, facts)) - max(facts.widths)


@settings(max_examples=60, deadline=None)
@given(unlike(most=2, widths=st.sampled_from([1, 2, 3])), fractions, st.integers(0, 99))
def test_greedy_budgets_are_as_good_as_brute_force_but_for_a_token_that_does_not_fit(facts, ini, seed):
    """No choice of as many bytes loses less, or of a token of the widest layer less, where that may not fit."""
    facts = replace(
        facts, reach=tuple(1 + tokens % 23 for tokens in facts.reach), caps=tuple(2 + cap % 23 for cap in facts.caps)
    )
    [losses] = measured(facts, seed, 1)
    found = greedy(MULTIPLES, losses, ini, facts)
    sizes = [
        [min(max(int(multiple * ini * tokens), least), cap) for multiple in MULTIPLES]
        for tokens, least, cap in zip(facts.reach, facts.least, facts.caps, strict=True)
    ]

    def loss(choice):
        known = zip(sizes, losses.tolist(), choice, strict=True)
        return sum(on_hull(*curve, tokens) for *curve, tokens in known)

    unit = int(np.gcd.reduce(facts.widths))
    total = max(int(ini * weight(facts.reach, facts) / unit) * unit, weight(facts.least, facts))
    total = min(total, weight(facts.caps, facts))
    assert weight(found, facts) <= total
    every = product(*(range(known[0], cap + 1) for known, cap in zip(sizes, facts.caps, strict=True)))
    room = total - (max(facts.widths) - unit)
    affordable = [loss(choice) for choice in every if weight(choice, facts) <= room]
    assert loss(found) <= min(affordable, default=np.inf) + 1e-9


def test_a_token_goes_where_it_saves_most_for_its_bytes():
    steep, gentle = [(0, 32.0), (4, 0.0)], [(0, 8.0), (4, 0.0)]
    assert spend([gentle, gentle], 4, [4, 4], [3, 1]) == [0, 4], "the same loss for a third of the bytes"
    assert spend([steep, gentle], 4, [4, 4], [3, 1]) == [1, 1], "8 a token, of three bytes each, is more than 2"
    assert spend([steep, gentle], 12, [4, 4], [3, 1]) == [4, 0]
    assert spend([steep, gentle], 9, [2, 4], [3, 1]) == [2, 3], "up to a cap"
    assert spend([steep, steep], 2, [4, 4], [3, 3]) == [0, 0], "less than a token's bytes"
    with pytest.raises(ValueError, match=r"total must be in \[0, 16\], got 17"):
        spend([steep, gentle], 17, [4, 4], [3, 1])


def on_hull(sizes, losses, tokens):
    """The lowest line between any two points of a curve, at some tokens; more tokens never cost anything."""
    known = {}
    for size, loss in zip(sizes, losses, strict=True):
        known.setdefault(size, loss)
    points = list(known.items())
    return min(
        a + (b - a) * (min(tokens, y) - x) / (y - x) if y > x else a
        for x, a in points
        for y, b in points
        if x <= tokens and (x == y or y >= tokens)
    )


def test_gemma_3_as_the_docs_have_it():
    facts = PromptFacts.of(GEMMA3, 2000, 64, 5)
    assert facts.reach == ((512,) * 5 + (2000,)) * 3 and sum(facts.reach) == 13_680
    assert facts.caps == ((512,) * 5 + (2064,)) * 3
    uniform = Uniform("0.2").allocate(facts)
    assert sum(uniform.tokens) == 2736 and not uniform.notes
    assert uniform.tokens == [103, 103, 103, 103, 103, 400, 103, 102, 102, 102, 102, 400, 102, 102, 102, 102, 102, 400]
    assert Uniform(1).allocate(facts).tokens == list(facts.reach)
    similarities = np.array([0.1 if layer.window is None else 0.9 for layer in GEMMA3])
    squeezed = Squeeze("0.2", "0.1").allocate(replace(facts, similarities=similarities))
    assert squeezed.classes == ([3] * 5 + [1]) * 3
    assert squeezed.tokens == [52, 52, 52, 51, 51, 656, *([51] * 5 + [656]) * 2] and sum(squeezed.tokens) == 2736


def test_what_a_window_cannot_use_goes_to_the_other_layers():
    """Class 3 first, up to its caps; then every layer that can hold more."""
    facts = PromptFacts(
        1000, (100, 100, 1064, 1064), (100, 100, 1000, 1000), (1,) * 4, 2, np.array([0.1, 0.9, 0.1, 0.9])
    )
    # The others' (0.8 * 2200 - 0.4 * 1100) / 1100 = 1.2 is more than they hold, by 20 and by 136.
    got = Squeeze("0.8", "0.4").allocate(facts)
    assert got.classes == [1, 3, 1, 3] and not got.notes
    assert got.tokens == [100, 40 + 60, 1064, 400 + 96], "evenly to class 3, up to its caps"
    assert conserve([Fraction(n) for n in (130, 90, 0, 0)], facts, takers=[1]).tokens == [100, 100, 10, 10]


def test_where_all_layers_are_alike_a_window_is_only_a_bound():
    """As published: `ini_size` is a fraction of the prompt, for Mistral-7B-v0.1 as for a Llama."""
    mistral = [OwnLayer(8, 128, 128, 4096)] * 32
    assert reach(mistral, 10_000) == (10_000,) * 32
    facts = PromptFacts.of(mistral, 10_000, 100, 5)
    assert (facts.caps, facts.widths, facts.weights) == ((4096,) * 32, (2048,) * 32, (1,) * 32)
    assert Uniform("0.2").allocate(facts).tokens == [2000] * 32
    capped = Uniform("0.5").allocate(facts)
    assert capped.tokens == [4096] * 32
    assert capped.notes == ("the layers can hold 4096 tokens each, so 28928 of 160000 stay unused",)
    assert reach([OwnLayer(8, 128, 128, None, 50), OwnLayer(8, 128, 128, 60)], 100) == (50, 60)


# fmt: off
def test_of_layers_that_are_alike_every_number_is_that_of_before():
    """Taken down from the version in which all layers had one cap and one width."""
    facts = alike(30, 1999, 2031, 5, SMOLLM2)
    assert Squeeze("0.203", "0.12").allocate(facts).tokens == [2031, 2031, *[290] * 19, *[289] * 9]
    assert Squeeze("0.403", "0.25").allocate(facts).tokens == [2031, 2031, 719, *[718] * 27]
    assert Paper("0.403", "0.25").allocate(facts).tokens == [2031, 2031, *[499] * 28]
    assert SqueezeLog("0.203", "0.12").allocate(facts).tokens == [
        623, 623, 623, 623, 623, 623, 623, 622, 622, 622, 622, 240, 240, 240, 240, 622, 240, 240, 240, 240, 240, 240,
        240, 240, 622, 240, 240, 240, 240, 240,
    ]
    multiples = [Fraction(1, 4), Fraction(1, 2), Fraction(1), Fraction(2), Fraction(4)]
    losses, size = np.round(np.random.default_rng(7).uniform(0, 1, (3, 12, 5)), 3), Fraction("0.203")
    facts = alike(12, 1999, 2031, 5)
    assert budgets(multiples, losses, size, facts).tokens == [
        532, 304, 355, 483, 610, 304, 253, 456, 253, 380, 507, 432,
    ]
    assert greedy(multiples, losses[0], size, facts) == [811, 202, 405, 101, 1529, 202, 405, 405, 101, 202, 405, 101]
    assert greedy(multiples, 0 * losses[0], size, facts) == [*[406] * 9, *[405] * 3]
    assert budgets(multiples, losses, Fraction("0.403"), alike(12, 1999, 900, 5)).tokens == [
        810, 855, 831, 737, 876, 838, 714, 831, 804, 758, 876, 737,
    ]
    assert budgets(multiples, losses[:, :5], Fraction("0.003"), alike(5, 1999, 2031, 5)).tokens == [8, 5, 6, 5, 5]
# fmt: on


def test_a_layer_too_small_for_the_minimum_has_its_cap():
    facts = PromptFacts.of([OwnLayer(1, 8, 8, 3), OwnLayer(1, 8, 8)], 100, 10, 5)
    assert facts.least == (3, 5)
    got = Uniform("0.01").allocate(facts)
    assert (got.tokens, got.notes) == ([3, 5], ("1 tokens do not give 2 layers their minimum of 5: the total grows",))
    assert Explicit([40, 40]).allocate(facts).tokens == [3, 40]


def test_totals_of_layers_that_differ_in_width_are_said_in_numbers():
    facts = PromptFacts(100, (10, 10), (100, 100), (64, 128), 2)
    got = Uniform("0.5").allocate(facts)
    assert got.tokens == [10, 10]
    assert got.notes == (
        "the layers can hold 30 times 64 numbers of keys and values together, so 120 of 150 stay unused",
    )
