"""The engine against a slow reference, step by step, and against the full cache where nothing is evicted."""

import numpy as np
import pytest
import torch
from conftest import random_model
from reference import Reference

from squeeze import SqueezeConfig, squeezed

STEPS = 64
ALGORITHMS = ("sliding_window", "streaming", "h2o")
ARCHITECTURES = ("llama", "mistral")


@torch.no_grad()
def compare(model, prompt, config):
    """Greedy decoding with the engine and the reference on the same tokens; returns the run."""
    with squeezed(model, config) as run:
        cache = run.cache(max_new_tokens=STEPS)
        logits = model(prompt[None], past_key_values=cache, logits_to_keep=1).logits[0, -1]
        budgets = run.budgets[0].tolist()
        reference = Reference(model, run.config.algorithm, budgets, config.start_size)
        expected = reference.prefill(prompt)
        assert min(budgets) < len(prompt) + STEPS - 8, "eviction must start"
        for step in range(STEPS):
            difference = (logits.log_softmax(-1) - expected.log_softmax(-1)).abs().max().item()
            assert difference < 1e-3, f"step {step}: {difference}"
            assert logits.argmax() == expected.argmax(), f"step {step}"
            token = expected.argmax()
            logits = model(token.view(1, 1), past_key_values=cache).logits[0, -1]
            expected = reference.step(token)
        for layer, budget in zip(cache.layers, budgets, strict=True):
            assert layer.keys.shape[2] == budget, "a layer holds its own budget, never more"
    return run


@pytest.mark.parametrize("kv_class3", ["0.3", "0.15"], ids=["uniform", "squeezed"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_real_model_matches_the_reference(embedded, prompts, architecture, algorithm, kv_class3):
    config = SqueezeConfig(algorithm, "0.3", kv_class3, "squeeze-log")
    run = compare(embedded(architecture), prompts[2], config)
    spread = np.ptp(run.budgets)  # uniform budgets differ by the rounding alone
    assert spread > 0.2 * len(prompts[2]) if kv_class3 == "0.15" else spread <= 1


@pytest.mark.parametrize("kv_class3", ["0.4", "0.1"], ids=["uniform", "squeezed"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_random_model_matches_the_reference(architecture, algorithm, kv_class3):
    prompt = torch.randint(3, 199, (45,), generator=torch.Generator().manual_seed(1))
    compare(random_model(architecture), prompt, SqueezeConfig(algorithm, "0.4", kv_class3))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_eviction_that_starts_during_decode(algorithm):
    """Budgets above the prompt's length: buffers fill first, and only then is a token evicted."""
    prompt = torch.randint(3, 199, (20,), generator=torch.Generator().manual_seed(2))
    compare(random_model("llama", seed=3), prompt, SqueezeConfig(algorithm, budgets=[5, 19, 20, 31, 60]))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_smallest_budgets(algorithm):
    smallest = {"sliding_window": 1, "streaming": 3, "h2o": 2}[algorithm]
    prompt = torch.randint(3, 199, (20,), generator=torch.Generator().manual_seed(4))
    config = SqueezeConfig(algorithm, budgets=[smallest, smallest + 1, 9, smallest, 30], start_size=2)
    compare(random_model("mistral", seed=5), prompt, config)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_own_window_in_prefill(algorithm, attn):
    """A window of 24 over a prompt of 300 tokens: prefill honours it, it caps budgets, what is kept is attended."""
    model = random_model("mistral", seed=6, sliding_window=24)
    prompt = torch.randint(3, 199, (300,), generator=torch.Generator().manual_seed(7))
    run = compare(model, prompt, SqueezeConfig(algorithm, "0.06", "0.05", attn=attn))
    assert run.budgets.max() <= 24
    run = compare(model, prompt, SqueezeConfig(algorithm, "0.5", "0.5", attn=attn))
    assert (run.budgets == 24).all()
    assert "unused" in run.notes[0]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_room_for_everything_gives_the_full_caches_tokens(embedded, prompts, architecture, algorithm):
    model = embedded(architecture)
    for prompt in prompts[:2]:
        full = model.generate(prompt[None], max_new_tokens=32, do_sample=False)
        budgets = [len(prompt) + 32] * model.config.num_hidden_layers
        with squeezed(model, SqueezeConfig(algorithm, budgets=budgets)):
            assert model.generate(prompt[None], max_new_tokens=32, do_sample=False).tolist() == full.tolist()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_window_model_gives_the_full_caches_tokens_up_to_the_window(embedded, prompts, algorithm):
    model = embedded("mistral")
    prompt = prompts[0]
    window = model.config.sliding_window = len(prompt) + 16
    try:
        full = model.generate(prompt[None], max_new_tokens=32, do_sample=False)[:, :window]
        with squeezed(model, SqueezeConfig(algorithm, budgets=[len(prompt) + 32] * 30)) as run:
            assert model.generate(prompt[None], max_new_tokens=32, do_sample=False)[:, :window].equal(full)
        assert (run.budgets == window).all(), "the window caps budgets that are larger"
    finally:
        model.config.sliding_window = None
