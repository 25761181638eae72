"""`--compress context`: what is cut before the question is read."""

import copy
import importlib
import json
from pathlib import Path

import pytest
import torch
from conftest import ROOT, random_model
from tiny import save_rows, save_tiny
from tokenizers import normalizers

import pred
from squeeze import H2O, Explicit, InputError, SlidingWindow, SnapKV, squeezed
from squeeze.benchmarks.encoding import tokens_after
from squeeze.benchmarks.longbench.data import after_context, build_prompt, generation_lengths
from squeeze.benchmarks.longbench.prompts import encode_parts
from squeeze.generation.generate import generate, greedy
from squeeze.report import command as report
from squeeze.storage.files import read_jsonl
from squeeze.sweep import command as sweep

evaluate = importlib.import_module("eval")
FLAGS = ["--model", "tiny", "--device", "cpu", "--dtype", "float32"]
SQUEEZE = ["--enable_squeeze", "--algorithm", "h2o", "--allocation", "uniform", "--ini_size"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setitem(generation_lengths(), "samsum", 6)
    save_tiny(tmp_path / "tiny")
    save_rows(tmp_path / "data", count=3, context="Ann: hey, did you get the tickets? " * 8, input="Bob: no :( ")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_of_every_data_set_the_question_is_found(tokenizer):
    """No token of the context is read late, and none of what follows on it early; of long prompts what is left."""
    for dataset in generation_lengths():
        [(_, row), *_] = read_jsonl(ROOT / f"data/longbench/{dataset}.jsonl", dict)
        text, after = build_prompt(dataset, row), after_context(dataset, row)
        tokens, count = encode_parts(tokenizer, dataset, text, after, 100_000, "M")
        assert after.strip() in tokenizer.decode(tokens[-count:])
        assert text.startswith(tokenizer.decode(tokens[: -count - 1]))
        tokens, count = encode_parts(tokenizer, dataset, text, after, 40, "M")
        assert after.strip().endswith(tokenizer.decode(tokens[-min(count, 8) :]).strip()[-4:]) and 1 <= count <= 25
    with pytest.raises(InputError, match="does not have the text after its context, not there at all"):
        tokens_after(tokenizer, "a text", "not there at all", tokens, True)


def test_a_tokenizer_that_normalizes_finds_it_as_well(tokenizer):
    """NFC, as Qwen's: decoded text is not what was encoded."""
    normalizing = copy.deepcopy(tokenizer)
    normalizing.backend_tokenizer.normalizer = normalizers.NFC()
    text, after = "The cafe\u0301 is open. ", "Is the cafe\u0301 open?"
    tokens = normalizing(text + after, return_tensors="pt").input_ids[0]
    count = tokens_after(normalizing, text + after, after, tokens, True)
    assert normalizing.decode(tokens[-count:]).strip() == "Is the caf\u00e9 open?"


def test_a_sweep_cuts_where_a_single_run_does(place):
    """Also beside the full cache, whose prompts have no such end."""
    pred.main([*FLAGS, "--pred", "Long", "--data_dir", "data", *SQUEEZE, "0.3", "--compress", "context"])
    folder = Path("pred_Long/tiny/h2o/uniform/0.3/context")
    alone = (folder / "samsum.jsonl").read_bytes()
    Path("pred_Long").rename("alone")
    Path("grid.yaml").write_text(
        "{model: tiny, data_dir: data, device: cpu, dtype: float32, ini_size: 0.3, algorithm: h2o, "
        "allocation: uniform, compress: context}"
    )
    sweep.sweep(["grid.yaml"])
    assert (folder / "samsum.jsonl").read_bytes() == alone
    assert Path("pred_Long/tiny/full/samsum.jsonl").exists()


@pytest.mark.parametrize("evictor", [SlidingWindow(), H2O(), SnapKV(window=4)], ids=str)
def test_with_room_for_everything_it_is_the_whole_prompt(evictor):
    model = random_model("llama")
    prompts = [torch.randint(3, 199, (n,), generator=torch.Generator().manual_seed(n)) for n in (60, 41, 50)]
    settings = greedy(12) | {"min_new_tokens": 12}
    full, _ = generate(model, prompts, settings, None)
    with squeezed(model, evictor, Explicit([1000] * 5)) as run:
        found, stats = generate(model, prompts, settings, run, asked=9)
        alone = [generate(model, [prompt], settings, run, asked=9)[0][0] for prompt in prompts]
    assert all(map(torch.equal, found, full)) and all(map(torch.equal, alone, full))
    assert [one.full_kv_bytes for one in stats] == [(n - 9) * 5 * 2 * 2 * 8 * 4 for n in (60, 41, 50)]


def test_it_is_a_run_of_its_own_that_is_scored_and_shown(place, capsys):
    rows = ["--pred", "Long", "--data_dir", "data", "--batch_size", "2"]
    for more in ([], ["--compress", "context"]):
        pred.main([*FLAGS, *rows, *SQUEEZE, "0.3", *more])
    folder = Path("pred_Long/tiny/h2o/uniform/0.3")
    manifest = json.loads((folder / "context/run.json").read_text())
    assert manifest["settings"]["compress"] == "context"
    assert manifest["datasets"]["samsum"]["kept"] == pytest.approx(0.3, abs=0.01), "of the context"
    whole, context = ((path / "samsum.jsonl").read_text() for path in (folder, folder / "context"))
    assert whole != context
    stats = [
        json.loads((path / "samples/samsum.jsonl").read_text().split("\n")[0])["stats"]
        for path in (folder, folder / "context")
    ]
    assert stats[0]["prompt_tokens"] == stats[1]["prompt_tokens"] and sum(stats[1]["budgets"]) < sum(
        stats[0]["budgets"]
    )
    evaluate.main(["--model", "tiny", *SQUEEZE, "0.3", "--compress", "context"])
    assert (folder / "context/result.json").exists() and not (folder / "result.json").exists()
    capsys.readouterr()
    assert report.main(["pred_Long"]) == 0
    shown = capsys.readouterr().out
    assert "h2o of the context" in shown and "| h2o " in shown


def test_ruler_asks_after_the_cut(place):
    wanted = ["--pred", "ruler", "--lengths", "1500", "--sample_num", "1"]
    pred.main([*FLAGS, *wanted, *SQUEEZE, "1", "--compress", "context"])
    pred.main([*FLAGS, *wanted])
    found = [
        json.loads(path.read_text())
        for path in Path("pred_ruler").rglob("niah_single_1_1500.jsonl")
        if path.parent.name != "samples"
    ]
    assert len(found) == 2 and found[0]["pred"] != found[1]["pred"], (
        "a question takes the place of some of the context"
    )
    assert all(found[0][name] == found[1][name] for name in ("answers", "length"))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--pred", "xsum", *SQUEEZE, "0.3"],
            "--compress context is not for --pred xsum, whose prompts have no context",
        ),
        ([], "--compress is for a squeezed cache, but the full cache was asked for"),
        ([*SQUEEZE, "0.3", "--compress", "question"], "--compress must be one of prompt, context, got question"),
    ],
)
def test_what_cannot_be_is_a_sentence(place, flags, said):
    with pytest.raises(InputError, match=said):
        pred.main([*FLAGS, "--data_dir", "data", "--compress", "context", *flags])
