"""Sampling: the distribution it should have, and the same tokens in any batch."""

import pytest
import torch
from conftest import random_model

from squeeze.generation.generate import generate
from squeeze.generation.sampling import generator, sampler


def test_tokens_have_the_models_distribution():
    """Against `softmax` with temperature and top-p worked out by hand."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    process = sampler(2.0, 0.85, [generator(1, 0)])
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[process(torch.zeros(1, 1, dtype=torch.long), logits[None])[0].argmax()] += 1
    probabilities = (logits / 2).softmax(dim=0)  # 0.46, 0.28, 0.17, 0.10: the first three make 90%
    expected = probabilities[:3] / probabilities[:3].sum()
    assert counts[3] == 0
    assert counts[:3] / 4000 == pytest.approx(expected, abs=0.03)


def test_temperature_0_is_greedy():
    assert len(sampler(0.0, 1.0, [])) == 0


def test_a_sample_does_not_depend_on_its_batch():
    model = random_model("llama")
    prompts = [torch.arange(3, 20 + 4 * index) for index in range(3)]
    settings = {"max_new_tokens": 12, "do_sample": False}

    def sampled(indices, seed):
        noise = sampler(1.0, 1.0, [generator(seed, index) for index in indices])
        outputs, _ = generate(model, [prompts[index] for index in indices], settings, None, noise)
        return [output.tolist() for output in outputs]

    together = sampled([0, 1, 2], 42)
    assert together == [sampled([index], 42)[0] for index in (0, 1, 2)] == sampled([2, 1, 0], 42)[::-1]
    assert together != sampled([0, 1, 2], 43)
    greedy, _ = generate(model, prompts, settings, None)
    assert together != [output.tolist() for output in greedy]


def test_every_sample_of_every_seed_has_random_numbers_of_its_own():
    drawn = {torch.rand(1, generator=generator(seed, index)).item() for seed in (1, 2, 11) for index in (0, 1, 11)}
    assert len(drawn) == 9
    assert generator(1, 0).initial_seed() == generator(1, 0).initial_seed() != generator(10, 0).initial_seed()
