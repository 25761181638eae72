"""Loss curves against a slow loop, the command that measures them, and runs whose budgets come from them."""

import hashlib
import importlib
import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, random_model
from tiny import save_rows, save_tiny

import pred
from squeeze import InputError, PromptFacts, SqueezeConfig, calibrate, squeezed
from squeeze.allocations import curves
from squeeze.allocations.base import heads_of
from squeeze.allocations.calibration import read_calibration
from squeeze.benchmarks.longbench.data import generation_lengths
from squeeze.engine import loss_curves, patch
from squeeze.engine.squeezed_model import SqueezedModel
from squeeze.models import loading, sources
from squeeze.models.cached_layers import OwnLayer
from squeeze.runs.resolve import with_curves
from squeeze.storage import paths

evaluate = importlib.import_module("eval")
ALGORITHMS = ("sliding_window", "streaming", "h2o")
PROMPT = torch.arange(3, 190).repeat(2)[:230]


@torch.inference_mode()
def slow_loss(model, algorithm, budgets, context, tail):
    """One configuration at a time, against the full model that reads everything again for every token."""
    losses = []
    with squeezed(model, SqueezeConfig(algorithm, budgets=budgets)) as run:
        cache = run.cache(len(tail))
        model(context[None], past_key_values=cache, use_cache=True)
        for step, token in enumerate(tail):
            text = torch.cat([context, tail[: step + 1]])
            full = model(text[None], use_cache=False).logits[0, -1].double().softmax(dim=0)
            position = torch.tensor([[len(text) - 1]])
            cut = model(token[None, None], position_ids=position, past_key_values=cache, use_cache=True)
            losses.append((full * (full / cut.logits[0, -1].double().softmax(dim=0)).log()).sum().item())
    return sum(losses) / len(losses)


