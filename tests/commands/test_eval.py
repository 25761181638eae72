"""`eval.py`: finding a run, scoring it, and refusing what is not whole."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from squeeze import InputError

evaluate = importlib.import_module("eval")
ROOT = Path(__file__).parents[2]
LINES = [
    {
        "pred": "Ann forgot the keys\nDialogue:",
        "answers": ["Ann forgot the tickets"],
        "all_classes": None,
        "length": 5,
    },
    {"pred": "", "answers": ["Bob"], "all_classes": None, "length": 5},
]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(folder, name="samsum.jsonl", lines=LINES):
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def results(folder):
    return {path.name: json.loads(path.read_text("utf-8")) for path in Path(folder).glob("result*.json")}


@pytest.mark.parametrize(
    ("flags", "folder"),
    [
        ("--model Mistral --pred Long --ini_size 0.21 --KV_class3 0.08", "Mistral/0.21/8"),
        ("--model Mistral --pred Long", "Mistral/full"),
        ("--model Mistral --enable_squeeze --model_arch no_change", "Mistral/full"),
        ("--model Mistral --ini_size 0.21 --KV_class3 0.08 --algorithm streaming", "Mistral/streaming/0.21/8"),
        ("--model llama2-7b-32k --ini_size 0.3 --KV_class3 0.1 --algorithm streaming", "llama2-7b-32k/0.3/10"),
        ("--model gone/mine --model_arch Mistral --ini_size 0.3 --KV_class3 0.1", "mine/0.3/10"),
        (
            "--model SmolLM2-135M --ini_size 0.3 --KV_class3 0.1 --allocation paper --seed 3",
            "SmolLM2-135M/paper/seed-3/0.3/10",
        ),
    ],
)
def test_flags_find_the_run_with_no_model_at_hand(flags, folder, capsys):
    write(f"pred_Long/{folder}")
    evaluate.main(flags.split())
    assert results(f"pred_Long/{folder}")["result.json"] == {"samsum": 37.5}
    assert "| samsum   | 2       | 37.50 |" in capsys.readouterr().out


def test_details(capsys):
    write("run")
    write("run", "qmsum.jsonl", LINES[:1])
    evaluate.main(["run"])
    found = results("run")
    assert found["result.json"] == {"qmsum": 66.67, "samsum": 37.5}  # qmsum is not cut at the first line: P 3/5
    detail = found["result_detail.json"]["datasets"]["samsum"]
    assert detail["interval"][0] < 37.5 < detail["interval"][1]
    assert detail["samples"] == 2
    assert [one["score"] for one in detail["per_sample"]] == [75.0, 0.0]
    assert detail["per_sample"][0]["rouge2"] == 66.67
    assert detail["rouge_score"] == {"rouge1": 37.5, "rouge2": 33.34, "rougeL": 37.5}
    evaluate.main(["run", "--datasets", "samsum"])
    assert results("run")["result.json"] == {"samsum": 37.5}


def torn(folder):
    write(folder)
    path = Path(folder, "samsum.jsonl")
    path.write_bytes(path.read_bytes()[:-20])


def one_line_lost(folder):
    write(folder, lines=LINES[:1])
    Path(folder, "run.json").write_text(json.dumps({"datasets": {"samsum": {"samples": 2}}}))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (torn, "samsum.jsonl line 2 is not JSON: the file ends in the middle of a line"),
        (one_line_lost, "samsum.jsonl has 1 lines, but run.json counts 2 samples"),
        (lambda folder: write(folder, lines=[]), "samsum.jsonl has no rows"),
        (lambda folder: write(folder, "samsum.partial.jsonl"), "is half-written, 2 samples so far"),
        (
            lambda folder: write(folder, "trec.jsonl"),
            "line 1: all_classes is empty, and trec is scored by it",
        ),
        (lambda folder: write(folder, "mmlu.jsonl"), "mmlu.jsonl is named after none of the data sets"),
        (lambda folder: Path(folder).mkdir(), "has no prediction file"),
        (lambda folder: None, "the folder run is not there"),
    ],
)
def test_what_is_not_whole_is_not_scored(make, words):
    make("run")
    with pytest.raises(InputError) as error:
        evaluate.main(["run"])
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(Path().rglob("result*"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "nothing to score"),
        (["run", "--model", "Mistral"], "not both"),
        (["run", "--datasets", "samsun"], "unknown data set samsun"),
        (["run", "--datasets", "qmsum"], "run has no qmsum.jsonl"),
        (["--model", "Mistral", "--ini_size", "0.2"], "KV_class3 is missing"),
        (["--model", "Mistral", "--KV_class3", "0.2"], "ini_size is missing"),
        (["--model", "Mistral", "--algorithm", "h2o"], "--algorithm is for a squeezed cache"),
        (
            ["--model", "Mistral"],
            "no run in pred_Long/Mistral/full: start pred.py with the same flags first; there are ",
        ),
    ],
)
def test_bad_flags(flags, words):
    write("run")
    Path("pred_Long/Mistral/0.2/10").mkdir(parents=True)
    Path("pred_Long/Mistral/0.2/10/run.json").write_text("{}")
    with pytest.raises(InputError) as error:
        evaluate.main(flags)
    assert words in str(error.value)


def test_as_a_command():
    torn("run")
    done = subprocess.run([sys.executable, ROOT / "eval.py", "run"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: run/samsum.jsonl line 2 is not JSON: the file ends in the middle of a line\n"


def test_what_is_good_is_scored_and_what_is_not_is_named(capsys):
    write("run")
    write("run", "trec.jsonl")
    with pytest.raises(InputError, match=r"trec\.jsonl line 1: all_classes is empty"):
        evaluate.main(["run"])
    assert "left out: 1 of 2 data sets" in capsys.readouterr().out
    assert results("run")["result.json"] == {"samsum": 37.5}
    assert set(results("run")["result_detail.json"]["left_out"]) == {"trec"}


def test_a_table_with_intervals_and_the_means_of_groups(capsys):
    code = [{"pred": text, "answers": ["return x"], "all_classes": None} for text in ("return x", "")]
    for name in ("lcc", "repobench-p"):
        write("run", f"{name}.jsonl", code)
    evaluate.main(["run"])
    shown = capsys.readouterr().out
    assert "| lcc         | 2       | 50.00 | 0.00–100.00  |" in shown
    assert "| mean: code  |         | 50.00 |              |" in shown
    assert results("run")["result_detail.json"]["groups"] == {"code": 50.0}


def test_longbench_e_is_scored_by_length(capsys):
    lines = [LINES[0] | {"length": length} for length in (100, 4100)]
    write("pred_e/M/full", lines=lines)
    evaluate.main(["--model", "M", "--model_arch", "Mistral", "--pred", "e"])
    assert results("pred_e/M/full")["result.json"] == {"samsum": {"0-4k": 75.0, "4-8k": 75.0, "8k+": None}}
    assert "0-4k" in capsys.readouterr().out
    evaluate.main(["pred_e/M/full"])
    assert results("pred_e/M/full")["result.json"]["samsum"]["4-8k"] == 75.0, "a folder is known by its name"
    write("pred_e/M/full", lines=[{key: line[key] for key in line if key != "length"} for line in lines])
    with pytest.raises(InputError, match="line 1 has no field length"):
        evaluate.main(["pred_e/M/full"])


def test_runs_side_by_side(capsys):
    write("a")
    write("b", lines=[LINES[0] | {"pred": "Ann forgot the tickets"}, LINES[1]])
    write("c", lines=LINES[:1])
    write("a", "qmsum.jsonl")
    evaluate.main(["--compare", "a", "b"])
    shown = capsys.readouterr().out
    assert "| samsum   | 2       | 37.50 | 50.00 | +12.50 [+0.00, +25.00] |" in shown
    assert "qmsum" not in shown
    assert not list(Path().rglob("result*"))
    evaluate.main(["--compare", "a", "b", "c"])
    shown = capsys.readouterr().out
    assert "samsum: 1 samples that are not in every run are left out" in shown
    assert "| samsum   | 1       | 75.00 | 100.00 | +25.00 [+25.00, +25.00] | 75.00 | +0.00 [+0.00, +0.00] |" in shown


@pytest.mark.parametrize(
    ("others", "words"),
    [
        (["a"], "--compare needs two folders"),
        (["a", "none"], "the folder none is not there"),
        (["a", "d"], "no data set is in every one of a, d"),
        (["a", "other"], "other/samsum.jsonl line 2 answers another sample than a/samsum.jsonl"),
    ],
)
def test_runs_that_cannot_be_compared(others, words):
    write("a")
    write("d", "qmsum.jsonl")
    write("other", lines=[LINES[0], LINES[1] | {"answers": ["Rob"]}])
    with pytest.raises(InputError) as error:
        evaluate.main(["--compare", *others])
    assert words in str(error.value)
