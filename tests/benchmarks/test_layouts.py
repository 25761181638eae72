"""Prediction files of other tools: found, read as those tools mean them, and scored and compared like any."""

import importlib
import json
from pathlib import Path

import pytest

from squeeze import InputError
from squeeze.benchmarks.longbench import layouts, scoring

evaluate = importlib.import_module("eval")

ROW = {
    "pred": "Ann forgot the keys\nDialogue:",
    "answers": ["Ann forgot the tickets"],
    "all_classes": None,
    "length": 5,
}
ROWS = [ROW, ROW | {"pred": "", "answers": ["Bob", "Rob"]}]
CLASSES = ["Date", "Other number", "City"]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def lines(path, rows=ROWS):
    """JSON Lines, as LongBench and KVCache-Factory write them."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def kvcache(path, rows=ROWS, **more):
    """With everything that KVCache-Factory writes into a line."""
    dataset = Path(path).parent.name
    extra = {"prompt": "p", "input": "i", "context": "c", "dataset": dataset, "language": "en", "_id": "x"}
    lines(path, [extra | row | more for row in rows])


def mini(path, rows=ROWS, indent=4):
    """MiniLongBench's document."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    content = {}
    for number, row in enumerate(rows):
        gold = row["answers"]
        if row["all_classes"]:
            gold = {"all_classes": row["all_classes"], "answers": gold}
        content[str(number)] = {"origin_prompt": "p", "prediction": row["pred"], "gold": gold, "time": 0.5}
    Path(path).write_text(json.dumps(content, indent=indent, ensure_ascii=False), encoding="utf-8")


def files():
    return sorted(str(path) for path in Path().rglob("*") if path.is_file())


def test_a_method_of_kvcache_factory(capsys):
    for dataset in ("samsum", "qmsum"):
        kvcache(f"model_128/{dataset}/FullKV.json")
        kvcache(f"model_128/{dataset}/H2O.json", [ROW | {"pred": "Ann forgot the tickets"}, ROWS[1]])
        Path(f"model_128/{dataset}/metrics.json").write_text("{}")
    before = files()
    for name in ("model_128/H2O", "model_128/H2O.json", "model_128/H2O/"):
        evaluate.main([name])
        shown = capsys.readouterr().out
        assert "| samsum   | 2       | 50.00 |" in shown and "| qmsum    | 2       | 50.00 |" in shown
        assert "nothing is written beside" in shown
    for name in ("model_128/samsum/FullKV", "model_128/samsum/FullKV.json"):
        evaluate.main([name])
        shown = capsys.readouterr().out
        assert "| samsum   | 2       | 37.50 |" in shown and "qmsum" not in shown
    evaluate.main(["--compare", "model_128/FullKV", "model_128/H2O"])
    shown = capsys.readouterr().out
    assert "| samsum   | 2       | 37.50 | 50.00 | +12.50 [+0.00, +25.00] |" in shown
    assert "run 2: model_128/H2O" in shown
    evaluate.main(["model_128/H2O", "--datasets", "qmsum"])
    assert "samsum" not in capsys.readouterr().out
    assert files() == before


@pytest.mark.parametrize("folder", ["model_128", "model_128/samsum"])
def test_which_of_several_methods_is_asked(folder, monkeypatch):
    for method in ("FullKV", "H2O", "SnapKV"):
        kvcache(f"model_128/samsum/{method}.json")
    with pytest.raises(InputError) as error:
        evaluate.main([folder])
    assert f"{folder} has the predictions of 3 methods, FullKV.json, H2O.json, SnapKV.json: say which" in str(
        error.value
    )
    with pytest.raises(InputError, match="say which"):
        evaluate.main(["--compare", folder, "model_128/samsum/H2O.json"])
    monkeypatch.chdir("model_128/samsum")
    with pytest.raises(InputError, match="say which, such as FullKV"):
        evaluate.main(["."])
    evaluate.main(["FullKV"])


def test_the_only_method_is_the_one(capsys):
    kvcache("model_128/samsum/H2O.json")
    kvcache("model_128/trec/H2O.json", [ROW | {"pred": "Date", "answers": ["Date"], "all_classes": CLASSES}])
    for folder in ("model_128", "model_128/trec"):
        evaluate.main([folder])
        assert "| trec     | 1       | 100.00 |" in capsys.readouterr().out


def test_minilongbench(capsys):
    classes = [
        ROW | {"pred": "Date\nCity", "answers": ["Date"], "all_classes": CLASSES},
        ROW | {"pred": "Other number, City", "answers": ["City"], "all_classes": CLASSES[1:]},
    ]
    mini("example/MiniLongBench_samsum.json")
    mini("example/MiniLongBench_trec.json", classes, indent=None)
    mini("example/MiniLongBench_multifieldqa_zh.json", [ROW | {"pred": "答案", "answers": ["答案"]}])
    mini("other/LongBench_samsum.json", [ROW | {"pred": "Ann forgot the tickets"}, ROWS[1]])
    before = files()
    evaluate.main(["example"])
    shown = capsys.readouterr().out
    assert "| samsum          | 2       | 37.50  |" in shown
    assert "| trec            | 2       | 75.00  |" in shown, "only the first line counts, and each row's own classes"
    assert "| multifieldqa_zh | 1       | 100.00 |" in shown
    evaluate.main(["example/MiniLongBench_trec.json"])
    assert "| trec     | 2       | 75.00 |" in capsys.readouterr().out
    lines("ours/samsum.jsonl")
    evaluate.main(["--compare", "ours", "example", "other"])
    assert "| 37.50 | 37.50 | +0.00 [+0.00, +0.00] | 50.00 | +12.50 [+0.00, +25.00] |" in capsys.readouterr().out
    assert files() == sorted([*before, "ours/samsum.jsonl"])


