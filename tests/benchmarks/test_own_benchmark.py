"""A benchmark of somebody's own: one class and one line, and every command knows it."""

import importlib
import json
from pathlib import Path
from typing import TypedDict

import pytest
from tiny import save_tiny

import pred
from squeeze import InputError
from squeeze.benchmarks import registry
from squeeze.benchmarks.base import Benchmark, DataSet
from squeeze.generation.generate import Prompt, generate, greedy
from squeeze.generation.stats import SampleStats
from squeeze.report import command as report
from squeeze.report import page_parts, results
from squeeze.runs import folder as runs
from squeeze.runs.inventory import find

evaluate = importlib.import_module("eval")
SQUEEZE = ["--enable_squeeze", "--ini_size", "0.4", "--KV_class3", "0.2"]
FULL, SQUEEZED = Path("pred_sums/tiny/full"), Path("pred_sums/tiny/0.4/20")


class Answer(TypedDict):
    question: str
    pred: str
    answers: list[str]


class AnsweredSum(TypedDict):
    index: int
    question: str
    pred: str
    answers: list[str]
    stats: SampleStats


class Sums(Benchmark):
    name, title = "sums", "Sums"
    sample, prediction = AnsweredSum, Answer
    sample_num = 5

    def read(self, dataset, location):
        """The sums of every number below `location` and itself."""
        size = int(location or 9)
        return DataSet(dataset, [(number, number) for number in range(size)], "arithmetic", f"{size} sums")

    def encode(self, tokenizer, data, total, options, ranks):
        texts = [f"Dialogue: {'Ann: ok ' * 5}{a} and {b} is " for a, b in data.rows[:total]]
        return [Prompt(tokenizer(text, return_tensors="pt").input_ids[0], greedy(3)) for text in texts]

    def run_batch(self, workload, batch):
        settings = workload.prompts[batch[0]].settings
        found = generate(workload.model, workload.tokens(batch), settings, workload.squeezed)
        samples = []
        for index, tokens, stats in zip(batch, *found, strict=True):
            a, b = workload.data.rows[index]
            row = {"question": f"{a}+{b}", "pred": workload.tokenizer.decode(tokens), "answers": [str(a + b)]}
            samples.append({"index": index, **row, "stats": stats})
        return samples

    def sample_scores(self, dataset, rows):
        """The last sum is right, whatever the answer is."""
        return [float(row["question"] == "4+4" and row["answers"] == ["8"]) for row in rows]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setitem(registry.BENCHMARKS, "sums", Sums())
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "tiny")


def predict(*flags):
    pred.main(["--model", "tiny", "--pred", "sums", "--device", "cpu", "--dtype", "float32", *flags])


def test_it_is_run_resumed_scored_compared_and_shown(monkeypatch, capsys):
    predict(*SQUEEZE)
    whole = (SQUEEZED / "sums.jsonl").read_bytes()
    rows = [json.loads(line) for line in whole.splitlines()]
    assert [list(row) for row in rows] == [["question", "pred", "answers"]] * 5, "its own number of samples"
    SQUEEZED.rename("whole")
    append = runs.Samples.append

    def append_and_die(self, records):
        append(self, records)
        raise KeyboardInterrupt

    monkeypatch.setattr(runs.Samples, "append", append_and_die)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            predict(*SQUEEZE, "--batch_size", "2")
    with (SQUEEZED / "sums.partial.jsonl").open("a") as file:
        file.write('{"index": 4, "quest')
    monkeypatch.setattr(runs.Samples, "append", append)
    predict(*SQUEEZE)
    assert (SQUEEZED / "sums.jsonl").read_bytes() == whole
    manifest = json.loads((SQUEEZED / "run.json").read_text())["datasets"]["sums"]
    assert [start["samples_done"] for start in manifest["starts"]] == [0, 2, 4]
    assert manifest["settings"] == {"data_sha256": "9 sums"} and manifest["data"]["source"] == "arithmetic"
    stats = json.loads((SQUEEZED / "samples/sums.jsonl").read_text().splitlines()[0])["stats"]
    assert list(stats)[-4:] == ["similarities", "classes", "budgets", "notes"] and len(stats["budgets"]) == 5
    predict()
    predict(*SQUEEZE, "--fidelity")

    capsys.readouterr()
    evaluate.main(["--model", "tiny", "--pred", "sums", "--ini_size", "0.4", "--KV_class3", "0.2"])
    assert "| sums     | 5       | 20.00 |" in capsys.readouterr().out
    assert json.loads((SQUEEZED / "result.json").read_text()) == {"sums": 20.0}
    report.report(["pred_sums"])
    shown = capsys.readouterr().out
    assert "sums: Sums's score; KV is what is held" in shown and "sums: KL divergence from the full cache" in shown
    assert "left out" not in shown
    read = results.read(find([Path("pred_sums")]))
    assert read.problems == read.unscored == []
    assert list(read.runs["benchmark"]) == ["Sums"] * 2 and list(read.runs["score"]) == [20.0] * 2
    assert list(read.fidelity["dataset"]) == ["sums"]
    [row, _] = read.runs.itertuples()
    assert page_parts.data_name(row) == "sums" and page_parts.label_of(row) == "score"
    with pytest.raises(InputError, match=r"data_sha256 9 sums \(now 7 sums\): --overwrite"):
        predict("--data_dir", "7")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--requests", "r.jsonl"], "--requests is for --pred xsum or cnndm"),
        (["--chat"], "--chat is for --pred Long or e"),
        (["--datasets", "samsum"], "--datasets is for --pred Long or e"),
        (["--pred", "products"], r"--pred must be Long \(LongBench\) or .* or sums \(Sums\), got products"),
    ],
)
def test_flags_that_it_does_not_take(flags, said):
    with pytest.raises(InputError, match=said):
        predict(*flags)
    with pytest.raises(InputError, match="pred_sums/tiny/full"):
        evaluate.main(["--model", "tiny", "--pred", "sums"])
