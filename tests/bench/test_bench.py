"""The benchmark: measures in processes of their own, writes what it prints, and says what failed."""

import json
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, random_model
from tiny import save_rows, save_tiny
from transformers import DynamicCache

from squeeze import InputError, SqueezeConfig
from squeeze.bench import command as bench
from squeeze.bench import configurations, files, processes, tables, worker
from squeeze.bench.flags import TURN_STEPS, parser
from squeeze.models import sources

SPEC = {"engine": "squeeze", "cache": "h2o squeezed", "dtype": "float32", "batch_size": 4, "prompt_length": 64}
SHAPE = ["--random_weights", str(ROOT / "config/shapes/smollm2-135m.json")]


def record(batch_size=4, peak=1e9, step=0.1, **spec):
    result = {
        **{"weight_bytes": 5e8, "kv_bytes": 3e8, "copy_bandwidth": 2e10, "peak_bytes": peak},
        "prefill_seconds": {"median": 1.5, "low": 1.4, "high": 1.6},
        "step_seconds": {"median": step, "low": step / 2, "high": 2 * step},
    }
    return {"spec": SPEC | {"batch_size": batch_size} | spec, "result": result}


def test_a_line_has_speed_memory_and_the_bandwidth_limit():
    line = tables.row(record(), 2e10)
    assert (line["tokens/s"], line["limit ms"], line["of limit"]) == ("40.0", "40.0", "40%")
    assert (line["prefill s"], line["step ms"]) == ("1.50 (1.40–1.60)", "100.0 (50.0–200.0)")
    assert (line["vs full"], line["late/early"], line["importance"]) == ("-", "-", "-")
    failed = tables.row({"spec": SPEC, "result": {"error": "MemoryError"}}, 2e10)
    assert (failed["prefill s"], failed["tokens/s"]) == ("failed", "-")


def test_speeds_are_compared_with_the_best_full_dynamic_cache_of_the_batch_size():
    records = [record(step=0.2, engine="transformers"), record(step=0.4, engine="transformers", dtype="bfloat16")]
    records += [record(step=0.1, engine="transformers", budgets=[9]), record(1, step=0.5, engine="transformers")]
    full = files.full_speeds(
        [*records, record(step=0.01), {"spec": SPEC | {"engine": "transformers"}, "result": {"error": ""}}]
    )
    assert full == {4: 20.0, 1: 2.0}
    assert tables.row(record(step=0.04), 2e10, full[4])["vs full"] == "5.00"


def test_a_peak_is_that_of_what_came_after_the_reset():
    cpu = torch.device("cpu")
    worker.reset_peak_memory(cpu)
    start = worker.peak_memory(cpu)
    large = torch.ones(100_000_000)
    assert worker.peak_memory(cpu) > start + 350e6
    del large
    worker.reset_peak_memory(cpu)
    assert worker.peak_memory(cpu) < start + 50e6


def test_the_bandwidth_is_the_runs_median():
    records = [record() for _ in range(3)] + [{"spec": SPEC, "result": {"error": "MemoryError"}}]
    records[1]["result"]["copy_bandwidth"] = 1e9
    assert files.bandwidth(records) == 2e10


def test_the_batch_that_fits_is_read_off_a_line_through_the_peaks():
    records = [record(1, 1.1e9), record(4, 1.4e9), record(1, 2e9, cache="alone")]
    assert tables.fitting(records, 2e9) == {"squeeze h2o squeezed float32": 10}
    assert tables.fitting(records, 0.5e9) == {"squeeze h2o squeezed float32": 0}


def test_cutting_a_dynamic_cache_leaves_its_last_tokens():
    cache = DynamicCache()
    for layer in range(2):
        cache.update(torch.arange(10.0).view(1, 1, 10, 1), torch.arange(10.0).view(1, 1, 10, 1), layer)
    worker.cut(cache, [3, 5])
    assert [layer.keys.flatten().tolist() for layer in cache.layers] == [[7, 8, 9], [5, 6, 7, 8, 9]]
    assert cache.layers[0].keys.untyped_storage().nbytes() == 12


def test_prompts_differ_and_have_the_length_asked_for():
    ids = worker.prompts({"tokens": list(range(2000)), "prompt_length": 5000, "batch_size": 3})
    assert ids.shape == (3, 5000)
    assert len(set(ids[:, 0].tolist())) == 3


