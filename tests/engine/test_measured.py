"""Budgets from loss curves that are measured on each prompt's own last tokens."""

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_model
from test_calibrate import PROMPT, slow_loss
from test_patch import left_pad
from tiny import save_rows, save_tiny

import pred
from squeeze import InputError, PromptFacts, SqueezeConfig, squeezed
from squeeze.allocations import curves
from squeeze.benchmarks.longbench.data import generation_lengths
from squeeze.engine import loss_curves
from squeeze.engine.interface import current_cache
from squeeze.sweep import command as sweep

ALGORITHMS = ("sliding_window", "streaming", "h2o")
SETTINGS = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_budgets_are_those_of_the_prompts_own_curves(algorithm):
    model, prompts, share = random_model("llama"), [PROMPT, PROMPT[20:220]], Fraction(3, 10)
    expected = []
    with squeezed(model, SqueezeConfig(algorithm, "0.3", "0.3")) as run:
        for prompt in prompts:
            losses = np.array(loss_curves.measure(run, prompt, [share]))
            facts = PromptFacts.of(run.layers, len(prompt), 12, run.evictor.minimum_budget)
            found = curves.budgets(loss_curves.MULTIPLES, losses, share, facts).tokens
            alone = curves.greedy(loss_curves.MULTIPLES, losses[0], share, facts)
            assert all(abs(one - (more + sum(alone) / 5) / 2) < 1 for one, more in zip(found, alone, strict=True))
            expected.append(found)
    assert expected[0] != [69] * 5 and sum(expected[0]) == 345
    ids, mask = left_pad(prompts)
    config = SqueezeConfig(algorithm, "0.3", allocation="measured")
    with squeezed(model, config) as run:
        tokens = model.generate(ids, attention_mask=mask, **SETTINGS)[:, -12:]
        assert run.budgets.tolist() == expected
        assert set(run.classes.flatten()) <= {1, 2, 3} and run.similarities.shape == (2, 5)
        assert run.config == config and run.kept_prefill is None and not run.share_prefills
    for row, budgets in enumerate(expected):
        with squeezed(model, SqueezeConfig(algorithm, budgets=budgets)):
            assert model.generate(prompts[row][None], **SETTINGS)[0, -12:].equal(tokens[row])


def test_a_prefill_that_is_shared_is_still_there_after_measuring():
    model = random_model("llama")
    with squeezed(model, SqueezeConfig("h2o", "0.3", "0.1")) as run, torch.no_grad():
        run.share_prefills = True
        model(PROMPT[None], past_key_values=run.cache(4))
        kept = run.kept_prefill
        run.use(SqueezeConfig("h2o", "0.3", allocation="measured"))
        model(PROMPT[None], past_key_values=run.cache(4))
        assert run.kept_prefill is kept and run.shared_seconds > 0


def test_curves_are_measured_before_the_prefill_begins(monkeypatch):
    """No pass runs inside another, and a kept prefill that does not serve is let go of before there is a new one."""
    model, original, passes = random_model("llama"), loss_curves.measure, []
    with squeezed(model, SqueezeConfig("h2o", "0.3", "0.1")) as run, torch.no_grad():
        run.share_prefills = True
        model(PROMPT[None, 20:], past_key_values=run.cache(4))
        run.use(SqueezeConfig("h2o", "0.3", allocation="measured"))

        def measure(*given, **more):
            passes.append((current_cache(), run.kept_prefill))
            return original(*given, **more)

        monkeypatch.setattr(loss_curves, "measure", measure)
        model(PROMPT[None], past_key_values=run.cache(4))
        assert passes == [(None, None)]
        assert run.kept_prefill.inputs.equal(PROMPT[None]) and run.shared_seconds == 0


def test_curves_of_a_model_with_a_window_of_its_own():
    """The full cache sees no more than the window, and no layer is given more."""
    model = random_model("mistral", sliding_window=70)
    length = len(PROMPT) - loss_curves.TAIL
    with squeezed(model, SqueezeConfig("h2o", "0.3", "0.3")) as run:
        [losses] = loss_curves.measure(run, PROMPT, [Fraction(3, 10)])
    for layer, index, tokens in ((0, 0, 13), (2, 3, 70), (3, 4, 70)):
        budgets = [54] * 5
        budgets[layer] = tokens
        expected = slow_loss(model, "h2o", budgets, PROMPT[:length], PROMPT[length:])
        assert losses[layer][index] == pytest.approx(expected, rel=1e-3)