@pytest.mark.parametrize("at_once", [2, 5])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_curve_is_what_a_slow_loop_measures(monkeypatch, algorithm, at_once):
    model, share, told = random_model("llama"), Fraction(3, 10), []
    monkeypatch.setitem(loss_curves.LAYERS_AT_ONCE, "cpu", at_once)
    with squeezed(model, SqueezeConfig(algorithm, "0.3", kv_class3="0.3")) as run:
        [curves] = loss_curves.measure(run, PROMPT, [share], told.append)
    length = len(PROMPT) - loss_curves.TAIL
    assert np.array(curves).shape == (5, len(loss_curves.MULTIPLES))
    assert sum(told) == loss_curves.cost(len(PROMPT), 1, 5)
    for layer, index in ((0, 0), (4, 3), (3, 2)):
        budgets = [int(share * length)] * 5
        budgets[layer] = int(loss_curves.MULTIPLES[index] * share * length)
        expected = slow_loss(model, algorithm, budgets, PROMPT[:length], PROMPT[length:])
        assert expected > 1e-3
        assert curves[layer][index] == pytest.approx(expected, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(("algorithm", "at_once"), [("sliding_window", 3), ("streaming", 16), ("h2o", 3)])
def test_a_heads_curve_is_what_a_slow_loop_measures(monkeypatch, algorithm, at_once):
    model, share = random_model("llama"), Fraction(3, 10)
    monkeypatch.setitem(loss_curves.LAYERS_AT_ONCE, "cpu", at_once)
    with squeezed(model, SqueezeConfig(algorithm, "0.3", kv_class3="0.3")) as run:
        [curves] = loss_curves.measure(run, PROMPT, [share], per_head=True)
    length = len(PROMPT) - loss_curves.TAIL
    assert np.array(curves).shape == (10, len(loss_curves.MULTIPLES))
    for part, index in ((1, 0), (8, 3), (6, 2)):
        budgets = [[int(share * length)] * 2 for _ in range(5)]
        budgets[part // 2][part % 2] = int(loss_curves.MULTIPLES[index] * share * length)
        expected = slow_loss(model, algorithm, budgets, PROMPT[:length], PROMPT[length:])
        assert expected > 1e-3
        assert curves[part][index] == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_cuts_that_do_not_fit_into_memory_together_run_apart(monkeypatch):
    with squeezed(random_model("llama"), SqueezeConfig("h2o", "0.3", kv_class3="0.3")) as run:
        [expected] = loss_curves.measure(run, PROMPT, [Fraction(3, 10)])
        fork, sizes = run.fork, []

        def small(held, budgets, tokens, running):
            if len(budgets) > 6:
                raise torch.OutOfMemoryError("CUDA out of memory")
            sizes.append(len(budgets))
            return fork(held, budgets, tokens, running)

        monkeypatch.setattr(run, "fork", small)
        [found] = loss_curves.measure(run, PROMPT, [Fraction(3, 10)])
        assert np.array(found) == pytest.approx(np.array(expected), rel=1e-3, abs=1e-5)
        assert sizes == [1, 5, 5, 5, 5], "all of the 20 are run, as many as fit"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A tiny model, and rows of two data sets long enough to hold out a tail."""
    monkeypatch.setattr(paths, "home", lambda: tmp_path)
    for dataset in ("samsum", "qasper"):
        monkeypatch.setitem(generation_lengths(), dataset, 8)
    save_tiny(tmp_path / "tiny")
    for dataset in ("samsum", "qasper"):
        save_rows(tmp_path / "data", dataset=dataset, count=2, context="Ann: hey, did you get the tickets?\n" * 30)
    monkeypatch.chdir(tmp_path)
    return tmp_path


COMMON = ["--model", "tiny", "--device", "cpu", "--dtype", "float32", "--data_dir", "data"]


def measure(*flags):
    calibrate.calibrate([*COMMON, "--datasets", "samsum,qasper", "--ini_size", "0.2", "0.4", *flags])


def predict(*flags):
    pred.main([*COMMON, "--enable_squeeze", "--allocation", "calibrated", "--ini_size", "0.3", *flags])


def test_the_command_and_runs_with_its_budgets(place, capsys, monkeypatch):
    measure()
    path = Path("config/calibration/tiny-streaming.json")
    said = capsys.readouterr().out
    assert said.startswith("2 prompts, ") and "tokens to run" in said
    assert f"{path}: loss curves of 5 attention layers at 2 sizes, 2 prompts" in said
    content = json.loads(path.read_text())
    assert [one["dataset"] for one in content["prompts"]] == ["samsum", "qasper"]
    measured = [
        json.loads(line)["loss"] for line in Path("calibration/tiny/streaming/curves.jsonl").read_text().splitlines()
    ]
    assert np.array(content["loss"]).shape == (2, 2, 5, 5)
    assert np.array(content["loss"]) == pytest.approx(np.array(measured), abs=1e-7)
    relative = [np.array(loss)[0] / loss[0][0][2] for loss in measured]
    found = read_calibration(path)
    assert found.relative(0) == pytest.approx(sum(relative) / 2, rel=1e-4)
    measured = np.array(measured)
    for size, shares in (("0.1", [0, 1]), ("0.2", [0, 1]), ("0.21", [1]), ("0.4", [1]), ("0.5", [1])):
        assert found.first(Fraction(size)) == shares[0]
        assert found.measurements(Fraction(size)) == pytest.approx(measured[:, shares].reshape(-1, 5, 5), abs=1e-7)
    assert content["versions"]["torch"] and content["data"][0]["sha256"] and content["start_size"] == 4
    before = path.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(loading, "load", lambda *_: pytest.fail("there is nothing to measure"))
        measure()
    assert path.read_bytes() == before

    predict()
    folder = Path("pred_Long/tiny/calibrated/0.3")
    settings = json.loads((folder / "run.json").read_text())["settings"]
    assert settings["allocation"] == "calibrated" and "KV_class3" not in settings
    assert settings["calibration"] == read_calibration(path).sha256
    for line in (folder / "samples/samsum.jsonl").read_text().splitlines():
        stats = json.loads(line)["stats"]
        assert sum(stats["budgets"]) == int(5 * Fraction(3, 10) * stats["prompt_tokens"])
        assert len(set(stats["budgets"])) > 1
        assert set(stats["classes"]) <= {1, 2, 3}
    predict("--fidelity")
    evaluate.main(["--model", "tiny", "--allocation", "calibrated", "--ini_size", "0.3"])
    assert (folder / "result.json").exists()
    with pytest.raises(
        InputError, match=r"tiny-h2o\.json is not there.*squeeze\.calibrate --model tiny --algorithm h2o"
    ):
        predict("--algorithm", "h2o")
    with pytest.raises(InputError, match="KV_class3 is not for the allocation calibrated"):
        predict("--KV_class3", "0.1")
    with pytest.raises(InputError, match="was measured with start_size 4, not 2"):
        predict("--start_size", "2")
    save_tiny(place / "tiny", seed=1)
    with pytest.raises(InputError, match="was measured on another model than this one"):
        predict("--overwrite")


def test_curves_of_heads_and_runs_with_their_budgets(place, capsys):
    """One head at a time; the file, the run's folder and its records say so, and its budgets are a list a layer."""
    with pytest.raises(
        InputError, match=r"tiny-h2o-heads\.json is not there.*squeeze\.calibrate --model tiny .* --per head$"
    ):
        predict("--algorithm", "h2o", "--per", "head")
    measure("--algorithm", "h2o", "--per", "head")
    path = Path("config/calibration/tiny-h2o-heads.json")
    assert f"{path}: loss curves of 10 KV heads at 2 sizes, 2 prompts" in capsys.readouterr().out
    found = read_calibration(path)
    assert (found.kv_heads, found.per, found.losses.shape) == ((2,) * 5, "head", (2, 2, 10, 5))
    predict("--algorithm", "h2o", "--per", "head")
    folder = Path("pred_Long/tiny/h2o/calibrated/per-head/0.3")
    settings = json.loads((folder / "run.json").read_text())["settings"]
    assert (settings["per"], settings["calibration"]) == ("head", found.sha256)
    for line in (folder / "samples/samsum.jsonl").read_text().splitlines():
        stats = json.loads(line)["stats"]
        budgets = np.array(stats["budgets"])
        assert budgets.shape == (5, 2) and (np.ptp(budgets, axis=1) > 0).any()
        assert budgets.sum() == int(10 * Fraction(3, 10) * stats["prompt_tokens"])
        assert budgets.sum() <= stats["kv_bytes"] / (2 * 8 * 4) <= 1.02 * budgets.sum()
    predict("--algorithm", "h2o", "--per", "head", "--fidelity")
    capsys.readouterr()
    evaluate.main(
        ["--model", "tiny", "--algorithm", "h2o", "--allocation", "calibrated", "--per", "head", "--ini_size", "0.3"]
    )
    assert (folder / "result.json").exists()
    with pytest.raises(InputError, match=r"tiny-h2o\.json is not there"):
        predict("--algorithm", "h2o")
    path.rename("config/calibration/tiny-h2o.json")
    with pytest.raises(
        InputError, match=r"has loss curves of each head, and those of each layer are asked for: python"
    ):
        predict("--algorithm", "h2o")
    with pytest.raises(InputError, match="the allocation squeeze knows only layers"):
        pred.main([*COMMON, "--enable_squeeze", "--ini_size", "0.3", "--KV_class3", "0.2", "--per", "head"])


def test_heads_that_share_by_scores(place):
    flags = [*COMMON, "--enable_squeeze", "--ini_size", "0.3", "--KV_class3", "0.2", "--per", "adakv"]
    pred.main([*flags, "--algorithm", "h2o"])
    folder = Path("pred_Long/tiny/h2o/per-adakv/0.3/20")
    line = (folder / "samples/samsum.jsonl").read_text().splitlines()[0]
    stats = json.loads(line)["stats"]
    assert sum(map(sum, stats["budgets"])) == 2 * int(5 * Fraction(3, 10) * stats["prompt_tokens"])
    with pytest.raises(InputError, match="per adakv needs a method that scores tokens, such as h2o, and streaming"):
        pred.main(flags)


@pytest.mark.parametrize("kv_heads", [(2,) * 5, (1, 2, 3, 2, 1)])
@pytest.mark.parametrize("size", ["0.05", "1/3", "0.9"])
def test_budgets_of_heads_keep_the_total_to_the_token(kv_heads, size):
    """A head is to an allocation what a layer is, also where layers have windows, and other numbers of heads."""
    layers = [OwnLayer(heads, 8, 8, 40 if heads == 3 else None) for heads in kv_heads]
    facts, size = PromptFacts.of(heads_of(layers), 100, 20, 2), Fraction(size)
    losses = np.random.default_rng(0).random((3, sum(kv_heads), 5)).cumsum(axis=2)[..., ::-1]
    made = curves.budgets(loss_curves.MULTIPLES, losses, size, facts).of_heads(kv_heads)
    assert [len(own) for own in made.tokens] == list(kv_heads) and made.per_head
    reach = [100 if heads < 3 or len(set(kv_heads)) == 1 else 40 for heads in kv_heads for _ in range(heads)]
    assert sum(map(sum, made.tokens)) == int(size * sum(reach))
    for own, layer in zip(made.tokens, layers, strict=True):
        assert all(2 <= tokens <= layer.reach(120) for tokens in own)


def test_a_calibration_that_was_interrupted_goes_on(place, monkeypatch):
    measured, original = [], loss_curves.measure

    def once(run, prompt, *rest):
        if measured:
            raise KeyboardInterrupt
        measured.append(len(prompt))
        return original(run, prompt, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(loss_curves, "measure", once)
        with pytest.raises(KeyboardInterrupt):
            measure("--algorithm", "h2o")
    assert not Path("config/calibration/tiny-h2o.json").exists()
    calls = []
    monkeypatch.setattr(loss_curves, "measure", lambda *given: calls.append(1) or original(*given))
    measure("--algorithm", "h2o")
    assert len(calls) == 1
    assert len(json.loads(Path("config/calibration/tiny-h2o.json").read_text())["prompts"]) == 2


def save_curves(path, **changes):
    """A whole file of curves of five layers, but for `changes`."""
    content = {
        "version": 3,
        "algorithm": "h2o",
        "start_size": None,
        "shares": ["1/10", "2/5"],
        "multiples": ["1/2", "1"],
    }
    content |= {"model": {}, "loss": np.zeros((1, 2, 5, 2)).tolist()} | changes
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"version": 1}, "is of version 1, and 3 is known here: make it again with python -m squeeze.calibrate"),
        ({"loss": [[[[0.0]]]]}, "is damaged, its curves are not whole"),
        (
            {"loss": [[[[0.0, 1.0]] * 5, [[0.0, float("nan")]] * 5]]},
            r"loss\[0\]\[1\]\[0\]\[1\] is NaN, which is no number that JSON has: make it again",
        ),
        ({"shares": ["2/5", "1/10"]}, "is damaged"),
        ({"shares": []}, r"shares is not a list of length >= 1, got \[\]: make it again"),
        ({"multiples": ["1/2", "2"]}, "is damaged"),
        ({"multiples": ["a", "b"]}, r"multiples\[0\] is not text matching"),
        ({"multiples": ["1/0", "1"]}, r"multiples\[0\] is not text matching"),
        ({"shares": ["1e999999999", "1"]}, r"shares\[0\] is not text matching"),
        ({"algorithm": "lru"}, r"algorithm is none of sliding_window, streaming, h2o, .*, got \"lru\""),
        ({"model": 3}, "model is not a JSON object, got 3: make it again"),
        ({"kv_heads": [2, 2]}, "is damaged, its curves are not whole"),
        ({"kv_heads": [5, 0]}, r"kv_heads\[1\] is not"),
    ],
)
def test_a_damaged_file_is_a_sentence(tmp_path, changes, said):
    with pytest.raises(InputError, match=said):
        read_calibration(save_curves(tmp_path / "some.json", **changes))


