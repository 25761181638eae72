"""Throughput at full memory: which batches are run, which of them fit, and models without their weights."""

import json
from pathlib import Path

import pytest
import torch
from test_bench import record

from squeeze import InputError
from squeeze.bench import command as bench
from squeeze.bench import throughput, worker

SHAPE = {
    **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16, "intermediate_size": 24},
    **{"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 90},
    **{"max_position_embeddings": 256},
}


@pytest.fixture
def shape(tmp_path):
    (tmp_path / "small.json").write_text(json.dumps(SHAPE))
    return tmp_path / "small.json"


def whole(batch_size, peak, step, seconds=10.0, **spec):
    made = record(batch_size, peak, step, new_tokens=100, **spec)
    made["result"]["whole_seconds"] = {"median": seconds, "low": seconds, "high": seconds}
    return made


FULL = {"engine": "transformers", "cache": "DynamicCache full"}


def test_the_largest_batch_that_fits_of_each_cache_is_compared():
    failed = {"spec": whole(64, 1, 1)["spec"], "result": {"error": "OutOfMemoryError"}}
    records = [whole(1, 1e9, 0.1), whole(32, 8e9, 0.2, 25.0), failed]
    records += [whole(1, 1e9, 0.1, **FULL), whole(8, 8.1e9, 0.2, **FULL)]
    *table, squeezed, full = "\n".join(throughput.lines(records, 8e9)).splitlines()
    assert squeezed.startswith("squeeze: h2o squeezed, float32: 160.0 tokens/s at batch 32, the largest that fits")
    assert squeezed.endswith("16.00 times the full cache at its largest")
    assert full.endswith("10.0 tokens/s at batch 1, the largest that fits")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table[2:]]
    assert [line[3:] for line in cells] == [
        ["1", "10.0", "10.0", "1.00", "yes"],
        ["32", "160.0", "128.0", "8.00", "yes"],
        ["64", "-", "-", "-", "no"],
        ["1", "10.0", "10.0", "1.00", "yes"],
        ["8", "40.0", "80.0", "8.10", "no"],
    ]
    with pytest.raises(InputError, match=r"no batch fits into 0\.5 GB"):
        throughput.lines(records, 5e8)


def test_a_cache_that_is_full_is_given_no_larger_batch(shape, tmp_path, monkeypatch, capsys):
    """Each cache alone, the smallest batch first; the other goes on."""
    asked = []

    def run(specs, shared, bar):
        for spec in specs:
            asked.append((spec["engine"], spec["batch_size"]))
            assert spec["random_weights"] and spec["memory"] == 8e9 and max(spec["tokens"]) < 90
            full = spec["engine"] == "transformers"
            made = whole(spec["batch_size"], 3e9 * spec["batch_size"] if full else 1e9, 0.1)
            yield {"spec": {key: value for key, value in spec.items() if key != "tokens"}, "result": made["result"]}

    monkeypatch.setattr(bench, "run", run)
    flags = ["--throughput", "--random_weights", str(shape), "--batch_size", "4", "1", "2", "3", "--memory_gb", "8"]
    bench.main([*flags, "--dtype", "float32", "--caches", "squeezed", "--out", str(tmp_path / "out")])
    assert [size for engine, size in asked if engine == "squeeze"] == [1, 2, 3, 4]
    assert [size for engine, size in asked if engine == "transformers"] == [1, 2, 3]
    assert "at batch 2, the largest that fits" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "out/bench.json").read_text())["runs"]) == 7
    assert (tmp_path / "out/bench.png").exists()


