"""What CAKE looks at: how a prompt's last queries spread their attention, against the model's own probabilities."""

import numpy as np
import pytest
import torch
from conftest import random_model

from squeeze import Cake, InputError, Pyramid, SlidingWindow, Squeeze, Uniform, squeezed
from squeeze.engine.probe import probe
from squeeze.models_table.checks import LENGTHS, Batch
from squeeze.models_table.reference import eager
from squeeze.models_table.zoo import build

WINDOW = 5


class Blind(Uniform):
    needs = "attention"


def expected(model, layers, prompt):
    """Entropy and variance of each layer by the formulas of the paper, `(2, layers)`."""
    found = []

    def look(module, args, output):
        entropy = variance = 0.0
        for of_head in output[1][0].double():
            before = of_head[-WINDOW:, :-WINDOW]
            entropy -= sum((p * p.log()).item() for p in before.flatten() if p > 0)
            variance += before.var(dim=0, correction=1).sum().item()
        found.append((entropy, variance))

    hooks = [layer.module.register_forward_hook(look) for layer in layers]
    with eager(model, layers), torch.no_grad():
        model(prompt[None])
    for hook in hooks:
        hook.remove()
    return np.array(found).T


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "deepseek_v3"])
def test_the_spread_is_that_of_the_models_own_attention(name):
    """Windows, bent logits, sink logits, and latent attention; each row of a padded batch."""
    model = build(name)
    layers, batch, seen = probe(model).layers, Batch.of(model, LENGTHS, 1), []

    class Seeing(Cake):
        def allocate(self, facts):
            seen.append(facts.spread)
            return super().allocate(facts)

    with squeezed(model, SlidingWindow(), Seeing("0.5", window=WINDOW)) as run:
        batch.logits(model, run.cache(1))
        budgets = run.budgets
    for row, spread in enumerate(seen):
        assert np.allclose(np.stack(spread), expected(model, layers, batch.prompt(row)), rtol=1e-3)
    assert np.ptp(budgets) > 2


def test_budgets_go_by_the_preference():
    """Of 4 layers, budgets above the minimum as 4 : 1 : 1 : 2, in pairs of (tau1, tau2) the exponents' way."""
    model, ids = random_model("llama", num_hidden_layers=4), torch.arange(3, 103)[None]

    class Given(Cake):
        def allocate(self, facts):
            entropy, variance = np.array([16.0, 1.0, 4.0, 4.0]), np.array([1.0, 1.0, 0.25, 1.0])
            return super().allocate(type(facts)(**vars(facts) | {"spread": type(facts.spread)(entropy, variance)}))

    with squeezed(model, SlidingWindow(), Given("0.21", tau1=2, tau2=2)) as run:
        model.generate(ids, max_new_tokens=1)
        assert run.budgets.tolist() == [[41, 11, 11, 21]]


def test_a_prompt_within_the_window_has_uniform_budgets():
    model = random_model("llama")
    with squeezed(model, SlidingWindow(), Cake("0.5")) as run:
        model.generate(torch.arange(3, 33)[None], max_new_tokens=4)
        assert run.budgets.tolist() == [[15] * 5]


def test_a_prefill_is_shared_where_the_attention_was_looked_at():
    model, found = random_model("llama"), {}
    ids = torch.randint(3, 199, (1, 90), generator=torch.Generator().manual_seed(0))
    ways = [Uniform("0.3"), Cake("0.3", window=4), Squeeze("0.3", class3="0.2"), Cake("0.3", window=9), Pyramid("0.3")]
    for share in (False, True):
        with squeezed(model, SlidingWindow(), ways[0]) as run:
            run.share_prefills = share
            for way in ways:
                run.use(type(run.config)("sliding_window", allocation=way))
                model.generate(ids, max_new_tokens=2)
                found[share, str(way)] = run.budgets.tolist(), bool(run.shared_seconds)
    assert [found[True, str(way)][0] for way in ways] == [found[False, str(way)][0] for way in ways]
    assert [found[True, str(way)][1] for way in ways] == [False, False, True, False, True]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Cake("0.2", window=1), "window must be a whole number of tokens, 2 or more"),
        (lambda: Cake("0.2", tau1="1"), "tau1 must be above 0, got 1"),
        (lambda: squeezed(build("llama"), SlidingWindow(), Blind("0.2")).__enter__(), "observed must say of how many"),
        (lambda: Cake("0.2", tau2=0), "tau2 must be above 0, got 0"),
        (lambda: squeezed(build("falcon"), SlidingWindow(), Cake("0.2")).__enter__(), "computes attention by itself"),
        (
            lambda: squeezed(build("llama"), SlidingWindow(), Cake("0.2"), prefill_chunk=8),
            "needs budgets that are known before the prompt is read: take another allocation",
        ),
    ],
)
def test_what_cannot_be_is_a_sentence(make, said):
    with pytest.raises(InputError, match=said):
        make().__enter__()