def test_the_library_wants_curves_of_the_same_model_and_method(tmp_path):
    found = read_calibration(save_curves(tmp_path / "some.json"))
    model = random_model("llama")

    def use(**more):
        with squeezed(model, SqueezeConfig(ini_size="0.3", allocation="calibrated", **more)) as run:
            model.generate(PROMPT[None], max_new_tokens=4)
        return run.budgets[0]

    assert use(algorithm="h2o", calibration=found).sum() == int(5 * Fraction(3, 10) * len(PROMPT))
    with pytest.raises(InputError, match="needs loss curves"):
        use()
    with pytest.raises(InputError, match="was measured with h2o, not with streaming"):
        use(calibration=found)
    other = save_curves(tmp_path / "other.json", loss=np.zeros((1, 2, 4, 2)).tolist())
    with pytest.raises(InputError, match="was measured on another model"):
        use(algorithm="h2o", calibration=read_calibration(other))
    with pytest.raises(InputError, match="ini_size is missing"):
        SqueezeConfig(allocation="calibrated")


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--ini_size", "2"], r"--ini_size must be in \(0, 1\]"),
        (["--ini_size", "a"], "ini_size must be a number"),
        (["--algorithm", "lru"], "--algorithm must be one of"),
        (["--datasets", "nothing"], "nothing"),
    ],
)
def test_bad_flags_are_a_sentence(place, flags, said):
    with pytest.raises(InputError, match=said):
        calibrate.calibrate([*COMMON, *flags])