def test_what_a_step_reads_of_the_weights():
    tied, untied = random_model("llama", tie_word_embeddings=True), random_model("llama")
    assert worker.weight_bytes(tied) == sum(p.nbytes for p in tied.parameters())
    assert worker.weight_bytes(untied) == worker.weight_bytes(tied)


@pytest.mark.parametrize(
    ("how", "batch_sizes"),
    [pytest.param([], (1, 2), id="alone", marks=pytest.mark.slow), pytest.param(["--in_turns"], (2,), id="in turns")],
)
def test_a_small_benchmark(tmp_path, capsys, how, batch_sizes):
    save_tiny(tmp_path / "tiny")
    save_rows(tmp_path / "data")
    sizes = ["--prompt_length", "60", "--new_tokens", "8", "--rounds", "2", "--batch_size", *map(str, batch_sizes)]
    folders = ["--model", str(tmp_path / "tiny"), "--data_dir", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    caches = ["--caches", "squeezed", "--algorithm", "h2o", "--dtype", "float32", "--memory_gb", "100", "--peers"]
    bench.main([*folders, *sizes, *caches, *how])
    shown = capsys.readouterr().out
    runs = json.loads((tmp_path / "out/bench.json").read_text())["runs"]
    assert [run["spec"]["batch_size"] for run in runs] == [size for size in batch_sizes for _ in range(4)]
    assert all(run["spec"]["turn_steps"] == (TURN_STEPS if how else 8) for run in runs)
    per_token = 5 * 2 * 2 * 8 * 4
    for first, batch_size in enumerate(batch_sizes):
        squeezed, full, cut, cut_alike = runs[4 * first : 4 * first + 4]
        budgets = squeezed["result"]["budgets"]
        assert all(sum(one) == 60 for one in budgets), "5 layers, a fifth of 60 tokens each"
        kept = sum(map(sum, budgets)) * per_token / 5
        assert kept <= squeezed["result"]["kv_bytes"] <= 1.01 * kept, "a ragged batch holds what it keeps"
        assert full["result"]["kv_bytes"] == batch_size * 60 * per_token
        assert cut["result"]["kv_bytes"] == batch_size * 12 * per_token
        assert cut_alike["result"]["kv_bytes"] == batch_size * 60 * per_token / 5, "budgets of the first sequence"
        assert 0 < squeezed["result"]["importance_seconds"]["median"] < squeezed["result"]["prefill_seconds"]["median"]
    assert ("fit into 100 GB" in shown) == (len(batch_sizes) > 1)
    assert "vs full: tokens/s over those of the full DynamicCache" in shown
    assert (tmp_path / "out/bench.png").read_bytes()[:4] == b"\x89PNG"


def test_budgets_of_heads_beside_those_of_layers(tmp_path, monkeypatch):
    """Curves are looked for by the model's name, and a worker reads those of the file that it is given."""
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "tiny")
    source = sources.resolve("tiny")
    identity, tokens = sources.identity(source, sources.fetch(source)), list(range(40))
    curves = {"version": 3, "algorithm": "h2o", "start_size": None, "shares": ["2/5"], "multiples": ["1/2", "1", "2"]}
    losses = np.random.default_rng(0).random((1, 1, 10, 3)).cumsum(axis=3)[..., ::-1]
    curves |= {"model": identity, "kv_heads": [2] * 5, "loss": losses.tolist()}
    flags = ["--model", "tiny", "--algorithm", "h2o", "--allocation", "calibrated", "--dtype", "float32"]
    flags += ["--batch_size", "2", "--prompt_length", "60", "--new_tokens", "3", "--rounds", "1"]
    args = parser().parse_args([*flags, "--caches", "squeezed", "--per", "head"])
    with pytest.raises(InputError, match=r"tiny-h2o-heads\.json is not there.*--per head"):
        configurations.specs(args, tmp_path / "tiny", tokens, identity)
    path = tmp_path / "config/calibration/tiny-h2o-heads.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(curves))
    [spec] = configurations.specs(args, tmp_path / "tiny", tokens, identity)
    assert spec["cache"] == "h2o squeezed per head"
    assert spec["config"]["calibration"] == str(path), "a worker runs in another folder"
    budgets = np.array(worker.measure(json.loads(json.dumps(spec)), lambda known: None)["budgets"])
    assert budgets.shape == (2, 5, 2) and (budgets.sum(axis=(1, 2)) == 10 * 60 // 5).all()
    assert (np.ptp(budgets, axis=2) > 0).any(), "heads differ"
    flags[5] = "squeeze-log"
    args = parser().parse_args([*flags, "--caches", "full", "graphed", "compiled", "--per", "layer", "adakv"])
    made = {spec["cache"]: spec["config"] for spec in configurations.specs(args, tmp_path / "tiny", tokens, identity)}
    graphed = ["h2o graphed", "h2o graphed per adakv"]
    assert list(made) == ["h2o full", *graphed, "h2o compiled", "h2o compiled per adakv"]
    assert [name for name, config in made.items() if SqueezeConfig(**config).cuda_graph] == graphed
    assert all(SqueezeConfig(**config).compile == ("compiled" in name) for name, config in made.items())


def turn_by_turn(*specs):
    """What `bench.run` yields, and the turns in their order."""
    order = []

    class Bar:
        def set_postfix_str(self, text):
            self.text = text

        def update(self):
            order.append(self.text.split(",")[0])

    return list(processes.run(specs, {}, Bar())), order


@pytest.mark.slow
def test_turns_are_taken_one_by_one_and_are_as_many_as_announced(tmp_path):
    save_tiny(tmp_path)
    base = {**SPEC, "model": str(tmp_path), "device": "cpu", "attn": "sdpa", "tokens": list(range(40)), "rounds": 2}
    base |= {"batch_size": 1, "prompt_length": 30, "new_tokens": 10, "turn_steps": 4}
    squeezed = {**base, "cache": "h2o squeezed", "config": {"algorithm": "h2o", "ini_size": 0.5, "kv_class3": 0.2}}
    alike = {**base, "engine": "transformers", "cache": "cut", "budgets": "squeezed", "python": sys.executable}
    records, order = turn_by_turn(squeezed, alike)
    assert order == ["squeeze h2o squeezed", "transformers cut"] * processes.turns(squeezed)
    assert records[1]["spec"]["budgets"] == records[0]["result"]["budgets"][0], "in time for the prefill after it"
    assert "tokens" not in records[0]["spec"]
    assert records[0]["result"]["kv_bytes"] == records[1]["result"]["kv_bytes"]
    [alone], order = turn_by_turn({**alike, "turn_steps": 10})
    assert alone["result"]["error"].startswith("ValueError: no squeezed cache has measured the budgets")


def test_waiting_for_a_turn_belongs_to_no_step(tmp_path):
    save_tiny(tmp_path)
    spec = {**SPEC, "model": str(tmp_path), "device": "cpu", "attn": "sdpa", "tokens": list(range(40)), "rounds": 1}
    spec |= {"batch_size": 1, "prompt_length": 30, "new_tokens": 4, "turn_steps": 1, "engine": "transformers"}
    found = worker.measure(spec, lambda known: time.sleep(3))
    assert found["prefill_seconds"]["high"] < 3 and found["step_seconds"]["high"] < 3


def test_what_fails_is_named_and_the_rest_goes_on(tmp_path):
    nowhere = SPEC | {"model": "nowhere", "device": "cpu", "attn": "sdpa"}
    killed = nowhere | {"python": "/bin/false", "cache": "killed"}
    records, order = turn_by_turn(killed, nowhere)
    assert order == ["squeeze killed", "squeeze h2o squeezed"]
    assert records[0]["result"]["error"].startswith("ended with code 1, perhaps for want of memory")
    assert records[1]["result"]["error"].startswith("OSError: ")


@pytest.mark.parametrize(
    "flags",
    [
        *(["--rounds", "0"], ["--batch_size", "0"], ["--ini_size", "2"], ["--model", "none"], ["--dtype", "int8"]),
        [*SHAPE, "--device", "cpu", "--caches", "graphed"],
    ],
)
def test_bad_input(flags):
    with pytest.raises(InputError):
        bench.main(flags)


def test_where_all_fails_there_is_an_error_and_what_there_is_is_kept(tmp_path, monkeypatch, capsys):
    failed = [{"spec": SPEC, "result": {"error": "OSError: no such model"}}]
    monkeypatch.setattr(bench, "run", lambda group, shared, bar: failed)
    with pytest.raises(InputError, match="nothing could be measured"):
        bench.main([*SHAPE, "--device", "cpu", "--batch_size", "1", "--dtype", "float32", "--out", str(tmp_path)])
    assert "squeeze h2o squeezed: OSError: no such model" in capsys.readouterr().out
    assert json.loads((tmp_path / "bench.json").read_text())["runs"] == 3 * failed