def test_bad_input_is_a_sentence():
    model = random_model("llama")
    config = SqueezeConfig("h2o", "0.3", allocation="measured")
    with squeezed(model, config):
        with pytest.raises(InputError, match=r"191 tokens is too short to measure loss curves on: .* 192"):
            model.generate(PROMPT[None, :191], **SETTINGS)
        with pytest.raises(InputError, match="needs a prompt's token ids, and got embeddings"):
            model.generate(inputs_embeds=model.get_input_embeddings()(PROMPT[None]), **SETTINGS)
    for more, said in (
        ({"kv_class3": "0.1"}, r"KV_class3 is not for the allocation measured, .* leave it out"),
        ({"ini_size": None}, "ini_size is missing: the allocation measured needs it"),
        ({"prefill_chunk": 16}, "prefill_chunk cannot be used with the allocation measured"),
    ):
        with pytest.raises(InputError, match=said):
            SqueezeConfig(**{"ini_size": "0.3", "allocation": "measured"} | more)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setitem(generation_lengths(), "samsum", 6)
    save_tiny(tmp_path / "tiny")
    save_rows(tmp_path / "data", count=2, context="Ann: hey, did you get the tickets?\n" * 30)
    monkeypatch.chdir(tmp_path)


COMMON = ["--model", "tiny", "--device", "cpu", "--dtype", "float32", "--data_dir", "data", "--enable_squeeze"]


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_runs_by_hand_and_in_a_sweep(place, capsys):
    Path("grid.yaml").write_text(
        "{model: tiny, data_dir: data, device: cpu, dtype: float32, ini_size: 0.3, allocation: measured, fidelity: "
        "[false, true]}"
    )
    sweep.sweep(["grid.yaml", "--dry_run"])
    plan = capsys.readouterr().out
    sweep.sweep(["grid.yaml"])
    folder = "pred_Long/tiny/measured/0.3"
    records = lines(f"{folder}/samples/samsum.jsonl")
    tokens = [one["stats"]["prompt_tokens"] for one in records]
    # Once for the predictions, once for the comparison.
    assert f"{2 * sum(loss_curves.cost(length, 1, 5) for length in tokens):,} more tokens are run" in plan
    for one in records:
        assert sum(one["stats"]["budgets"]) == int(5 * Fraction(3, 10) * one["stats"]["prompt_tokens"])
        assert len(set(one["stats"]["budgets"])) > 1
    swept = {name: Path(folder, name).read_bytes() for name in ("samsum.jsonl", "fidelity/samsum.jsonl")}
    for more in ([], ["--fidelity"]):
        pred.main([*COMMON, "--ini_size", "0.3", "--allocation", "measured", "--overwrite", *more])
    assert {name: Path(folder, name).read_bytes() for name in swept} == swept
    assert json.loads(Path(folder, "run.json").read_text())["settings"]["allocation"] == "measured"


def test_a_run_in_chunks(place, capsys):
    """Another method than the whole prefill, with the same budgets; its plan counts what a chunk holds."""
    uniform = [*COMMON, "--ini_size", "0.3", "--KV_class3", "0.3"]
    pred.main([*uniform, "--prefill_chunk", "16", "--fidelity"])
    folder = Path("pred_Long/tiny/0.3/30/fidelity")
    assert json.loads((folder / "run.json").read_text())["settings"]["prefill_chunk"] == 16
    chunks = lines(folder / "samsum.jsonl")
    with pytest.raises(InputError, match="holds a run with prefill_chunk 16"):
        pred.main([*uniform, "--fidelity"])
    pred.main([*uniform, "--fidelity", "--overwrite"])
    whole = lines(folder / "samsum.jsonl")
    assert [one["tokens"] for one in chunks] == [one["tokens"] for one in whole]
    assert all(one["kl"] > 0 for one in chunks) and chunks != whole
    grid = "{model: tiny, data_dir: data, device: cpu, dtype: float32, ini_size: 0.3%s}"
    found = []
    for more in ("", ", prefill_chunk: 16"):
        Path("grid.yaml").write_text(grid % more)
        sweep.sweep(["grid.yaml", "--dry_run"])
        [row] = [line for line in capsys.readouterr().out.splitlines() if "| pred_Long/tiny/0.3/30" in line]
        found.append([cell.strip() for cell in row.split("|")][7:9])
    (kept, whole_prefill), (chunk_kept, chunk_prefill) = found
    assert chunk_kept == kept and float(kept) <= float(chunk_prefill) < float(whole_prefill)