@pytest.mark.slow
def test_it_runs_in_processes_of_its_own_from_any_folder(shape, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--throughput", "--random_weights", "small.json", "--batch_size", "1", "--prompt_length", "60"]
    bench.main([*flags, "--new_tokens", "3", "--rounds", "1", "--dtype", "float32", "--caches", "squeezed"])
    shown = capsys.readouterr().out
    assert shown.count("at batch 1, the largest that fits") == 2
    runs = json.loads(Path("bench/bench.json").read_text())["runs"]
    assert [Path(run["spec"]["model"]).name for run in runs] == ["small", "small"]


def test_what_failed_for_another_reason_is_said_and_is_not_too_large():
    broken = {"spec": whole(1, 1, 1)["spec"], "result": {"error": "OSError: no such model"}}
    assert throughput.fits(broken, 8e9) is None
    for error in ("OutOfMemoryError: CUDA", "ended with code -9, perhaps", "RuntimeError: [..] can't allocate memory"):
        assert throughput.fits(broken | {"result": {"error": error}}, 8e9) is False
    with pytest.raises(InputError, match="nothing could be measured: OSError: no such model"):
        throughput.lines([broken], 8e9)


def test_dtypes_are_compared_with_their_own_full_cache():
    records = [whole(1, 1e9, 0.2), whole(1, 1e9, 0.1, dtype="bfloat16")]
    records += [whole(1, 1e9, 0.2, **FULL), whole(1, 1e9, 0.1, **FULL, dtype="bfloat16")]
    assert sum("1.00 times the full cache" in line for line in throughput.lines(records, 8e9)) == 2


def test_a_model_of_a_shape_needs_no_weights(shape, tmp_path):
    folder = throughput.shape(shape, tmp_path)
    assert throughput.shape(folder, tmp_path) == folder and folder.is_absolute()
    assert folder.name == "small" and [path.name for path in folder.iterdir()] == ["config.json"]
    spec = {"engine": "squeeze", "model": str(folder), "device": "cpu", "dtype": "bfloat16", "attn": "sdpa"}
    spec |= {"tokens": list(range(90)), "batch_size": 2, "prompt_length": 70, "new_tokens": 4, "rounds": 1}
    spec |= {"turn_steps": 4, "random_weights": True}
    spec["config"] = {"algorithm": "streaming", "allocation": "uniform", "ini_size": "0.2"}
    found = worker.measure(spec, lambda known: None)
    assert found["kv_bytes"] == 2 * 2 * 14 * 2 * 8 * 2
    assert found["whole_seconds"]["median"] > found["prefill_seconds"]["median"]
    first, second = (worker.load(spec, torch.device("cpu")) for _ in range(2))
    assert all(map(torch.equal, first.parameters(), second.parameters()))


@pytest.mark.parametrize("name", throughput.PRESETS)
def test_a_preset_has_a_shape_and_gives_way_to_what_is_said(name):
    args = bench.read_flags(["--throughput", "--preset", name, "--new_tokens", "7"])
    sizes = throughput.PRESETS[name]
    assert (args.prompt_length, args.batch_size, args.new_tokens) == (sizes["prompt_length"], sizes["batch_size"], 7)
    config = json.loads(Path(args.random_weights).read_text())
    parameters = 2 * config["vocab_size"] * config["hidden_size"] + config["num_hidden_layers"] * (
        config["hidden_size"] * (2 * config["hidden_size"] + 3 * config["intermediate_size"])
        + 2 * config["hidden_size"] * config["num_key_value_heads"] * 128
    )
    billions = {"mistral-7b": 7.24, "llama-2-7b": 6.74, "llama-3.1-8b": 8.03}
    assert parameters / 1e9 == pytest.approx(billions[name], abs=0.01)
    assert bench.read_flags(["--throughput", "--preset", name, "--model", "M"]).random_weights is None


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--random_weights", "none.json"], "--random_weights none.json: there is no none.json"),
        (["--random_weights", "bad.json"], "bad.*model_type"),
        (["--random_weights", "small.json", "--allocation", "calibrated"], "random weights have no loss curves"),
        (
            ["--throughput", "--preset", "mistral-7b", "--allocation", "calibrated"],
            "random weights have no loss curves",
        ),
        (["--random_weights", "small.json", "--model", "M"], "--random_weights takes the place of the model"),
        (["--preset", "mistral-7b"], "--preset is for --throughput"),
        (["--throughput", "--in_turns"], "--throughput fills the memory with one cache at a time"),
    ],
)
def test_bad_input(shape, tmp_path, monkeypatch, flags, said):
    monkeypatch.chdir(tmp_path)
    Path("bad.json").write_text("{}")
    with pytest.raises(InputError, match=said):
        bench.main(flags)
