"""Loss curves, for which decoder layers before the one that is cut do not run again."""

from contextlib import nullcontext
from fractions import Fraction

import pytest
import torch
from conftest import random_model

from squeeze import SqueezeConfig, squeezed
from squeeze.engine import loss_curves
from squeeze.models_table.zoo import build

PROMPT = torch.arange(3, 90).repeat(3)[:200]
SHARE = Fraction(3, 10)

#: Plain, with attention and MLP side by side, with experts, with tuples, with a state space between attention layers
#: or beside them, with one block at several depths, with layers that share a cache, with streams of four dimensions.
FAMILIES = ("llama", "gpt_neox", "mixtral", "falcon", "jamba", "falcon_h1", "zamba2", "gemma3n_text", "deepseek_v3")


def measured(model, monkeypatch, at_once):
    monkeypatch.setitem(loss_curves.LAYERS_AT_ONCE, "cpu", at_once)
    with squeezed(model, SqueezeConfig("sliding_window", "0.3", "0.3")) as run:
        return torch.tensor(loss_curves.measure(run, PROMPT, [SHARE]))


@pytest.mark.parametrize("at_once", [1, 64])
@pytest.mark.parametrize("family", FAMILIES)
def test_curves_are_those_of_passes_through_all_layers(monkeypatch, family, at_once):
    model, counts = build(family), []
    original = loss_curves.replayed

    def replayed(outputs, running, cache):
        counts.append(sum(count < len(cache.prompt_lengths) for count in running))
        return original(outputs, running, cache)

    monkeypatch.setattr(loss_curves, "replayed", replayed)
    found = measured(model, monkeypatch, at_once)
    monkeypatch.setattr(loss_curves, "recorded", lambda outputs, cache: nullcontext())
    expected = measured(model, monkeypatch, 64)
    assert expected.max() > 1e-4
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
    assert max(counts) == {"gemma3n_text": 0, "jamba": 1, "zamba2": 1}.get(family, 3)
    assert counts[-1] == 0, "nothing is recorded, and all layers run"


@pytest.mark.parametrize("at_once", [2, 5])
def test_a_layer_runs_for_what_is_cut_in_it_or_before(monkeypatch, at_once):
    model, rows = random_model("llama"), [0] * 5

    def count(number, given):
        rows[number] += given.shape[0] if given.shape[1] == 1 else 0

    for number, block in enumerate(model.model.layers):
        block.mlp.register_forward_hook(lambda _, given, __, number=number: count(number, given[0]))
    monkeypatch.setitem(loss_curves.LAYERS_AT_ONCE, "cpu", at_once)
    with squeezed(model, SqueezeConfig("sliding_window", "0.3", "0.3")) as run:
        rows[:] = [0] * 5
        loss_curves.measure(run, PROMPT, [SHARE])
    steps = [(count - loss_curves.TAIL) / loss_curves.TAIL for count in rows]
    assert steps == [4, 8, 12, 16, 20]
    assert not any("forward" in vars(block) for block in model.model.layers), "their own passes are back"


def test_a_users_hook_adds_to_what_a_layer_gives_once(monkeypatch):
    model = random_model("llama")
    vector = 5 * torch.randn(48, generator=torch.Generator().manual_seed(1))
    without = measured(model, monkeypatch, 1)
    model.model.layers[1].register_forward_hook(lambda _, given, output: output + vector)
    found = measured(model, monkeypatch, 1)
    monkeypatch.setattr(loss_curves, "recorded", lambda outputs, cache: nullcontext())
    expected = measured(model, monkeypatch, 64)
    assert (expected - without).abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_a_pass_that_a_users_hook_starts_runs_all_layers(monkeypatch):
    model, token, seen = random_model("llama"), torch.tensor([[5]]), []
    alone, without = model(token, use_cache=False).logits, measured(model, monkeypatch, 1)
    monkeypatch.setitem(loss_curves.LAYERS_AT_ONCE, "cpu", 1)

    def start_a_pass(*_):
        if not starting:
            starting.append(True)
            seen.append(model(token, use_cache=False).logits)
            starting.clear()

    with squeezed(model, SqueezeConfig("sliding_window", "0.3", "0.3")) as run:
        starting = []
        model.model.layers[4].mlp.register_forward_hook(start_a_pass)
        found = torch.tensor(loss_curves.measure(run, PROMPT, [SHARE]))
    assert len(seen) > 6 * loss_curves.TAIL and all(torch.allclose(one, alone, atol=1e-5) for one in seen)
    torch.testing.assert_close(found, without, rtol=1e-3, atol=1e-6)