@pytest.mark.parametrize("path", ["samsum.jsonl", "samsum.json", "x/samsum/H2O.jsonl", "samsum.v2.jsonl"])
def test_a_file_by_itself(path, capsys):
    lines(path)
    evaluate.main([path])
    assert "| samsum   | 2       | 37.50 |" in capsys.readouterr().out
    assert files() == [path], "the scores of one file would take the place of a folder's"
    evaluate.main(["--compare", path, path])
    assert "37.50 | 37.50 | +0.00" in capsys.readouterr().out


def test_a_file_whose_rows_say_the_data_set(capsys):
    lines("H2O.jsonl", [row | {"dataset": "samsum"} for row in ROWS])
    evaluate.main(["H2O.jsonl"])
    assert "| samsum   | 2       | 37.50 |" in capsys.readouterr().out
    lines("x.jsonl")
    with pytest.raises(InputError, match=r"x\.jsonl is named after none of the data sets, nor is its folder: narr"):
        evaluate.main(["x.jsonl"])


def test_a_file_of_a_run_has_as_many_lines_as_the_run(capsys):
    lines("run/samsum.jsonl", ROWS[:1])
    Path("run/run.json").write_text(json.dumps({"datasets": {"samsum": {"samples": 2}}}))
    with pytest.raises(InputError, match=r"samsum\.jsonl has 1 lines, but run\.json counts 2 samples"):
        evaluate.main(["run/samsum.jsonl"])


def test_by_length_where_lengths_are_known(capsys):
    kvcache("m/samsum/H2O.json", [ROW | {"length": 100}, ROWS[1] | {"length": 9000}])
    evaluate.main(["m", "--pred", "e"])
    assert "| 75.00 | -    | 0.00 |" in capsys.readouterr().out
    mini("mini/MiniLongBench_samsum.json")
    with pytest.raises(InputError, match=r"MiniLongBench_samsum\.json has no field length, as files of MiniLongBench"):
        evaluate.main(["mini", "--pred", "e"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "samsum.json"),
        (b"{}", "samsum.json has no rows"),
        (b"{", "is not JSON"),
        (b"[]", "samsum.json line 1"),
        (b"\x00", "samsum.json line 1 is not UTF-8 text: it has bytes that are zero"),
        (b"\xff\n", "samsum.json line 1"),
        (b'{"0": 5}', "samsum.json: 0 is not a JSON object"),
        (b'{\n"0": {"prediction": 5, "gold": ["a"]}\n}', "0.prediction is not text"),
        (b'{"0": {"prediction": "a"}}', "0 has no field gold"),
        (b'{"0": {"prediction": "a", "gold": "b"}}', "gold"),
        (b'{"0": {"prediction": "a", "gold": []}}', "samsum.json answer 0: answers is not a list"),
        (b'{"0": {"prediction": "a", "gold": {"all_classes": ["b"]}}}', "has no field answers"),
        (b'{"pred": "a", "answers": ["b"]}', "samsum.json line 1 has no field all_classes"),
        (b'{"pred": "a", "answers": ["b"], "all_classes": null}\n{"pred": ', "samsum.json line 2 is not JSON"),
        (b"[" * 100_000, "samsum.json line 1"),
    ],
    ids=range(15),
)
def test_damaged_files_are_a_sentence(content, words):
    Path("x").mkdir()
    for path in (Path("x/MiniLongBench_samsum.json"), Path("samsum/H2O.json")):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        with pytest.raises(InputError) as error:
            evaluate.main([str(path)])
        shown = str(error.value).replace("MiniLongBench_samsum.json", "samsum.json").replace("H2O.json", "samsum.json")
        assert words in shown and "\n" not in shown


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["none"], "the folder none is not there"),
        (["m/none"], "the folder m/none is not there"),
        (["m/samsum/none"], "the folder m/samsum/none is not there"),
        (["m", "--datasets", "qmsum"], "m has no qmsum.jsonl: there are predictions of samsum"),
        (["empty"], "empty has no prediction file such as samsum.jsonl"),
        (["."], "has no prediction file such as samsum.jsonl: there are "),
        (["m", "--compare", "m"], "--compare takes all runs behind it: give m there"),
        (["--compare", "m"], "--compare needs two folders"),
    ],
)
def test_what_is_there_is_named(flags, words):
    kvcache("m/samsum/H2O.json")
    Path("empty").mkdir()
    with pytest.raises(InputError) as error:
        evaluate.main(flags)
    assert words in str(error.value)


def test_runs_to_compare_may_be_named_in_several_places(capsys):
    lines("a/samsum.jsonl")
    lines("b/samsum.jsonl")
    evaluate.main(["--compare", "a", "--datasets", "samsum", "--compare", "b"])
    assert "run 1: a\nrun 2: b\n" in capsys.readouterr().out


def test_layouts_agree():
    """The same answers score the same, sample by sample, whatever they lie in."""
    lines("a/qmsum.jsonl")
    kvcache("b/qmsum/H2O.json")
    mini("c/MiniLongBench_qmsum.json")
    found = [layouts.read(layouts.find(Path(one)).files["qmsum"], "qmsum") for one in ("a", "b", "b/H2O", "c")]
    scores = [scoring.sample_scores("qmsum", rows) for rows in found]
    assert scores == [scores[0]] * 4 and scores[0][0] == pytest.approx(2 / 3)
