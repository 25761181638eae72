"""Numbers of the report: those of `eval.py`, of whole runs only, and what follows from them."""

import importlib
import json
import random
import shutil
from fractions import Fraction
from pathlib import Path

import pandas as pd
import pytest
from made_runs import make_bench, make_fidelity, make_grid, make_helm, make_run, write_lines, write_manifest
from matplotlib.patches import StepPatch
from tiny import save_rows, save_tiny

import pred
from squeeze import InputError
from squeeze.benchmarks.longbench.data import generation_lengths
from squeeze.report import command as report
from squeeze.report import layer_figures, results
from squeeze.report.captions import run_cells
from squeeze.report.layers import chosen, parse_layers
from squeeze.runs import inventory

evaluate = importlib.import_module("eval")


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def read(*paths):
    return results.read(inventory.find([Path(path) for path in paths]))


def row(frame, folder):
    [found] = frame[frame["folder"] == str(folder)].to_dict("records")
    return found


def test_scores_and_intervals_are_evals():
    make_grid(Path("pred_Long/M"))
    make_run(Path("pred_e/M/full"), lengths=[10, 10, 4100, 4200, 4300, 10])
    found = read("pred_Long", "pred_e")
    assert len(found.runs) == 1 + 2 + 2 * 3 * 2 + 1
    for one in found.runs.to_dict("records"):
        evaluate.main([one["folder"]])
        detail = json.loads(Path(one["folder"], "result_detail.json").read_text())["datasets"]["samsum"]
        assert [one["score"], one["low"], one["high"]] == [detail["score"], *detail["interval"]]
        if one["benchmark"] == "LongBench-E":
            shown = json.loads(Path(one["folder"], "result.json").read_text())["samsum"]
            assert results.shown_score(one) == shown == detail["buckets"]
            assert shown["8k+"] is None
    pd.testing.assert_frame_equal(read("pred_Long", "pred_e").runs, found.runs)


def test_runs_of_pred(monkeypatch):
    monkeypatch.setitem(generation_lengths(), "samsum", 6)
    save_tiny(Path("tiny"))
    save_rows(Path("data"), count=3)
    flags = ["--model", "tiny", "--device", "cpu", "--dtype", "float32", "--data_dir", "data"]
    sizes = ["--enable_squeeze", "--ini_size", "0.3", "--KV_class3", "0.1", "--allocation", "squeeze-log"]
    for more in ([], sizes, [*sizes, "--fidelity"]):
        pred.main([*flags, *more])
    found = read("pred_Long")
    assert found.problems == []
    assert list(found.runs["allocation"]) == ["full", "squeeze-log"]
    one = row(found.runs, "pred_Long/tiny/squeeze-log/0.3/10")
    assert (one["ini_size"], one["KV_class3"], one["seed"], one["samples"]) == (0.3, 0.1, 42, 3)
    assert one["command"].startswith("python pred.py --model tiny")
    assert results.full_of(found.runs, next(found.runs.iloc[1:].itertuples())).folder == "pred_Long/tiny/full"
    [compared] = found.fidelity.to_dict("records")
    said = json.loads(Path(compared["folder"], "run.json").read_text())["datasets"]["samsum"]
    assert [compared["kl"], compared["low"], compared["high"]] == [said["kl"][key] for key in ("mean", "low", "high")]
    layers = parse_layers(Path(one["folder"]), "samsum")
    assert len(layers) == 3 * 5
    assert layers["similarity"].between(-1, 1).all(), "similarities are in the samples"
    assert set(layers["layer_class"]) <= {1, 2, 3}


def test_a_deleted_folder_takes_its_rows_and_no_others_along():
    make_grid(Path("pred_Long/M"))
    before = read("pred_Long")
    gone = "pred_Long/M/paper/0.2/5"
    shutil.rmtree(gone)
    after = read("pred_Long")
    for old, new in ((before.runs, after.runs), (before.fidelity, after.fidelity)):
        kept = old[~old["folder"].str.startswith(gone)].reset_index(drop=True)
        assert len(kept) == len(old) - 1
        pd.testing.assert_frame_equal(kept, new)


def no_json(folder):
    (folder / "run.json").write_text('{"settings": ')


def no_manifest(folder):
    (folder / "run.json").write_text("[]")


def change(**what):
    def edit(folder):
        manifest = json.loads((folder / "run.json").read_text())
        manifest["datasets"]["samsum"] |= what
        write_manifest(folder, manifest["settings"], manifest["datasets"])

    return edit


def not_finished(folder):
    manifest = json.loads((folder / "run.json").read_text())
    del manifest["datasets"]["samsum"]["samples"]
    write_manifest(folder, manifest["settings"], manifest["datasets"])


