"""Evictors alone: what they keep and where they put a token, against plain lists."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from squeeze import H2O, SlidingWindow, StreamingLLM
from squeeze.evictors import make_evictor

NONE = torch.empty(0)


def play(evictor, length, budget, steps):
    """Slots of one sequence after a prompt and `steps` new tokens: the position that each slot holds."""
    kept = evictor.keep(length, budget, NONE)[0].tolist()
    slots = dict(enumerate(kept))
    for position in range(length, length + steps):
        slot = evictor.slot(torch.tensor([[position]]), torch.tensor([[budget]]), NONE, NONE).item()
        assert 0 <= slot < budget
        slots[slot] = position
        assert sorted(slots) == list(range(len(slots))), "filled slots are a prefix"
    return slots


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 60), st.integers(1, 40), st.integers(0, 80))
def test_sliding_window_holds_the_last_tokens(length, budget, steps):
    slots = play(SlidingWindow(), length, budget, steps)
    assert sorted(slots.values()) == list(range(length + steps))[-budget:]


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 5), st.integers(1, 60), st.integers(1, 40), st.integers(0, 80))
def test_streaming_holds_the_sinks_and_the_last_tokens(sinks, length, recent, steps):
    slots = play(StreamingLLM(sinks), length, sinks + recent, steps)
    seen = list(range(length + steps))
    expected = seen if len(seen) <= sinks + recent else seen[:sinks] + seen[-recent:]
    assert sorted(slots.values()) == expected
    assert [slots[i] for i in range(min(sinks, len(slots)))] == expected[:sinks]


def test_streaming_in_a_buffer_that_never_fills():
    """Three tokens of prompt, two new ones, and four sinks: the ring has no room, and needs none."""
    assert play(StreamingLLM(4), length=1, budget=3, steps=2) == {0: 0, 1: 1, 2: 2}


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 30), st.integers(2, 20), st.randoms(use_true_random=False))
def test_h2o_keeps_heavy_hitters_and_the_recent_window_per_head(length, budget, random):
    values = [random.sample(range(1000), length) for _ in range(2)]
    kept = H2O().keep(length, budget, torch.tensor(values, dtype=torch.float32)).tolist()
    for head, row in enumerate(values):
        recent = list(range(length))[-(budget // 2) :]
        rest = sorted(range(length - len(recent)), key=lambda p: -row[p])[: budget - budget // 2]
        assert kept[head] == (list(range(length)) if length <= budget else sorted(rest) + recent)


def test_h2o_evicts_the_lowest_score_outside_the_recent_window():
    held = torch.tensor([[[3, 9, 7, 8, 5, -1], [3, 9, 7, 8, 5, -1]]], dtype=torch.int32)
    scores = torch.tensor([[[0.9, 0.0, 0.2, 0.3, 0.4, 0.0], [0.1, 0.0, 0.2, 0.3, 0.4, 0.0]]])
    at = lambda budget: H2O().slot(torch.tensor([[10]]), torch.tensor([[budget]]), held, scores).tolist()  # noqa: E731
    assert at(5) == [[2, 0]], "the window is 9 and the new token: 9 is safe although its score is the lowest"
    assert at(2) == [[1, 1]], "the window is the new token alone"
    assert at(11) == [[10, 10]], "a free slot"


def test_names():
    assert make_evictor("sliding_window", 4).minimum_budget == 1
    assert make_evictor("streaming", 7).minimum_budget == 8
    assert make_evictor("h2o", 4).minimum_budget == 2
