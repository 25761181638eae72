"""The engine against a slow reference, step by step, and against the full cache where nothing is evicted."""

import importlib.util
import sys

import flash_reference
import numpy as np
import pytest
import torch
from conftest import ROOT, random_model
from reference import Reference
from torch.nn.utils.rnn import pad_sequence

from squeeze import SqueezeConfig, squeezed
from squeeze.engine import decode_attention, kernels, patch
from squeeze.engine import layer as layer_module
from squeeze.models.loading import load

STEPS = 64
#: Of the real model, whose reference takes a second a step.
FEW_STEPS = 12
ALGORITHMS = ("sliding_window", "streaming", "h2o")
ARCHITECTURES = ("llama", "mistral")
#: Of the embedded model, whose two folders differ in their names alone.
REAL = ("llama", pytest.param("mistral", marks=pytest.mark.slow))
ONE_IN_DETAIL = tuple(pytest.param(name, marks=[] if name == "h2o" else pytest.mark.slow) for name in ALGORITHMS)


@torch.no_grad()
def compare(model, prompt, config, steps=STEPS):
    """Greedy decoding with the engine and the reference on the same tokens; returns the run."""
    with squeezed(model, config) as run:
        cache = run.cache(max_new_tokens=steps)
        logits = model(prompt[None], past_key_values=cache, logits_to_keep=1).logits[0, -1]
        budgets = run.budgets[0].tolist()
        reference = Reference(model, run.config.algorithm, budgets, config.start_size)
        expected = reference.prefill(prompt, config.prefill_chunk)
        assert np.min(budgets) < len(prompt) + steps - 8, "eviction must start"
        for step in range(steps):
            difference = (logits.log_softmax(-1) - expected.log_softmax(-1)).abs().max().item()
            assert difference < 1e-3, f"step {step}: {difference}"
            assert logits.argmax() == expected.argmax(), f"step {step}"
            token = expected.argmax()
            logits = model(token.view(1, 1), past_key_values=cache).logits[0, -1]
            expected = reference.step(token)
        for layer, budget in zip(cache.layers, budgets, strict=True):
            held = np.broadcast_to(budget, layer.facts.kv_heads).sum()
            assert held <= len(layer.keys) <= 1.02 * held, "a layer holds its own budget, hardly more"
    return run


@pytest.mark.parametrize("kv_class3", ["0.3", "0.15"], ids=["uniform", "squeezed"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("architecture", REAL)
def test_real_model_matches_the_reference(embedded, prompts, architecture, algorithm, kv_class3):
    config = SqueezeConfig(algorithm, "0.3", kv_class3, "squeeze-log")
    run = compare(embedded(architecture), prompts[2], config, FEW_STEPS)
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


def test_sinks_that_come_after_the_prompt():
    """A prompt of two tokens, alone and beside one that evicts from the first step on: its sinks come later."""
    model = random_model("llama", seed=8)
    short, long = (torch.randint(3, 199, (n,), generator=torch.Generator().manual_seed(n)) for n in (2, 40))
    config = SqueezeConfig("streaming", budgets=[5, 6, 9, 12, 30])
    compare(model, short, config)
    ids = pad_sequence([short, long], batch_first=True, padding_side="left")
    mask = pad_sequence([torch.ones_like(short), torch.ones_like(long)], batch_first=True, padding_side="left")
    settings = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False}
    with squeezed(model, config):
        together = model.generate(ids, attention_mask=mask, **settings)[:, -40:]
        for row, prompt in enumerate((short, long)):
            assert model.generate(prompt[None], **settings)[0, -40:].equal(together[row])


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_own_window_in_prefill(algorithm, attn):
    """A window of 24 over a prompt of 300 tokens: prefill honours it, it caps budgets, and H2O's heavy hitters."""
    model = random_model("mistral", seed=6, sliding_window=24)
    prompt = torch.randint(3, 199, (300,), generator=torch.Generator().manual_seed(7))
    run = compare(model, prompt, SqueezeConfig(algorithm, "0.06", "0.05", attn=attn))
    assert run.budgets.max() <= 24
    run = compare(model, prompt, SqueezeConfig(algorithm, "0.5", "0.5", attn=attn))
    assert (run.budgets == 24).all()
    assert "unused" in run.notes[0][0]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("architecture", REAL)
def test_room_for_everything_gives_the_full_caches_tokens(embedded, prompts, architecture, algorithm):
    model = embedded(architecture)
    prompt, settings = prompts[1], {"max_new_tokens": 24, "do_sample": False}
    full = model.generate(prompt[None], **settings)
    budgets = [len(prompt) + 24] * model.config.num_hidden_layers
    with squeezed(model, SqueezeConfig(algorithm, budgets=budgets)):
        assert model.generate(prompt[None], **settings).tolist() == full.tolist()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("shorter", [-16, 100])
def test_room_for_a_windows_tokens_gives_the_full_caches(algorithm, shorter):
    """Left behind while decoding, or by the prompt; StreamingLLM's sinks stay, and its text is another then."""
    prompt = torch.randint(3, 199, (160,), generator=torch.Generator().manual_seed(11))
    window = len(prompt) - shorter
    model = random_model("mistral", seed=12, sliding_window=window)
    same = slice(None) if algorithm != "streaming" else slice(max(window, len(prompt) + 1))
    settings = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False}
    full = model.generate(prompt[None], **settings)[:, same]
    with squeezed(model, SqueezeConfig(algorithm, budgets=[len(prompt) + 32] * 5)) as run:
        assert model.generate(prompt[None], **settings)[:, same].equal(full)
    assert (run.budgets == window).all(), "the window caps budgets that are larger"