def line_lost(folder):
    path = folder / "samsum.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def torn(folder):
    path = folder / "samsum.jsonl"
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (no_json, "run.json line 1 is not JSON"),
        (no_manifest, "run.json is not a JSON object"),
        (not_finished, "samsum is not finished: start pred.py"),
        (lambda folder: write_lines(folder / "samsum.partial.1.jsonl", []), "(samsum.partial.1.jsonl is there)"),
        (line_lost, "has 5 lines, but run.json counts 6 samples"),
        (torn, "line 6 is not JSON: the file ends in the middle of a line"),
        (lambda folder: (folder / "samsum.jsonl").unlink(), "No such file"),
        (change(starts=[]), "run.json: samsum: starts is not a list of length >= 1, got []"),
        (change(kept="much"), 'run.json: samsum: kept is not a number, got "much"'),
    ],
)
def test_what_is_not_whole_is_named_and_left_out(damage, words):
    make_run(Path("runs/full"))
    damage(make_run(Path("runs/bad"), ini_size=0.4, KV_class3=0.2))
    found = read("runs")
    assert list(found.runs["folder"]) == ["runs/full"]
    [problem] = found.problems
    assert words in problem
    assert "runs/bad" in problem


def test_helm_has_its_rouge_or_the_command_that_scores():
    make_helm(Path("pred_xsum/M/full"), (30.0, 9.5, 22.0))
    make_helm(Path("pred_xsum/M/0.4/25"), ini_size=0.4, KV_class3=0.25)
    make_helm(Path("pred_xsum/M/0.4/10"), (1.0, 1.0, 1.0), ini_size=0.4, KV_class3=0.1)
    Path("pred_xsum/M/0.4/10/result.json").write_text('{"xsum": {"ROUGE-2": null}}')
    found = read("pred_xsum")
    full = row(found.runs, "pred_xsum/M/full")
    assert full["score"] == 9.5 and pd.isna(full["low"])
    assert results.shown_score(full) == {"ROUGE-1": 30.0, "ROUGE-2": 9.5, "ROUGE-L": 22.0}
    assert pd.isna(row(found.runs, "pred_xsum/M/0.4/25")["score"])
    assert found.unscored == ["sh script/helm.sh pred_xsum/M/0.4/25"]
    assert found.problems == [
        "pred_xsum/M/0.4/10/result.json: xsum: ROUGE-2 is not a number, got null: sh script/helm.sh scores it"
    ]


def test_fidelity_and_bench():
    make_fidelity(Path("runs/0.4/20/fidelity"), 0.25, ini_size=0.4, KV_class3=0.2)
    make_bench(Path("runs/bench.json"))
    Path("runs/other").mkdir()
    Path("runs/other/bench.json").write_text('{"runs": [{}]}')
    found = read("runs")
    assert found.runs.empty
    assert row(found.fidelity, "runs/0.4/20/fidelity")["kl"] == 0.25
    assert list(found.bench["batch_size"]) == [1, 1, 8, 8], "what failed is no row"
    assert found.bench["tokens_per_second"].iloc[2] == pytest.approx(8 / 0.1)
    assert found.problems == ["runs/other/bench.json: runs[0] has no field spec"]


def frame(rows):
    base = {"model": "M", "benchmark": "LongBench", "dataset": "samsum", "seed": 42, "samples": 6, "data": "d"}
    return pd.DataFrame([base | {"folder": f"run-{index:02}"} | one for index, one in enumerate(rows)])


def test_cheapest_against_the_obvious():
    chance = random.Random(0)
    for _ in range(30):
        full = round(chance.uniform(1, 60), 2)
        rows = [
            {"algorithm": "-", "allocation": "full", "ini_size": None, "KV_class3": None, "score": full, "kept": 1.0}
        ]
        for _ in range(25):
            size = chance.choice([0.1, 0.2, 0.3, 0.4])
            one = {"algorithm": chance.choice(["h2o", "streaming"]), "ini_size": size, "KV_class3": size / 2}
            # Among the scores are those exactly on the border.
            score = round(full * chance.choice([0.9, 0.95, 0.97, 0.99, 0.999]), 2)
            allocation = chance.choice(["uniform", "squeeze", "squeeze-log", "paper"])
            rows.append(one | {"allocation": allocation, "score": score, "kept": size})
        for found in results.cheapest(frame(rows)).to_dict("records"):
            good = [
                one
                for one in rows[1:]
                if one["algorithm"] == found["algorithm"]
                and (one["allocation"] == "uniform") == (found["kind"] == "uniform")
                and Fraction(str(one["score"])) >= (1 - Fraction(found["within"], 100)) * Fraction(str(full))
            ]
            if not good:
                assert pd.isna(found["kept"]) and found["reason"] in ("none", f"no {found['kind']} run")
                continue
            least = min(one["kept"] for one in good)
            assert (found["kept"], found["full"]) == (least, full)
            assert found["score"] == max(one["score"] for one in good if one["kept"] == least)


