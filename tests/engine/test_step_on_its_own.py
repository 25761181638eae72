"""A decode step asks the host for nothing: on a GPU every such question waits for all that was launched before."""

import pytest
import torch
from conftest import random_model
from torch.profiler import ProfilerActivity, profile

from squeeze import SqueezeConfig, squeezed
from squeeze.evictors import EVICTORS

#: What reads a tensor's numbers.
QUESTIONS = ("aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::nonzero")


def questions(step):
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        step()
    return {event.key for event in seen.key_averages() if event.key in QUESTIONS}


@pytest.mark.parametrize("per", ["layer", "adakv"])
@pytest.mark.parametrize("name", EVICTORS.names)
@torch.inference_mode()
def test_a_step_reads_no_numbers(name, per):
    if per == "adakv" and name in ("sliding_window", "streaming", "tova"):
        pytest.skip("its heads have no scores of their own")
    model = random_model("llama")
    ids = torch.randint(3, 199, (2, 60), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    algorithm = "snapkv(window=8)" if name == "snapkv" else name
    with squeezed(model, SqueezeConfig(algorithm, "0.6", "0.3", per=per)) as run:
        cache, positions = run.cache(8), (mask.cumsum(dim=1) - 1).clamp(min=0)
        model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)

        def step():
            nonlocal mask, positions
            mask, positions = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1), positions[:, -1:] + 1
            model(ids[:, :1], attention_mask=mask, position_ids=positions, past_key_values=cache)

        step()
        assert questions(step) == set()


def test_questions_are_seen():
    assert questions(lambda: torch.ones(3).sum().item()) >= {"aten::item"}
    assert questions(lambda: torch.ones(3)[torch.ones(3) > 0]) == {"aten::nonzero"}
