"""What a run says about the chat format of its prompts, and what it does with samples of another format."""

import json
from functools import partial
from pathlib import Path

import pytest
from tiny import save_rows, save_tiny, tiny_tokenizer
from tqdm import tqdm

import pred
from squeeze import InputError
from squeeze.benchmarks import encoding
from squeeze.benchmarks.base import Options
from squeeze.benchmarks.longbench import benchmark
from squeeze.benchmarks.longbench.data import generation_lengths, load_data

INST = "[INST]{prompt}[/INST]"
FLAGS = ["--data_dir", "data", "--device", "cpu", "--dtype", "float32", "--datasets", "samsum,qasper"]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    for dataset in ("samsum", "qasper"):
        monkeypatch.setitem(generation_lengths(), dataset, 2)
        save_rows(tmp_path / "data", dataset=dataset, count=1)
    monkeypatch.chdir(tmp_path)


def run(model, *more):
    pred.main(["--model", model, *FLAGS, *more])
    return json.loads(Path(f"pred_Long/{model}/full/run.json").read_text("utf-8"))


def prompt_tokens(model, dataset="qasper"):
    path = Path(f"pred_Long/{model}/full/samples/{dataset}.jsonl")
    return json.loads(path.read_text("utf-8").splitlines()[0])["stats"]["prompt_tokens"]


def test_the_format_is_said_once_and_recorded(capsys):
    for model in ("llama2-7b-chat-4k", "Llama-2-7b-chat-hf", "Mistral-Instruct"):
        save_tiny(Path(model))
    manifests = {model: run(model) for model in ("llama2-7b-chat-4k", "Llama-2-7b-chat-hf")}
    shown = capsys.readouterr().out
    assert shown.count(f"note: prompts of qasper are put into LongBench's chat format for llama2: {INST}\n") == 2
    assert prompt_tokens("llama2-7b-chat-4k") == prompt_tokens("Llama-2-7b-chat-hf")
    for model, manifest in manifests.items():
        found = manifest["datasets"]
        assert (found["qasper"]["chat_format"], found["samsum"]["chat_format"]) == (INST, None)
        assert "chat_format" not in found["samsum"]["settings"] and "chat_format" not in manifest["settings"]
        assert found["qasper"]["settings"].get("chat_format") == (INST if model.startswith("L") else None)
    found = run("Mistral-Instruct")["datasets"]["qasper"]
    assert (
        "note: Mistral-Instruct looks like a chat model, and prompts of qasper are put to it"
        in capsys.readouterr().out
    )
    assert found["chat_format"] is None and prompt_tokens("Mistral-Instruct") < prompt_tokens("Llama-2-7b-chat-hf")


def test_samples_of_another_format_are_not_mixed(capsys):
    """A run from before chat models were known by other spellings goes on only where its prompts are the same."""
    save_tiny(Path("Llama-2-7b-chat-hf"))
    manifest = run("Llama-2-7b-chat-hf")
    path = Path("pred_Long/Llama-2-7b-chat-hf/full/run.json")
    del manifest["datasets"]["qasper"]["settings"]["chat_format"]
    path.write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(InputError, match=r"holds qasper with chat_format null \(now \[INST\]"):
        run("Llama-2-7b-chat-hf")
    run("Llama-2-7b-chat-hf", "--datasets", "samsum")
    save_tiny(Path("llama2-7b-32k"))
    run("llama2-7b-32k", "--model_path", "llama2-7b-32k")
    before = Path("pred_Long/llama2-7b-32k/full/run.json").read_bytes()
    run("llama2-7b-32k", "--model_path", "llama2-7b-32k")
    assert Path("pred_Long/llama2-7b-32k/full/run.json").read_bytes() == before


def test_long_texts_are_tokenized_under_a_bar_and_only_those_that_are_asked_for(monkeypatch, capsys):
    monkeypatch.setattr(encoding, "tqdm", partial(tqdm, disable=False))
    save_rows(Path("data"), count=3)
    tokenizer, data, seen = tiny_tokenizer(), load_data("samsum", "data"), []
    options = Options(max_length=10_000, model_name="M")
    quiet = benchmark.LONGBENCH.encode(tokenizer, data, 2, options)
    assert "tokenizing" not in capsys.readouterr().err
    monkeypatch.setattr(encoding, "LONG_TEXT", 10)
    monkeypatch.setattr(
        benchmark, "build_prompt", lambda dataset, row: seen.append(row) or f"{len(seen)} {row['context']}"
    )
    said = benchmark.LONGBENCH.encode(tokenizer, data, 2, options)
    assert "samsum: tokenizing:   0%" in capsys.readouterr().err, "before the first one, which may take minutes"
    assert seen == data.rows[:2] and len(said) == len(quiet) == 2
