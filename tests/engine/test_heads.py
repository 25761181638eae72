"""Budgets of single KV heads, against the slow reference; where their rows lie; and by layers as the special case."""

from functools import partial

import numpy as np
import pytest
import torch
from conftest import random_model
from hypothesis import given
from hypothesis import strategies as st
from test_engine import compare
from test_patch import left_pad

from squeeze import InputError, SqueezeConfig, squeezed
from squeeze.engine.layout import PADDING, Layout

ALGORITHMS = ("sliding_window", "streaming", "h2o")
#: Of each layer and head of a model with two: that evict at once, while decoding, and never; alike, and nearly so.
HEADS = [[5, 40], [100, 20], [31, 31], [9, 130], [59, 60]]
PROMPTS = [torch.randint(3, 199, (n,), generator=torch.Generator().manual_seed(n)) for n in (60, 45, 7, 61)]
BATCH = left_pad(PROMPTS)
SETTINGS = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False}


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_heads_hold_what_the_reference_holds(architecture, algorithm):
    settings = {"sliding_window": 50} if architecture == "mistral" else {}
    run = compare(random_model(architecture, **settings), PROMPTS[0], SqueezeConfig(algorithm, budgets=HEADS))
    assert run.budgets.shape == (1, 5, 2)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_as_many_kv_heads_as_heads(algorithm):
    drawn = np.random.default_rng(0).integers(6, 90, (5, 6)).tolist()
    compare(random_model("llama", num_key_value_heads=6), PROMPTS[0], SqueezeConfig(algorithm, budgets=drawn))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_one_kv_head(algorithm):
    budgets = [[5], [20], [31], [59], [100]]
    compare(random_model("llama", num_key_value_heads=1), PROMPTS[0], SqueezeConfig(algorithm, budgets=budgets))


@pytest.mark.parametrize("chunk", [16, 7])
@pytest.mark.parametrize("algorithm", ALGORITHMS[:2])
def test_a_prefill_in_chunks(algorithm, chunk):
    config = SqueezeConfig(algorithm, budgets=HEADS, prefill_chunk=chunk)
    compare(random_model("llama"), PROMPTS[0], config)


@pytest.mark.parametrize("chunk", [None, 16])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_prompts_do_not_notice_their_batch_and_nothing_is_padded(algorithm, chunk):
    if chunk and algorithm == "h2o":
        pytest.skip("not in chunks")
    model, (ids, mask) = random_model("llama"), BATCH
    with squeezed(model, SqueezeConfig(algorithm, budgets=HEADS, prefill_chunk=chunk)) as run:
        together = model.generate(ids, attention_mask=mask, **SETTINGS)[:, -40:]
        budgets, held = run.budgets, run.kv_bytes
        for row, prompt in enumerate(PROMPTS):
            assert model.generate(prompt[None], **SETTINGS)[0, -40:].equal(together[row])
            assert run.budgets.tolist() == budgets[row : row + 1].tolist()
    exact = budgets.sum() * 2 * 8 * 4
    assert exact <= held <= 1.02 * exact


def test_a_ragged_batch_by_layers_is_not_padded_either():
    model, (ids, mask) = random_model("llama"), BATCH
    with squeezed(model, SqueezeConfig("h2o", "0.2", "0.1")) as run:
        model.generate(ids, attention_mask=mask, **SETTINGS)
    exact = run.budgets.sum() * 2 * 2 * 8 * 4
    assert exact <= run.kv_bytes <= 1.02 * exact


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_heads_that_agree_are_budgets_by_layers(algorithm):
    model, (ids, mask), found = random_model("llama"), BATCH, []
    for budgets in ([7, 19, 40, 50, 90], [[7] * 2, [19] * 2, [40] * 2, [50] * 2, [90] * 2]):
        with squeezed(model, SqueezeConfig(algorithm, budgets=budgets)) as run:
            cache = run.cache(max_new_tokens=40)
            found.append((model.generate(ids, attention_mask=mask, past_key_values=cache, **SETTINGS), cache))
    assert found[0][0].equal(found[1][0])
    for one, other in zip(found[0][1].layers, found[1][1].layers, strict=True):
        assert one.keys.equal(other.keys) and one.values.equal(other.values) and one.scores.equal(other.scores)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("algorithm", [pytest.param("streaming", marks=pytest.mark.slow), "h2o"])
def test_compiled_steps_give_the_plain_steps_tokens(monkeypatch, algorithm, backend):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    model, (ids, mask), found = random_model("llama"), BATCH, []
    for compile in (False, True):
        with squeezed(model, SqueezeConfig(algorithm, budgets=HEADS, compile=compile)):
            found.append(model.generate(ids, attention_mask=mask, **SETTINGS))
    assert found[0].equal(found[1])
    assert not torch._dynamo.utils.counters["graph_break"]


@given(st.lists(st.lists(st.integers(1, 400), min_size=3, max_size=3), min_size=1, max_size=6))
def test_rows_lie_side_by_side_with_hardly_any_padding(budgets):
    budgets = np.array(budgets)
    layout = Layout(budgets)
    assert budgets.sum() <= layout.slots <= budgets.sum() * (1 + PADDING)
    taken = np.zeros(layout.slots, dtype=int)
    for sequence in range(len(budgets)):
        heads = 0
        for piece, budget in layout.pieces(sequence):
            assert piece.row == heads
            for row in range(piece.rows):
                start = piece.slot + row * piece.slots
                assert start == layout.starts[sequence, heads] and budgets[sequence, heads] == budget <= piece.slots
                taken[start : start + budget] += 1
                heads += 1
        assert heads == 3
    assert taken.max() == 1 and taken.sum() == budgets.sum()
    assert sorted(layout.order.tolist()) == list(range(budgets.size))
    rows = [
        start
        for group in layout.groups
        for start in range(group.slot, group.slot + group.rows * group.slots, group.slots)
    ]
    assert rows == layout.first.tolist() == layout.starts.ravel()[layout.order].tolist()


def test_equal_budgets_are_one_group_in_order_and_near_ones_become_one():
    assert Layout(np.full((4, 2), 50)).alike
    near = Layout(np.array([[100, 101], [101, 100]]))
    assert [(group.rows, group.slots) for group in near.groups] == [(4, 101)] and not near.alike
    apart = Layout(np.array([[100, 120], [120, 100]]))
    assert [(group.rows, group.slots) for group in apart.groups] == [(2, 100), (2, 120)]


@pytest.mark.parametrize(
    ("budgets", "said"),
    [
        ([[9, 9]] * 4 + [[9]], "budgets by head must be 2 in layer 4, one a KV head, and are 1"),
        ([[9, 9, 9]] * 5, "budgets by head must be 2 in layer 0, one a KV head, and are 3"),
        ([[9, 9]] * 4, "one entry an attention layer: 5, got 4"),
        ([[9, 9]] * 4 + [[9, 1]], "at least 2 tokens for h2o, got 1 in layer 4"),
        ([[9, 9]] * 4 + [9], "one number a layer, or in every layer one a KV head, and not both"),
        ([[9, 9]] * 4 + [[9, "9"]], "budgets must be whole numbers of tokens"),
    ],
)
def test_budgets_of_another_shape_are_a_sentence(budgets, said):
    with pytest.raises(InputError, match=said), squeezed(random_model("llama"), SqueezeConfig("h2o", budgets=budgets)):
        pass
