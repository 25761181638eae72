"""KL divergence and agreement between the full cache and a squeezed one, against a slow loop without any cache."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_model
from test_calibrate import save_curves
from tiny import save_rows, save_tiny

import pred
from squeeze import InputError, SqueezeConfig, squeezed
from squeeze.allocations.calibration import read_calibration
from squeeze.benchmarks import fidelity
from squeeze.benchmarks.longbench.data import generation_lengths
from squeeze.benchmarks.records import FidelityStats
from squeeze.report import command as report

PROMPTS = [torch.arange(3, 40), torch.arange(20, 90), torch.arange(5, 70)]
SETTINGS = {"max_new_tokens": 9, "eos_token_id": [198]}


def measured(model, prompts, settings, run, asked=0):
    """What is found on a batch."""
    full = fidelity.answer(model, prompts, settings)
    found = fidelity.compare(model, prompts, full, run, settings["max_new_tokens"], asked)
    return [{key: one[key] for key in ("kl", "agreement", "tokens")} for one in found]


def slow(model, prompt, run, steps, asked=0):
    """One prompt: the full model runs over the whole text again for every token, the squeezed one step by step."""
    text, cache, kl, same = prompt[None], run.cache(asked + steps), [], []
    context = len(prompt) - asked
    cut = model(text[:, :context], past_key_values=cache, use_cache=True).logits[0, -1]
    for place in range(context, len(prompt)):
        position, token = torch.tensor([[place]]), text[:, place : place + 1]
        cut = model(token, position_ids=position, past_key_values=cache, use_cache=True).logits[0, -1]
    for step in range(steps):
        full = model(text, use_cache=False).logits[0, -1]
        if step or asked:
            p, q = full.double().softmax(dim=0), cut.double().softmax(dim=0)
            kl.append(sum(a * (a / b).log() for a, b in zip(p, q, strict=True)).item())
            same.append((full.argmax() == cut.argmax()).item())
        token = full.argmax()[None, None]
        if token.item() in SETTINGS["eos_token_id"]:
            break
        text = torch.cat([text, token], dim=1)
        position = torch.tensor([[text.shape[1] - 1]])
        cut = model(token, position_ids=position, past_key_values=cache, use_cache=True).logits[0, -1]
    return kl, same


@torch.inference_mode()
@pytest.mark.parametrize("algorithm", ["sliding_window", "streaming", "h2o"])
def test_a_batch_is_compared_as_a_slow_loop_does(algorithm):
    model = random_model("llama")
    with squeezed(model, SqueezeConfig(algorithm=algorithm, ini_size="0.3", kv_class3="0.1")) as run:
        found = measured(model, PROMPTS, SETTINGS, run)
        for one, prompt in zip(found, PROMPTS, strict=True):
            kl, same = slow(model, prompt, run, SETTINGS["max_new_tokens"])
            assert one["tokens"] == len(kl) > 3
            assert one["kl"] == pytest.approx(sum(kl) / len(kl), rel=1e-3, abs=1e-5)
            assert one["kl"] > 1e-3
            assert one["agreement"] == sum(same) / len(same)


@torch.inference_mode()
@pytest.mark.parametrize("algorithm", ["streaming", "h2o", "snapkv(window=8)"])
def test_a_question_after_a_cut_context_is_compared_as_a_slow_loop_does(algorithm):
    """From the answer's first token on, which the question has changed already."""
    model, asked = random_model("llama"), 7
    with squeezed(model, SqueezeConfig(algorithm=algorithm, ini_size="0.4", kv_class3="0.2")) as run:
        found = measured(model, PROMPTS, SETTINGS, run, asked)
        for one, prompt in zip(found, PROMPTS, strict=True):
            kl, same = slow(model, prompt, run, SETTINGS["max_new_tokens"], asked)
            assert one["tokens"] == len(kl) > 4
            assert one["kl"] == pytest.approx(sum(kl) / len(kl), rel=1e-3, abs=1e-5)
            assert one["kl"] > 1e-3 and one["agreement"] == sum(same) / len(same)
        some = [SqueezeConfig(algorithm, size, "0.2") for size in ("0.4", "0.6", "0.9")]
        run.use(*some)
        for prompts, alone in ((PROMPTS[2:], found[2:]), (PROMPTS, found)):
            full, count = fidelity.answer(model, prompts, SETTINGS), len(prompts)
            together = fidelity.compare(model, prompts * 3, full, run, SETTINGS["max_new_tokens"], asked)
            for one, other in zip(together[:count], alone, strict=True):
                assert one["kl"] == pytest.approx(other["kl"], rel=1e-5, abs=1e-5)
                assert (one["tokens"], one["agreement"]) == (other["tokens"], other["agreement"])
            means = [sum(one["kl"] for one in together[at : at + count]) for at in range(0, 3 * count, count)]
            assert means[0] > means[1] > means[2]


