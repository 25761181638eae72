"""Loss curves, for which decoder layers before the one that is cut do not run again."""

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


@pytest.mark.parametrize("family", FAMILIES)
def test_curves_are_those_of_passes_through_all_layers(monkeypatch, family):
    model = build(family)
    found, expected = measured(model, monkeypatch, 1), measured(model, monkeypatch, 64)
    assert expected.max() > 1e-4
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_layers_before_the_cut_run_no_more(monkeypatch):
    model, passes = random_model("llama"), [0] * 5
    for number, block in enumerate(model.model.layers):
        block.mlp.register_forward_hook(lambda *_, number=number: passes.__setitem__(number, passes[number] + 1))
    measured(model, monkeypatch, 2)
    steps = [count - passes[0] for count in passes]
    assert steps == [0, 0, loss_curves.TAIL, loss_curves.TAIL, 2 * loss_curves.TAIL]
    assert not any("forward" in vars(block) for block in model.model.layers), "their own passes are back"
