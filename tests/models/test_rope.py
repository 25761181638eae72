"""RoPE whose angles depend on the length: each sequence by its own, whatever its batch, chunks and earlier ones."""

from copy import deepcopy

import pytest
import torch
from conftest import random_model
from tiny import save_tiny

from squeeze import InputError, SqueezeConfig, squeezed
from squeeze.benchmarks.fidelity import answer, compare
from squeeze.engine.loss_curves import measure
from squeeze.generation.generate import generate, greedy, pad_left
from squeeze.models import loading
from squeeze.models.rope import LengthwiseRope, depends_on_length, unscaled_length

ROPES = {
    "dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        "max_position_embeddings": 64,
    },
    "longrope": {
        "rope_parameters": {
            **{"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0},
            **{"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 3.0, 4.0]},
        },
        "max_position_embeddings": 256,
    },
}
IDS = torch.randint(3, 199, (1, 100), generator=torch.Generator().manual_seed(1))
PROMPTS = [IDS[0], IDS[0, :30], IDS[0, 10:80], IDS[0, :64]]


def made(name):
    return random_model("llama", **deepcopy(ROPES[name]))


def logits(model, ids, **settings):
    settings = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None} | settings
    return torch.stack(model.generate(ids, return_dict_in_generate=True, output_logits=True, **settings).logits)


@pytest.mark.parametrize("name", ROPES)
def test_angles_are_those_of_transformers_for_the_first_sequence_alone(name):
    for length in (30, 64, 65, 100, 200):
        theirs, ours = made(name).model.rotary_emb, made(name).model.rotary_emb
        positions, states = torch.arange(length)[None], torch.zeros(1, length, 48)
        for one, other in zip(theirs(states, positions), LengthwiseRope(ours)(states, positions), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("name", ROPES)
def test_a_batch_and_what_came_before_change_nothing(name):
    """The longest first: transformers' own `dynamic` would go on with its angles."""
    rotary = LengthwiseRope(made(name).model.rotary_emb)
    fresh = [LengthwiseRope(made(name).model.rotary_emb) for _ in range(3)]
    alone = [
        each(torch.zeros(1, 1, 48), torch.arange(length)[None, -1:])
        for each, length in zip(fresh, (200, 100, 30), strict=True)
    ]
    together = rotary(torch.zeros(3, 1, 48), torch.tensor([[199], [99], [29]]))
    for part in (0, 1):
        assert torch.equal(together[part], torch.cat([one[part] for one in alone]))


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("chunk", [None, 30, 7])
def test_nothing_evicted_gives_the_models_own_logits(name, chunk):
    want = logits(made(name), IDS)
    model = made(name)
    config = SqueezeConfig("sliding_window", budgets=[1000] * 5, prefill_chunk=chunk)
    with squeezed(model, config):
        for _ in range(2):
            torch.testing.assert_close(logits(model, IDS), want, atol=1e-3, rtol=1e-3)
    assert "forward" not in vars(model.model.rotary_emb)


@pytest.mark.parametrize("name", ROPES)
def test_a_loaded_model_answers_each_prompt_as_it_does_alone(tmp_path, name):
    """Full cache and squeezed, in a batch of other lengths, after longer prompts, and with a prefill taken over."""
    folder = save_tiny(tmp_path / "m", **deepcopy(ROPES[name]))
    alone = []
    for prompt in PROMPTS:
        fresh, _ = loading.load(folder, torch.device("cpu"), torch.float32)
        alone += generate(fresh, [prompt], greedy(12), None)[0]
    model, _ = loading.load(folder, torch.device("cpu"), torch.float32)
    together, _ = generate(model, PROMPTS, greedy(12), None)
    assert [one.tolist() for one in together] == [one.tolist() for one in alone]
    with squeezed(model, SqueezeConfig("h2o", budgets=[1000] * 5)) as run:
        run.share_prefills = True
        for _ in range(2):
            tokens, mask = pad_left(model, PROMPTS)
            found = model.generate(tokens, attention_mask=mask, **greedy(12))[:, tokens.shape[1] :]
            for one, expected in zip(found, alone, strict=True):
                assert one[: len(expected)].tolist() == expected.tolist()
        assert run.shared_seconds > 0
        distances = compare(model, PROMPTS, answer(model, PROMPTS, greedy(12)), run, 12)
        assert all(one["kl"] < 1e-6 for one in distances)
    assert isinstance(model.model.rotary_emb.forward, LengthwiseRope), "the full cache goes on with it"


@pytest.mark.parametrize("name", ROPES)
def test_what_needs_fixed_angles_is_refused(name):
    model = made(name)
    assert depends_on_length(model.config) and unscaled_length(model.config) == 64
    with (
        pytest.raises(InputError, match="fixed angles"),
        squeezed(model, SqueezeConfig("streaming", 0.5, 0.5)),
    ):
        pass
    with squeezed(model, SqueezeConfig("h2o", "0.5", allocation="measured")) as run:
        with pytest.raises(InputError, match="too long to measure loss curves on: beyond 64 tokens"):
            measure(run, IDS[0].repeat(2), [1])
        with pytest.raises(InputError, match="too long to measure"):
            model.generate(IDS.repeat(1, 2), max_new_tokens=2)
    assert not depends_on_length(random_model("llama").config)