@pytest.fixture
def configs(tmp_path):
    """`configs(algorithm)`: every allocation, at two sizes."""

    def make(algorithm):
        losses = np.random.default_rng(1).random((2, 2, 5, 2)).tolist()
        start_size = 4 if algorithm == "streaming" else None
        path = save_curves(tmp_path / "curves.json", algorithm=algorithm, start_size=start_size, loss=losses)
        by_class = [("squeeze", "0.3"), ("squeeze", "0.1"), ("squeeze-log", "0.1"), ("paper", "0.1")]
        return [
            *(SqueezeConfig(algorithm, "0.3", kv_class3, allocation) for allocation, kv_class3 in by_class),
            SqueezeConfig(algorithm, "0.3", allocation="calibrated", calibration=read_calibration(path)),
            SqueezeConfig(algorithm, "0.3", allocation="measured"),
            SqueezeConfig(algorithm, "0.6", "0.2"),
        ]

    return make


@torch.inference_mode()
@pytest.mark.parametrize(
    ("algorithm", "window"), [("sliding_window", None), ("streaming", None), ("h2o", None), ("h2o", 90)]
)
def test_configurations_together_are_compared_as_a_slow_loop_does(algorithm, window, configs):
    model = random_model("mistral", sliding_window=window)
    prompt = torch.randint(3, 199, (210,), generator=torch.Generator().manual_seed(2))
    some, steps = configs(algorithm), SETTINGS["max_new_tokens"]
    full = fidelity.answer(model, [prompt], SETTINGS)
    with squeezed(model, some[0]) as run:
        run.use(*some)
        together = fidelity.compare(model, [prompt] * len(some), full, run, steps)
        for one, config in zip(together, some, strict=True):
            run.use(config)
            [alone] = fidelity.compare(model, [prompt], full, run, steps)
            assert one["kl"] == pytest.approx(alone.pop("kl"), rel=1e-5, abs=1e-5)
            assert {key: one[key] for key in alone} == alone, "agreement, tokens, KV bytes and notes"
            kl, same = slow(model, prompt, run, steps)
            assert one["tokens"] == len(kl) > 3 and one["agreement"] == sum(same) / len(same)
            assert one["kl"] == pytest.approx(sum(kl) / len(kl), rel=1e-4, abs=1e-5)
        assert len({one["kl"] for one in together}) > 3, "their budgets differ"


def test_the_whole_cache_agrees_with_itself():
    model = random_model("mistral")
    with squeezed(model, SqueezeConfig(budgets=[999] * 5)) as run:
        for one in measured(model, PROMPTS, SETTINGS, run):
            assert one["kl"] == pytest.approx(0, abs=1e-5)
            assert one["agreement"] == 1.0


def test_an_answer_ends_at_its_stop_token():
    model = random_model("llama")
    model.lm_head.weight.data.zero_()  # gives the token 0 wherever it may
    with squeezed(model, SqueezeConfig(ini_size="0.5", kv_class3="0.2")) as run:
        stops = {"max_new_tokens": 9, "eos_token_id": [0]}
        [one] = measured(model, PROMPTS[:1], stops, run)
        assert one == {"kl": None, "agreement": None, "tokens": 0}
        [one] = measured(model, PROMPTS[:1], stops | {"min_new_tokens": 1}, run)
        assert one["tokens"] == 1, "another token came first"


def test_summary_with_and_without_tokens():
    measure, held = fidelity.Fidelity(), {"kv_bytes": 20.0, "full_kv_bytes": 100, "notes": []}
    nothing = FidelityStats(None, None, 0, **held)
    some = [FidelityStats(kl, 1 - kl, 4, **held) for kl in (0.1, 0.3)]
    found = measure.summarize([nothing, *some])
    assert (found["samples"], found["compared"], found["kept"], found["tokens"]) == (3, 2, 0.2, 8)
    assert found["kl"] == {"mean": 0.2, "low": 0.1, "high": 0.3}
    assert measure.describe([nothing, *some]).startswith("KL 0.2000 [0.1000, 0.3000], agreement 0.8000")
    assert "kl" not in measure.summarize([nothing])
    assert measure.describe([nothing]) == "no tokens to compare so far"


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(generation_lengths(), "samsum", 6)
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "tiny")
    save_rows(tmp_path / "data", count=3)
    flags = ["--model", "tiny", "--device", "cpu", "--dtype", "float32", "--data_dir", "data", "--fidelity"]
    sizes = ["--enable_squeeze", "--ini_size", "0.3", "--KV_class3", "0.1"]
    pred.main([*flags, *sizes])
    folder = Path("pred_Long/tiny/0.3/10/fidelity")
    lines = [json.loads(line) for line in (folder / "samsum.jsonl").read_text().splitlines()]
    assert [set(line) for line in lines] == [{"kl", "agreement", "tokens"}] * 3
    found = json.loads((folder / "run.json").read_text())
    assert found["settings"]["measure"] == "fidelity"
    assert found["datasets"]["samsum"]["kl"]["mean"] == pytest.approx(sum(line["kl"] for line in lines) / 3, abs=1e-5)
    first = (folder / "samsum.jsonl").read_bytes()
    assert "3 samples, KL " in capsys.readouterr().out
    pred.main([*flags, *sizes, "--batch_size", "2", "--overwrite"])
    assert (folder / "samsum.jsonl").read_bytes() != b"" and len(first.splitlines()) == 3
    assert report.rows(folder) == []
    with pytest.raises(InputError, match="--fidelity compares a squeezed cache with the full one"):
        pred.main(flags)
    with pytest.raises(InputError, match="--fidelity compares greedy answers"):
        pred.main([*flags, *sizes, "--temperature", "1"])
