"""`pred.py` from end to end: what it writes and measures, how it goes on, and what bad input gets."""

import json
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from test_graph import Tape
from tiny import LISTS, save_rows, save_tiny, tiny_tokenizer

import eval
import pred
from squeeze import InputError, SqueezeConfig, squeezed
from squeeze.benchmarks.longbench.data import build_prompt, generation_lengths
from squeeze.benchmarks.longbench.prompts import encode_prompt
from squeeze.cli.run import run_command
from squeeze.engine import graph
from squeeze.generation import generate as generation
from squeeze.generation.generate import generate
from squeeze.models import loading
from squeeze.models.cached_layers import full_cache_bytes, own_layers
from squeeze.models.loading import load
from squeeze.runs import folder as runs

ROOT = Path(__file__).parents[2]
SQUEEZE = ["--enable_squeeze", "--ini_size", "0.3", "--KV_class3", "0.126"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with a tiny model `tiny` and three rows in `data`; 24 tokens are generated for each."""
    monkeypatch.setitem(generation_lengths(), "samsum", 24)
    save_tiny(tmp_path / "tiny")
    save_rows(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def predict(*flags, model="tiny"):
    """In float32, unless `flags` say otherwise: in bfloat16 two ways of computing one token may choose another."""
    start = ["--model", model, "--pred", "Long", "--device", "cpu", "--dtype", "float32", "--data_dir", "data"]
    pred.main([*start, *flags])


def read(path):
    return [json.loads(line) for line in Path(path).read_text("utf-8").split("\n")[:-1]]


def summary(folder, dataset="samsum"):
    return json.loads((Path(folder) / "run.json").read_text("utf-8"))["datasets"][dataset]


def test_the_full_cache_is_what_generate_gives(place, capsys):
    predict()
    lines = read("pred_Long/tiny/full/samsum.jsonl")
    assert [set(line) for line in lines] == [{"pred", "answers", "all_classes", "length"}] * 3
    model, tokenizer = load(place / "tiny", torch.device("cpu"), torch.float32)
    for line, row in zip(lines, read("data/samsum.jsonl"), strict=True):
        tokens = encode_prompt(tokenizer, "samsum", build_prompt("samsum", row), 3584, "tiny")
        length = len(tokens)
        stops = [tokenizer.eos_token_id, tokenizer.encode("\n")[-1]]
        settings = {"max_new_tokens": 24, "min_length": length + 1, "do_sample": False, "eos_token_id": stops}
        output = model.generate(tokens[None], **settings)[0, length:]
        assert line["pred"] == tokenizer.decode(output, skip_special_tokens=True)
        assert {key: line[key] for key in LISTS} == LISTS
    found = summary("pred_Long/tiny/full")
    assert found["samples"] == 3
    assert found["kept"] == 1.0
    assert found["kv_bytes"] == found["full_kv_bytes"]  # one was measured, one computed
    assert "classes" not in found
    assert "KV 100.0%" in capsys.readouterr().out


def test_a_squeezed_run_keeps_what_its_budgets_say(place, capsys):
    predict(*SQUEEZE)
    folder = Path("pred_Long/tiny/0.3/12.6")
    found = summary(folder)
    layers, bytes_per_token = 5, 2 * 2 * 8 * 4
    assert len(found["classes"]["first"]) == len(found["budgets"]["mean"]) == layers
    assert found["kv_bytes"] <= 1.02 * sum(found["budgets"]["mean"]) * bytes_per_token
    assert found["kept"] == pytest.approx(0.3, abs=0.02)
    assert sum(found["layers_per_class"]) == pytest.approx(layers)
    manifest = json.loads((folder / "run.json").read_text("utf-8"))
    assert manifest["settings"]["algorithm"] == "streaming"
    assert len(manifest["settings"]["model"]["weights"]["model.safetensors"]) == 64
    [start] = found["starts"]
    assert start["flags"]["ini_size"] == "0.3"
    assert start["command"].startswith("python pred.py --model tiny")
    assert torch.__version__.startswith(start["versions"]["torch"])
    assert found["data"]["rows"] == 3
    assert found["generated_tokens"] > 3
    assert min(found["prefill_seconds"], found["decode_seconds"], found["peak_memory_bytes"]) > 0
    shown = capsys.readouterr().out
    assert str(folder / "samsum.jsonl") in shown
    assert "layers in class 1, 2, 3" in shown


@pytest.mark.parametrize("algorithm", ["sliding_window", "streaming", "h2o"])
def test_the_folder_of_every_algorithm_on_mistral(place, algorithm):
    save_tiny(place / "tiny-m", "mistral")
    predict(*SQUEEZE, "--algorithm", algorithm, "--allocation", "squeeze-log", "--sample_num", "1", model="tiny-m")
    level = "" if algorithm == "sliding_window" else algorithm
    folder = Path("pred_Long/tiny-m", level, "squeeze-log/0.3/12.6")
    assert len(read(folder / "samsum.jsonl")) == 1
    assert (summary(folder)["state_bytes"] > 0) == (algorithm != "sliding_window")


def test_an_interrupted_run_goes_on(place, monkeypatch):
    predict(*SQUEEZE, "--seed", "1")
    whole = Path("pred_Long/tiny/seed-1/0.3/12.6/samsum.jsonl").read_bytes()
    (place / "again").mkdir()
    monkeypatch.chdir(place / "again")
    append = runs.Samples.append

    def append_and_die(self, records):
        append(self, records)
        if len(self.records) == 2:
            raise KeyboardInterrupt

    again = ["--model", "../tiny", "--device", "cpu", "--dtype", "float32", "--data_dir", "../data", "--seed", "1"]
    again += SQUEEZE
    monkeypatch.setattr(runs.Samples, "append", append_and_die)
    monkeypatch.setattr(sys, "argv", ["pred.py", *again])
    assert run_command(pred.main) == 130
    folder = Path("pred_Long/tiny/seed-1/0.3/12.6")
    assert not (folder / "samsum.jsonl").exists()
    with (folder / "samsum.partial.jsonl").open("a") as file:
        file.write('{"index": 0, "pr')
    done = []

    def append_and_note(self, records):
        done.extend(record["index"] for record in records)
        append(self, records)

    monkeypatch.setattr(runs.Samples, "append", append_and_note)
    pred.main(again)
    assert done == [0], "the longest prompts come first"
    assert (folder / "samsum.jsonl").read_bytes() == whole
    assert summary(folder)["samples"] == 3
    assert [start["samples_done"] for start in summary(folder)["starts"]] == [0, 2]


@pytest.mark.parametrize("cache", [[], SQUEEZE, [*SQUEEZE, "--algorithm", "h2o"]], ids=["full", "streaming", "h2o"])
def test_a_batch_gives_what_single_prompts_give(place, cache):
    save_rows(place / "data", count=5)
    predict(*cache)
    folder = next(Path("pred_Long").rglob("run.json")).parent
    single = read(folder / "samsum.jsonl")
    budgets = summary(folder).get("budgets")
    predict(*cache, "--batch_size", "3", "--overwrite")
    assert read(folder / "samsum.jsonl") == single
    assert summary(folder).get("budgets") == budgets
    assert summary(folder)["starts"][-1]["batch_size"] == 3


def test_out_of_memory_halves_the_batch_and_loses_nothing(place, monkeypatch, capsys):
    save_rows(place / "data", count=7)
    predict(*SQUEEZE)
    folder = Path("pred_Long/tiny/0.3/12.6")
    expected = (folder / "samsum.jsonl").read_bytes()
    sizes, real = [], generation.generate

    def small_memory(model, prompts, *rest, **options):
        sizes.append(len(prompts))
        if len(prompts) > limit:
            raise error
        return real(model, prompts, *rest, **options)

    monkeypatch.setattr(generation, "generate", small_memory)
    limit, error = 2, torch.OutOfMemoryError("CUDA out of memory")
    predict(*SQUEEZE, "--batch_size", "5", "--overwrite")
    assert (folder / "samsum.jsonl").read_bytes() == expected
    assert sizes == [5, 2, 2, 1, 2]
    assert summary(folder)["starts"][-1]["batch_size"] == 2
    shown = capsys.readouterr()
    assert (shown.out + shown.err).count("out of memory with 5 prompts at a time; going on with 2") == 1
    limit, error = 0, RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
    with pytest.raises(InputError, match="out of memory with sample 6 alone"):
        predict(*SQUEEZE, "--overwrite")
    error = RuntimeError("something else")
    with pytest.raises(RuntimeError, match="something else"):
        predict(*SQUEEZE, "--overwrite")


def test_a_finished_run_needs_no_model(place, monkeypatch, capsys):
    predict(*SQUEEZE)
    first = capsys.readouterr().out
    monkeypatch.setattr(loading, "load", lambda *rest: pytest.fail("loaded again"))
    predict(*SQUEEZE)
    assert capsys.readouterr().out == first
    predict(*SQUEEZE, "--attn", "sdpa")
    with pytest.raises(InputError, match=r"attn sdpa \(now eager\): --overwrite"):
        predict(*SQUEEZE, "--attn", "eager")
    save_rows(place / "data", count=2)
    with pytest.raises(InputError, match=r"holds samsum with data_sha256"):
        predict(*SQUEEZE)


def test_the_published_commands(place, monkeypatch, capsys):
    """pred.py and eval.py one after the other, on the model that config/model2path.json names Mistral."""
    save_tiny(place / "weights", "mistral")
    (place / "config").mkdir()
    (place / "config/model2path.json").write_text(json.dumps({"Mistral": str(place / "weights")}))
    (place / "config/model2maxlen.json").write_text("{}")
    for kv_class3, folder in (("0.21", "21"), ("0.08", "8")):
        sizes = ["--ini_size", "0.21", "--KV_class3", kv_class3]
        predict("--enable_squeeze", "--model_arch", "Mistral", *sizes, model="Mistral")
        eval.main(["--model", "Mistral", "--pred", "Long", *sizes])
        score = json.loads(Path("pred_Long/Mistral/0.21", folder, "result.json").read_text())
        assert set(score) == {"samsum"}
        assert f"{score['samsum']:.2f}" in capsys.readouterr().out
        assert len(read(Path("pred_Long/Mistral/0.21", folder, "samsum.jsonl"))) == 3
    (place / "config/model2path.json").write_text('{"Mistral": "weights",\n}')
    with pytest.raises(InputError, match=r"model2path\.json line \d is not JSON"):
        predict(model="Mistral")


def test_several_data_sets_and_empty_predictions(place):
    """A model that gives nothing but padding: every prediction is empty, and that is a result."""
    save_tiny(place / "silent", silent=True)
    save_rows(place / "data", "lcc", count=1)
    predict("--datasets", "lcc,samsum", "--sample_num", "1", model="silent")
    for dataset in ("lcc", "samsum"):
        assert [line["pred"] for line in read(f"pred_Long/silent/full/{dataset}.jsonl")] == [""]
    assert summary("pred_Long/silent/full", "lcc")["generated_tokens"] == 64


def test_longbench_e_has_folders_and_rows_of_its_own(place):
    save_rows(place / "data", "samsum_e", count=2)
    pred.main(["--model", "tiny", "--pred", "e", "--device", "cpu", "--data_dir", "data", *SQUEEZE])
    assert len(read("pred_e/tiny/0.3/12.6/samsum.jsonl")) == 2
    eval.main(["--model", "tiny", "--pred", "e", *SQUEEZE])
    [scores] = json.loads(Path("pred_e/tiny/0.3/12.6/result.json").read_text()).values()
    assert scores["0-4k"] is not None and scores["4-8k"] is None
    with pytest.raises(InputError, match="unknown data set vcsum: LongBench-E has"):
        pred.main(["--model", "tiny", "--pred", "e", "--datasets", "vcsum"])


def test_a_stop_token_comes_second_at_the_earliest(place):
    """For samsum: a model that wants to stop at once gives one other token first."""
    model, _ = load(save_tiny(place / "silent", silent=True), torch.device("cpu"), torch.float32)
    prompts = [torch.tensor([5, 6, 7])]
    settings = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": [2, 0]}
    assert generate(model, prompts, settings | {"min_new_tokens": 1}, None)[0][0].tolist() == [1, 0]
    [output], [stats] = generate(model, prompts, settings, None)
    assert output.tolist() == [0]
    assert stats.new_tokens == 1
    assert stats.prompt_tokens == 3


@pytest.mark.parametrize("squeeze", [False, True])
def test_a_prompt_that_stops_early_ends_at_its_stop_token(place, squeeze):
    """In a batch `generate` pads it until the others have stopped, too: that padding is no part of the answer."""
    model, _ = load(place / "tiny", torch.device("cpu"), torch.float32)
    prompts = [torch.arange(5 + 7 * i, 45 + 9 * i) for i in range(6)]
    model.generation_config.eos_token_id = None
    settings = {"max_new_tokens": 9, "do_sample": False}
    config = SqueezeConfig(ini_size="0.5", kv_class3="0.2")
    with squeezed(model, config) if squeeze else nullcontext() as run:
        whole = [output.tolist() for output in generate(model, prompts, settings, run)[0]]
        stop = next(token for row in whole for token in row[:5] if sum(token in other for other in whole) < 6)
        outputs, stats = generate(model, prompts, settings | {"eos_token_id": [stop]}, run)
    expected = [row[: row.index(stop) + 1] if stop in row else row for row in whole]
    assert [output.tolist() for output in outputs] == expected
    assert [one.new_tokens for one in stats] == [len(row) for row in expected]
    assert min(map(len, expected)) < max(map(len, expected))


def test_full_cache_bytes_are_those_of_the_models_own_window(place):
    model, _ = load(save_tiny(place / "w", "mistral", sliding_window=16), torch.device("cpu"), torch.bfloat16)
    assert full_cache_bytes(own_layers(model.config), 10, model.dtype) == 2 * 5 * 2 * 8 * 10 * 2
    _, [stats] = generate(model, [torch.arange(3, 43)], {"max_new_tokens": 4, "do_sample": False}, None)
    per_token = 2 * 5 * 2 * 8 * 2
    assert stats.kv_bytes == stats.full_kv_bytes == 15 * per_token, "what the next token may look back at"


def test_long_prompts_are_cut_to_the_models_positions(place, capsys):
    save_tiny(place / "short", max_position_embeddings=80)
    predict("--sample_num", "2", model="short")
    assert "note: prompts are cut to 40 tokens: short is not in config/model2maxlen.json" in capsys.readouterr().out
    assert summary("pred_Long/short/full")["prompt_tokens"] <= 2 * 44  # cut text may split into other tokens


def test_notes_are_told_once(place, capsys):
    save_rows(place / "data", count=2)
    predict("--enable_squeeze", "--ini_size", "0.01", "--KV_class3", "0.01")
    found = summary("pred_Long/tiny/0.01/1")
    assert found["samples_with_notes"] == 2
    shown = capsys.readouterr()
    assert (shown.out + shown.err).count("note, from sample 1 on: ") == 1
    assert "the total grows" in found["first_notes"][0]
    assert "the total grows" in shown.out + shown.err


def test_what_is_measured_is_the_engines(place):
    model, _ = load(place / "tiny", torch.device("cpu"), torch.float32)
    prompts = [torch.arange(5, 45)]
    with squeezed(model, SqueezeConfig(ini_size="0.5", kv_class3="0.2")) as run:
        _, [stats] = generate(model, prompts, {"max_new_tokens": 4, "do_sample": False}, run)
        assert stats.budgets == run.budgets[0].tolist()
        assert stats.kv_bytes == run.kv_bytes
    assert sum(stats.budgets) == 100


def test_compiled_decoding_is_a_setting_of_the_run(place, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    predict(*SQUEEZE, "--sample_num", "2")
    folder = Path("pred_Long/tiny/0.3/12.6")
    plain = read(folder / "samsum.jsonl")
    with pytest.raises(InputError, match=r"compile null \(now true\): --overwrite"):
        predict(*SQUEEZE, "--sample_num", "2", "--compile")
    predict(*SQUEEZE, "--sample_num", "2", "--compile", "--overwrite")
    assert read(folder / "samsum.jsonl") == plain


def test_recorded_steps_are_a_setting_of_the_run(place, monkeypatch):
    """A tape of operations stands in for a CUDA graph."""
    monkeypatch.setitem(graph.RECORDINGS, "cpu", Tape)
    monkeypatch.setattr(Tape, "tapes", [])
    predict(*SQUEEZE, "--sample_num", "2")
    folder = Path("pred_Long/tiny/0.3/12.6")
    plain = read(folder / "samsum.jsonl")
    assert not Tape.tapes
    with pytest.raises(InputError, match=r"cuda_graph null \(now true\): --overwrite"):
        predict(*SQUEEZE, "--sample_num", "2", "--cuda_graph")
    predict(*SQUEEZE, "--sample_num", "2", "--cuda_graph", "--overwrite")
    assert read(folder / "samsum.jsonl") == plain
    assert sum(tape.replays for tape in Tape.tapes) > 2


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "nothing"], "unknown model nothing"),
        (["--datasets", "samsun"], "unknown data set samsun"),
        (["--datasets", ""], "names no data set"),
        (["--datasets", "trec"], "trec.jsonl is not there: data has samsum"),
        (["--model_arch", "Mistral", *SQUEEZE], "the model's own architecture is llama"),
        (["--chat"], "tiny has no chat template of its own"),
        ([*SQUEEZE, "--device", "cpu", "--cuda_graph"], "cuda_graph needs the model on an NVIDIA GPU"),
        (["--model", "half"], "has no weights"),
        (["--model", "broken"], "cannot be loaded"),
        (["--model", "t5"], "is of type t5, which is no decoder"),
    ],
)
def test_bad_input_leaves_no_folder(place, flags, words):
    for name, weights in {"half": None, "t5": b"whole enough", "broken": b"broken"}.items():
        save_tiny(place / name)
        (place / name / "model.safetensors").unlink()
        if weights is not None:
            (place / name / "model.safetensors").write_bytes(weights)
    (place / "t5/config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(InputError, match=words) as error:
        predict(*flags)
    assert "\n" not in str(error.value)
    assert not (place / "pred_Long").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([*SQUEEZE[:1], "--ini_size", "1.5", "--KV_class3", "0.1"], "ini_size must be in (0, 1], got 1.5"),
        (["--no_such_flag"], "unrecognized arguments: --no_such_flag"),
    ],
)
def test_as_a_command_bad_input_is_one_sentence_and_code_2(place, flags, words):
    command = [sys.executable, str(ROOT / "pred.py"), "--model", "tiny", "--data_dir", "data", *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert words in done.stderr


def test_the_tiny_tokenizer_fits_the_tiny_model():
    assert len(tiny_tokenizer()) <= 199