@pytest.fixture(scope="module")
def loaded():
    """The embedded model as `pred.py` runs it, its linear layers packed."""
    return load(ROOT / "models/SmolLM2-135M", torch.device("cpu"), torch.float32)[0]


@pytest.mark.parametrize("count", [3, pytest.param(16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("algorithm", ONE_IN_DETAIL)
def test_real_prompts_do_not_notice_their_batch(loaded, prompts, algorithm, count):
    """Prompts of 160 to 385 tokens in batches of 1, of a third and of all; only a near tie may break otherwise."""
    settings = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}
    alone, budgets = [], []
    with squeezed(loaded, SqueezeConfig(algorithm, "0.3", "0.15", "squeeze-log")) as run:
        for prompt in prompts[:count]:
            alone.append(loaded.generate(prompt[None], output_logits=True, return_dict_in_generate=True, **settings))
            budgets.append(run.budgets[0].tolist())
        for size in (count // 3 + 1, count):
            for first in range(0, count, size):
                batch = prompts[first : min(first + size, count)]
                ids = pad_sequence(batch, batch_first=True, padding_side="left")
                mask = pad_sequence([torch.ones_like(one) for one in batch], batch_first=True, padding_side="left")
                together = loaded.generate(ids, attention_mask=mask, **settings)[:, -16:]
                assert run.budgets.tolist() == budgets[first : first + size]
                for row, found in enumerate(together, start=first):
                    differs = (found != alone[row].sequences[0, -16:]).nonzero().flatten().tolist()
                    if differs:
                        best = alone[row].logits[differs[0]][0].topk(2).values
                        assert best[0] - best[1] < 1e-3, f"prompt {row}, batch size {size}, step {differs[0]}"


def split_map():
    """Where the layers of the embedded model go: over two GPUs where there are two, else over CPU and disk."""
    devices = [0, 1] if torch.cuda.device_count() > 1 else ["cpu", "disk"]
    rest = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    return dict.fromkeys(rest, devices[0]) | {f"model.layers.{layer}": devices[layer >= 15] for layer in range(30)}


@pytest.mark.parametrize("algorithm", ONE_IN_DETAIL)
def test_a_split_model_holds_each_buffer_where_its_layer_is(embedded, prompts, algorithm):
    config = SqueezeConfig(algorithm, "0.3", "0.15", "squeeze-log")
    settings = {"max_new_tokens": 6, "do_sample": False}
    prompt = prompts[3][None]
    with squeezed(embedded("llama"), config):
        expected = embedded("llama").generate(prompt, **settings)
    split, _ = load(ROOT / "models/SmolLM2-135M", torch.device("cpu"), torch.float32, device_map=split_map())
    assert set(map(str, split.hf_device_map.values())) in ({"cpu", "disk"}, {"0", "1"})
    keys = [None] * 30

    def watch(index):
        return lambda module, args, output: keys.__setitem__(index, output.device)

    handles = [layer.self_attn.k_proj.register_forward_hook(watch(i)) for i, layer in enumerate(split.model.layers)]
    with squeezed(split, config) as run:
        cache = run.cache(max_new_tokens=6)
        output = split.generate(prompt, past_key_values=cache, **settings)
    for handle in handles:
        handle.remove()
    assert output.tolist() == expected.tolist()
    for layer, device in zip(cache.layers, keys, strict=True):
        assert {t.device for t in (*layer.contents, layer.slot_positions, layer.rows)} == {device}


@pytest.mark.parametrize("kernel", ["sdpa by group", "sdpa", "flash", "varlen"])
@pytest.mark.parametrize("algorithm", ["sliding_window", "streaming"])
def test_fused_decoding_matches_the_reference(monkeypatch, algorithm, kernel):
    """That of CPUs in 16 bits, and those of GPUs: flash-attn's and `varlen_attn` as slow functions of their meaning.

    `varlen` is for rows of several lengths, which the others take group by group.
    """
    fused = decode_attention.scaled_dot_product_attention

    def laid_out(*args, **kwargs):
        """Its result in memory as GPUs' kernels leave it: tokens before heads."""
        return fused(*args, **kwargs).transpose(1, 2).contiguous().transpose(1, 2)

    other = "sdpa" if kernel == "varlen" else kernel
    monkeypatch.setattr(layer_module, "decode_kernel", lambda device, dtype, scored: other)
    monkeypatch.setattr(decode_attention, "scaled_dot_product_attention", laid_out)
    monkeypatch.setattr(kernels, "varlen_attn", flash_reference.varlen_attn if kernel == "varlen" else None)
    monkeypatch.setitem(sys.modules, "flash_attn", flash_reference)
    monkeypatch.setattr(patch, "self_check", lambda *_: None)  # which would do the same on a few tokens
    flash_reference.calls.clear()
    model = random_model("llama", seed=9)
    prompt = torch.randint(3, 199, (45,), generator=torch.Generator().manual_seed(1))
    compare(model, prompt, SqueezeConfig(algorithm, budgets=[9, 33, 45, 60, 5]))
    assert len(flash_reference.calls) == (STEPS * 5 if kernel == "flash" else 0)
    flash_reference.calls.clear()
    ids, mask = torch.stack([prompt, prompt]), torch.ones(2, 45, dtype=torch.long)
    mask[1, :25] = 0
    config = SqueezeConfig(algorithm, "0.5", "0.2")
    with squeezed(model, config):
        fused = model.generate(ids, attention_mask=mask, max_new_tokens=24, min_new_tokens=24, do_sample=False)
    groups = {"flash": 2, "varlen": 1}.get(kernel, 0)
    assert len(flash_reference.calls) == 23 * 5 * groups
    monkeypatch.undo()
    with squeezed(model, config):
        plain = model.generate(ids, attention_mask=mask, max_new_tokens=24, min_new_tokens=24, do_sample=False)
    assert plain.equal(fused)


def test_the_kernel_is_chosen_by_device_dtype_and_what_is_installed(monkeypatch):
    asked = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: asked.append(name))
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert layer_module.decode_kernel(cpu, torch.float32, scored=False) == "grouped"
    assert layer_module.decode_kernel(cpu, torch.bfloat16, scored=True) == "grouped"
    assert layer_module.decode_kernel(cpu, torch.bfloat16, scored=False) == "sdpa by group"
    assert layer_module.decode_kernel(gpu, torch.bfloat16, scored=True) == "grouped"
    assert asked == [] and "flash_attn" not in sys.modules, "on a CPU nobody looks for it"
    assert layer_module.decode_kernel(gpu, torch.bfloat16, scored=False) == "sdpa"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert layer_module.decode_kernel(gpu, torch.bfloat16, scored=False) == "flash"
    assert layer_module.decode_kernel(gpu, torch.float32, scored=False) == "grouped"
    assert "flash_attn" not in sys.modules