def test_cheapest_compares_the_same_samples_only():
    full = {"algorithm": "-", "allocation": "full", "ini_size": None, "KV_class3": None, "score": 10.0, "kept": 1.0}
    squeezed = {"algorithm": "h2o", "allocation": "squeeze", "ini_size": 0.2, "KV_class3": 0.1, "score": 11.0}
    squeezed |= {"kept": 0.2}
    assert set(results.cheapest(frame([squeezed]))["reason"]) == {"no uniform run", "no run of the full cache"}
    few = results.cheapest(frame([full, squeezed | {"samples": 4}]))
    assert "the full cache's run (6 samples) answered other samples" in set(few["reason"])
    unscored = results.cheapest(frame([full | {"score": float("nan")}, squeezed]))
    assert "the full cache's run is not scored yet" in set(unscored["reason"])
    seeds = frame([full | {"seed": 1, "score": 90.0}, full, squeezed])
    assert results.full_of(seeds, next(seeds.iloc[2:].itertuples())).score == 10.0


def test_sensitivity_groups():
    make_grid(Path("runs"), allocations=("squeeze", "paper"))
    make_run(Path("runs/h2o/0.3/10"), ini_size=0.3, KV_class3=0.1, algorithm="h2o")  # one ratio: no line
    found = results.sensitivity(read("runs").runs)
    groups = found.groupby(["algorithm", "allocation", "ini_size"])["ratio"].agg(list).to_dict()
    assert groups == {
        ("streaming", allocation, size): [0.25, 0.5, 1.0] for allocation in ("squeeze", "paper") for size in (0.2, 0.4)
    }
    runs = read("runs").runs.set_index("folder")["score"]
    assert (found["score"].to_numpy() == runs[found["folder"]].to_numpy()).all()


def test_layers_of_the_run_in_the_middle():
    make_grid(Path("runs"), sizes=(0.1, 0.2, 0.4), allocations=("squeeze",), ratios=(0.25, 0.5, 0.75))
    [folder] = chosen(read("runs").runs)["folder"]
    assert folder == "runs/squeeze/0.2/10"
    layers = parse_layers(Path(folder), "samsum")
    assert list(layers.columns) == ["prompt", "layer", "similarity", "layer_class", "budget", "share", "reach"]
    assert (layers["reach"] == 1).all()
    assert layers["share"].mean() == pytest.approx(0.2, abs=0.01)
    old = make_run(Path("old"), ini_size=0.4, KV_class3=0.2, similarities=False)
    assert parse_layers(old, "samsum")["similarity"].isna().all()
    write_lines(old / "samples/samsum.jsonl", [{"index": 0, "stats": {"classes": [1], "budgets": [1, 2]}}])
    with pytest.raises(InputError, match="line 1: stats has no field prompt_tokens"):
        parse_layers(old, "samsum")
    stats = {"prompt_tokens": 9, "classes": [1], "budgets": [1, 2]}
    write_lines(old / "samples/samsum.jsonl", [{"index": 0, "stats": stats}])
    with pytest.raises(InputError, match="has samples of 1 and 2 layers"):
        parse_layers(old, "samsum")


@pytest.mark.parametrize(
    ("kinds", "reached"),
    [
        ([{"layers": "0, 2-3", "window": 30}, {"layers": "1, 4"}], [0.25, 1, 0.25, 0.25, 1]),
        ([{"layers": "0-3", "chunk": 300}, {"layers": "4"}], [1] * 5),  # longer than the prompt
        ([{"layers": "0-4", "window": 30}], [1] * 5),  # all alike: a fraction of the prompt, as published
    ],
)
def test_what_a_layers_own_window_reaches(kinds, reached):
    folder = make_run(Path("run"), ini_size=0.2, KV_class3=0.1)
    stats = {"prompt_tokens": 120, "classes": [1] * 5, "budgets": [9] * 5, "similarities": [0.9] * 5}
    write_lines(folder / "samples/samsum.jsonl", [{"index": 0, "stats": stats}])
    manifest = json.loads((folder / "run.json").read_text())
    manifest["datasets"]["samsum"]["starts"][-1]["attention"] = {"layers": kinds}
    (folder / "run.json").write_text(json.dumps(manifest))
    layers = parse_layers(folder, "samsum")
    assert layers["reach"].tolist() == reached
    bars = layer_figures.budget_bars(layers, 0.2, "").axes[0]
    [line] = [patch for patch in bars.patches if isinstance(patch, StepPatch)]
    assert line.get_data().values.tolist() == pytest.approx([20 * reach for reach in reached])


def test_the_same_run_by_two_ways_is_one():
    make_run(Path("runs/full"))
    assert len(read("runs", "runs/full", "./runs/../runs").runs) == 1


def test_a_speed_that_is_a_share_of_a_batchs_is_told(capsys):
    """In the text, on the page, and in the numbers behind it."""
    make_run(Path("pred_Long/M/full"))
    make_run(Path("pred_Long/M/cut"), ini_size=0.2, KV_class3=0.12, together=8)
    found = read("pred_Long")
    full, cut = (row(found.runs, Path(f"pred_Long/M/{name}")) for name in ("full", "cut"))
    assert (full["together"], cut["together"]) == (1, 8)
    assert run_cells(full)["tokens/s"] == ("10.0", 10)
    assert run_cells(cut)["tokens/s"] == ("50.0 (8 runs at once)", 50)
    report.main(["pred_Long"])
    assert "| 50.0 (8 runs at once) |" in capsys.readouterr().out