def test_a_prompt_that_does_not_fit_into_memory_is_a_sentence(place, monkeypatch):
    def none(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(patch, "self_check", lambda *_: None)  # which would do the same on a few tokens
    monkeypatch.setattr(SqueezedModel, "fork", none)
    with pytest.raises(InputError, match=r"out of memory with row 0 of samsum alone, \d+ tokens: take shorter ones"):
        measure()


def test_a_prompt_that_is_too_short_is_a_sentence(place):
    save_rows(place / "data", count=1, context="short")
    with pytest.raises(InputError, match="is too short to measure loss curves on"):
        measure()


@pytest.mark.parametrize(
    ("algorithm", "per", "parts"), [*((algorithm, "layer", 30) for algorithm in ALGORITHMS), ("h2o", "head", 90)]
)
def test_the_embedded_models_files_are_shipped(algorithm, per, parts):
    """Made from this model and these rows, and nothing in them is of the machine that made them."""
    source = sources.resolve("SmolLM2-135M", None)
    identity = sources.identity(source, sources.fetch(source, False))
    config = with_curves(SqueezeConfig(algorithm, "0.2", allocation="calibrated", per=per), source.name, identity)
    found = config.calibration
    assert found.losses.shape == (8, 3, parts, len(loss_curves.MULTIPLES))
    assert found.per == per and found.kv_heads == ((3,) * 30 if per == "head" else None)
    content = json.loads(Path(found.source).read_text())
    assert {one["dataset"] for one in content["data"]} == set(calibrate.DATASETS.split(","))
    for one in content["data"]:
        assert hashlib.sha256((ROOT / one["source"]).read_bytes()).hexdigest() == one["sha256"]
    facts = PromptFacts(2000, (2064,) * parts, (2000,) * parts, (384,) * parts, 5)
    for size in (Fraction(1, 20), Fraction(1, 5), Fraction(3, 4)):
        tokens = curves.budgets(found.multiples, found.measurements(size), size, facts).tokens
        assert sum(tokens) == int(parts * size * 2000)
        assert max(tokens) > 1.3 * float(size) * 2000, "not uniform"
