"""Ada-KV: heads share their layer's budget by scores, against a loop that gives out one token after the other."""

import numpy as np
import pytest
import torch
from conftest import random_model
from hypothesis import given
from hypothesis import strategies as st
from test_engine import compare
from test_heads import BATCH, PROMPTS, SETTINGS

from squeeze import InputError, SqueezeConfig, squeezed
from squeeze.engine.adakv import FLOOR, shared


def one_by_one(scores, budget, least, cap):
    """Each head its best tokens up to the floor, then the best token of all heads that is left, and so on."""
    heads, tokens = len(scores), len(scores[0])
    if budget >= min(tokens, cap):
        return [budget] * heads
    floor = min(max(int(FLOOR * budget), least), budget)
    left = [sorted(own, reverse=True)[floor:] for own in scores]
    budgets = [floor] * heads
    for _ in range(heads * (budget - floor)):
        best = max(range(heads), key=lambda head: left[head][0] if left[head] else -1)
        if left[best] and left[best][0] >= 0:
            left[best].pop(0)
            budgets[best] += 1
    return [min(count, cap) for count in budgets]


@given(st.data())
def test_tokens_compete_across_heads(data):
    heads, tokens = data.draw(st.integers(1, 4)), data.draw(st.integers(4, 150))
    budget, seed = data.draw(st.integers(2, 30)), data.draw(st.integers(0, 99))
    scores = torch.rand(heads, tokens, generator=torch.Generator().manual_seed(seed)).pow(6)
    scores *= 100.0 ** torch.arange(heads)[:, None]  # one head would win all, but for the floor
    least_cap = max(budget, tokens // 2)
    cap = data.draw(st.integers(least_cap, max(least_cap, tokens + 9)))
    scores[:, : max(tokens - cap, 0)] = -1.0  # left behind by the layer's own window
    found, expected = shared(scores, budget, 2, cap), one_by_one(scores.tolist(), budget, 2, cap)
    assert sum(found) == heads * budget
    assert all(min(2, budget) <= count <= max(cap, budget) for count in found)
    assert min(found) >= int(FLOOR * budget)
    assert all(count >= least for count, least in zip(found, expected, strict=True))
    if sum(expected) == sum(found):
        assert found == expected


@pytest.mark.parametrize("window", [None, 50])
def test_a_run_holds_what_heads_have_won(window):
    """With the budgets that came out, the reference computes the same; they differ, and add up to the layers'."""
    prompt = PROMPTS[0]
    model = random_model("mistral", sliding_window=window)
    run = compare(model, prompt, SqueezeConfig("h2o", "0.3", "0.2", per="adakv"))
    with squeezed(model, SqueezeConfig("h2o", "0.3", "0.2")) as even:
        model.generate(prompt[None], max_new_tokens=64)
    assert run.budgets.shape == (1, 5, 2)
    assert (run.budgets.sum(axis=2) == 2 * even.budgets).all()
    assert (np.ptp(run.budgets, axis=2) > 0).any()


@pytest.mark.parametrize("allocation", [{"ini_size": "0.3", "kv_class3": "0.2"}, {"budgets": [9, 20, 30, 61, 200]}])
def test_a_batch_shares_as_its_prompts_do_alone(allocation):
    """With budgets that are known before the prompts are read, and with those that are not."""
    model, (ids, mask) = random_model("llama"), BATCH
    with squeezed(model, SqueezeConfig("h2o", **allocation, per="adakv")) as run:
        together = model.generate(ids, attention_mask=mask, **SETTINGS)[:, -40:]
        budgets = run.budgets.tolist()
        for row, prompt in enumerate(PROMPTS):
            assert model.generate(prompt[None], **SETTINGS)[0, -40:].equal(together[row])
            assert run.budgets.tolist() == budgets[row : row + 1]


def test_what_cannot_share_is_a_sentence():
    with pytest.raises(InputError, match="per adakv needs a method that scores tokens, such as h2o, and streaming"):
        SqueezeConfig("streaming", "0.3", "0.2", per="adakv")
    with (
        pytest.raises(InputError, match="needs a method that scores tokens"),
        squeezed(random_model("llama"), SqueezeConfig(None, "0.3", "0.2", per="adakv")),
    ):
        pass
    with pytest.raises(InputError, match="per adakv shares a layer's budget among its KV heads, and budgets has"):
        SqueezeConfig("h2o", budgets=[[9, 9]] * 5, per="adakv")
    with pytest.raises(InputError, match="per must be one of layer, head, adakv, got heads"):
        SqueezeConfig("h2o", "0.3", "0.2", per="heads")
    with pytest.raises(InputError, match="the allocation squeeze knows only layers: take calibrated or measured"):
        SqueezeConfig("h2o", "0.3", "0.2", per="head")
