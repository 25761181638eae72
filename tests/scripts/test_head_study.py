"""The study of budgets per KV head: what a head keeps is what it attends to, and everything kept loses nothing."""

import importlib.util
from fractions import Fraction

import pytest
import torch
from conftest import ROOT, random_model
from transformers import AttentionInterface

spec = importlib.util.spec_from_file_location("head_study", ROOT / "script/head_study.py")
study = importlib.util.module_from_spec(spec)
spec.loader.exec_module(study)
AttentionInterface.register("kept", study.attend)

LAYERS, HEADS = 5, 2
PROMPT = torch.arange(3, 190).repeat(2)[:230]


@torch.inference_mode()
def losses(model, *budgets):
    tokens, text = PROMPT[:200], PROMPT[200:]
    full = model(PROMPT[None], use_cache=False).logits[0, 200:].log_softmax(dim=-1)
    return study.divergences(model, study.prefill(model, tokens), text, full, list(budgets))


def test_a_head_that_keeps_less_is_cut_alone():
    model = random_model("llama")
    whole = [[200] * HEADS for _ in range(LAYERS)]
    one, both = [list(layer) for layer in whole], [list(layer) for layer in whole]
    one[3][1], both[3] = 20, [20, 20]
    nothing, cut, more = losses(model, whole, one, both)
    assert nothing == pytest.approx(0, abs=1e-5)
    assert cut > 1e-3 and more > 1e-3 and cut != pytest.approx(more, rel=1e-3)
    kept = study.Kept(study.prefill(model, PROMPT[:200]))
    kept.choose([whole, one])
    assert [mask.sum(dim=-1).tolist() for mask in kept.masks[2:4]] == [[[200, 200]] * 2, [[200, 200], [200, 20]]]
    assert kept.masks[3][1, 1, -10:].all(), "the recent window"


@torch.inference_mode()
def test_curves_of_heads_and_layers_meet_where_nothing_differs():
    model = random_model("llama")
    layers, heads = (study.loss_curves(model, PROMPT, Fraction(1, 5), HEADS, one) for one in (False, True))
    assert layers.shape == (LAYERS, 5) and heads.shape == (LAYERS * HEADS, 5)
    assert heads[:, 2] == pytest.approx([layers[0, 2]] * (LAYERS * HEADS), rel=1e-3)
    assert len({round(one, 6) for one in heads[:, 0]}) == LAYERS * HEADS
