"""Strategies of a user's own that are wrong are a sentence; passes that a hook starts are apart."""

from dataclasses import dataclass
from fractions import Fraction

import pytest
import torch
from conftest import random_model

from squeeze import (
    H2O,
    Allocation,
    Budgets,
    Explicit,
    InputError,
    SlidingWindow,
    Squeeze,
    SqueezeConfig,
    Uniform,
    squeezed,
)

PROMPT = torch.arange(3, 103)[None]
SETTINGS = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


@dataclass(frozen=True)
class Keeps(SlidingWindow):
    """A sliding window that keeps what it is told."""

    kept: object = None
    fixed_slots = False

    def keep(self, length, budget, scores):
        return self.kept


@dataclass(frozen=True)
class Writes(SlidingWindow):
    """A sliding window that writes where it is told."""

    to: object = None

    def slot(self, position, budget, held, scores):
        return self.to


@dataclass(frozen=True)
class WritesH2O(H2O):
    to: object = None

    def slot(self, position, budget, held, scores):
        return self.to


@pytest.mark.parametrize(
    ("evictor", "said"),
    [
        (
            Keeps(torch.arange(18)[None]),
            r"shape \(2, 20\) or \(1, 20\), and gave int64 of shape \(1, 18\) from 0 to 17",
        ),
        (Keeps(torch.arange(20)), r"int64 of shape \(20,\)"),
        (Keeps(torch.arange(20).expand(3, -1)), r"int64 of shape \(3, 20\)"),
        (Keeps(torch.arange(20.0)[None]), "gave float32"),
        (Keeps(torch.arange(90, 110)[None]), r"positions from 0 to 99, .* from 90 to 109"),
        (Keeps(torch.arange(20)[None] - 20), "from -20 to -1"),
        (Keeps(list(range(20))), r"gave \[0, 1, 2"),
        (Writes(torch.full((5, 2, 1), 20)), "from 0 to its budget - 1, and gave int64 .* from 20 to 20"),
        (Writes(torch.full((5, 2, 1), -1)), "from -1 to -1"),
        (Writes(torch.zeros(7, dtype=torch.long)), r"of shape \(5, 2, 1\), .* of shape \(7,\)"),
        (Writes(0), "and gave 0"),
        (WritesH2O(torch.zeros(1, 1, dtype=torch.long)), r"of shape \(2, 1\), .* of shape \(1, 1\)"),
        (WritesH2O(torch.full((2, 1), 20)), "from 20 to 20"),
    ],
)
def test_an_evictor_that_gives_no_slots_or_positions_is_a_sentence(evictor, said):
    model = random_model("llama")
    with squeezed(model, evictor, Uniform(Fraction(1, 5))), pytest.raises(InputError, match=said) as error:
        model.generate(PROMPT, **SETTINGS)
    assert "\n" not in str(error.value) and type(evictor).__name__ in str(error.value)


@dataclass(frozen=True)
class Gives(Allocation):
    budgets: object

    def allocate(self, facts):
        return self.budgets


@pytest.mark.parametrize(
    ("budgets", "said"),
    [
        ([20] * 5, r"must return squeeze.Budgets, and gave \[20"),
        (Budgets([20] * 4), "must give 5 layers their tokens"),
        (Budgets([20.0] * 5), "must give layer 0 a whole number"),
        (Budgets([20] * 5, [1, 3]), r"must sort 5 layers into the classes 1, 2 and 3, .* gave \[1, 3\]"),
        (Budgets([20] * 5, [0, 1, 2, 3, 3]), "must sort 5 layers"),
    ],
)
def test_an_allocation_that_gives_no_budgets_is_a_sentence(budgets, said):
    model = random_model("llama")
    with squeezed(model, SlidingWindow(), Gives(budgets)), pytest.raises(InputError, match=said):
        model.generate(PROMPT, **SETTINGS)


def test_a_fork_needs_the_scores_of_its_evictor():
    model = random_model("llama")
    with squeezed(model, SlidingWindow(), Uniform(0.2)) as run, torch.no_grad():
        prefill = run.prefill(PROMPT)
        run.use(SqueezeConfig(H2O(), allocation=Uniform(0.2)))
        with pytest.raises(ValueError, match="no scores for this evictor"):
            run.fork(prefill, [[20] * 5], 1)


def test_an_allocation_needs_what_there_is():
    with pytest.raises(
        InputError, match=r"needs of Typo must be one of nothing, similarities, attention, loss_curves, got sim$"
    ):

        class Typo(Allocation):
            needs = "sim"


def test_similarities_are_measured_but_with_explicit_budgets():
    model = random_model("llama")
    for allocation, measured in ((Uniform(0.2), True), (Squeeze(0.2, 0.1), True), (Explicit([20] * 5), False)):
        with squeezed(model, H2O(), allocation) as run:
            model.generate(PROMPT, **SETTINGS)
            assert (run.similarities is not None) == (run.classes is not None) == measured


@pytest.mark.parametrize("module", ["model.layers.2", "model.layers.2.self_attn.q_proj", "model.layers.2.mlp"])
def test_passes_that_a_hook_starts_are_apart(module):
    """Prefills and decode steps of other prompts, and passes without a cache, in the middle of others."""
    model, short, inner, nested = random_model("llama"), PROMPT[:, :60], [], False

    def hook(*_):
        nonlocal nested
        if not nested:
            nested = True
            model(short, use_cache=False)
            inner.append(model.generate(short, **SETTINGS))
            nested = False

    with squeezed(model, H2O(), Squeeze(0.3, 0.1)) as run:
        expected_inner = model.generate(short, **SETTINGS)
        expected = model.generate(PROMPT, **SETTINGS)
        result = run.last
        handle = model.get_submodule(module).register_forward_pre_hook(hook)
        assert torch.equal(model.generate(PROMPT, **SETTINGS), expected)
        handle.remove()
        assert len(inner) == 6 and all(torch.equal(one, expected_inner) for one in inner)
        cache = run.cache(0)
        model(PROMPT, past_key_values=cache)
        assert (run.budgets == result.budgets).all() and (run.similarities == result.similarities).all()
