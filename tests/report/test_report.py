"""The tables of runs as text, and the folder of the page: what is in it, and what is never touched."""

import csv
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from made_runs import make_bench, make_fidelity, make_grid, make_helm, make_run
from test_calibrate import save_curves

from squeeze.allocations import calibration
from squeeze.report import command as report
from squeeze.report.layer_figures import head_shares
from squeeze.report.layers import parse_layers

evaluate = importlib.import_module("eval")


def write_run(folder, settings, summary, score=None):
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"settings": settings, "datasets": {"samsum": summary}}))
    if score is not None:
        (folder / "result.json").write_text(json.dumps({"samsum": score}))


SUMMARY = {
    "starts": [{"model": {"name": "M"}}],
    "samples": 6,
    "kept": 0.2,
    "kv_bytes": 19_300_000,
    "tokens_per_second": 13.4,
    "layers_per_class": [3, 10.5, 16.5],
}
SETTINGS = {"cache": "squeezed", "algorithm": "h2o", "allocation": "squeeze", "ini_size": 0.2, "KV_class3": 0.12}


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_table(tmp_path, capsys):
    write_run(tmp_path / "a/squeezed", SETTINGS, SUMMARY, 21.5)
    write_run(tmp_path / "a/uniform", SETTINGS | {"KV_class3": 0.2}, SUMMARY)
    write_run(tmp_path / "a/unfinished", SETTINGS, {"settings": {}})
    write_run(tmp_path / "b", {"cache": "full"}, SUMMARY | {"kept": 1.0, "kv_bytes": 96_000_000}, 33.47)
    assert report.main([str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    title, header, _, *lines = capsys.readouterr().out.splitlines()
    assert title.startswith("samsum: ")
    assert cells(header) == list(report.COLUMNS)
    assert [cells(line) for line in lines] == [
        ["M", "full cache", "-", "-", "-", "6", "33.47", "100.0%", "96.0", "13.4", "-"],
        ["M", "h2o", "squeeze", "0.2", "0.12", "6", "21.50", "20.0%", "19.3", "13.4", "3/10.5/16.5"],
        ["M", "h2o", "uniform", "0.2", "0.2", "6", "-", "20.0%", "19.3", "13.4", "-"],
    ]


def test_what_holds_no_finished_run_is_a_sentence(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path} holds no run: pred.py makes one\n"
    write_run(tmp_path / "run", SETTINGS, {"settings": {}})
    assert report.main([str(tmp_path)]) == 2
    assert "is finished: start pred.py again" in capsys.readouterr().err
    (tmp_path / "run/run.json").write_text("{}")
    assert report.main([str(tmp_path)]) == 2
    assert "run.json has no field settings" in capsys.readouterr().err


def test_scores_by_length_stand_side_by_side(tmp_path, capsys):
    write_run(tmp_path / "e", SETTINGS, SUMMARY, {"0-4k": 20, "4-8k": 31.25, "8k+": None})
    assert report.main([str(tmp_path)]) == 0
    assert "| 20.00/31.25/- |" in capsys.readouterr().out


def test_what_is_left_out_is_named(tmp_path, capsys):
    make_run(tmp_path / "a/full")
    (make_run(tmp_path / "a/bad", ini_size=0.4, KV_class3=0.2) / "run.json").write_text("{")
    assert report.main([str(tmp_path / "a")]) == 0
    shown = capsys.readouterr()
    assert "| M     | full cache |" in shown.out
    assert f"left out: {tmp_path}/a/bad/run.json line 1 is not JSON" in shown.err
    assert report.main([str(tmp_path / "a"), "--out", str(tmp_path / "out")]) == 0
    assert f"left out: {tmp_path}/a/bad/run.json line 1 is not JSON" in capsys.readouterr().out
    assert "a/bad/run.json line 1 is not JSON" in (tmp_path / "out/index.html").read_text()


@pytest.mark.parametrize(("count", "lines"), [(5, 6), (6, 2)])
def test_many_that_are_not_finished_are_one_line(tmp_path, capsys, count, lines):
    make_run(tmp_path / "full")
    (make_run(tmp_path / "bad", ini_size=0.4, KV_class3=0.2) / "run.json").write_text("{")
    for number in range(count):
        write_run(tmp_path / f"part{number}", SETTINGS, {"settings": {}})
    assert report.main([str(tmp_path)]) == 0
    said = capsys.readouterr().err.splitlines()
    assert len(said) == lines and all(line.startswith("left out: ") for line in said)
    assert (f"left out: {count} data sets of runs that are not finished, such as" in said[-1]) == (lines == 2)


def test_fidelity_and_bench_as_text(tmp_path, capsys):
    make_fidelity(tmp_path / "0.4/20/fidelity", 0.25, ini_size=0.4, KV_class3=0.2)
    make_bench(tmp_path / "bench.json")
    assert report.main([str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "| 0.2500 | 0.1667–0.3750 | 90.0%     | 40.0%   | 40     |" in shown
    assert "| squeeze | streaming squeezed |" in shown


def test_the_text_tables_need_no_pandas(tmp_path):
    make_run(tmp_path / "full")
    code = "import sys; from squeeze.report import command; command.main(sys.argv[1:]); "
    code += "print([name for name in ('pandas', 'matplotlib', 'itables', 'torch', 'scipy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_page_and_its_files(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    root = make_grid(Path("pred_Long/M"))
    make_helm(Path("pred_xsum/M/0.4/25"), ini_size=0.4, KV_class3=0.25)
    make_bench(Path("bench/bench.json"))
    flags = ["pred_Long", "pred_xsum", "bench", "--out", "out/report"]
    assert report.main(flags) == 0
    shown = capsys.readouterr().out
    assert "not scored yet: sh script/helm.sh pred_xsum/M/0.4/25" in shown
    assert shown.endswith("out/report/index.html\n")
    first = files(Path("out/report"))
    page = first["index.html"].decode()
    for section in ("cheapest", "score", "kl", "sensitivity", "layers", "bench", "runs"):
        assert f'id="{section}"' in page
        assert f"{section}.csv" in first
    assert "python -m squeeze.report pred_Long pred_xsum bench --out out/report" in page
    assert "<code>sh script/helm.sh pred_xsum/M/0.4/25</code>" in page
    plots = {name for name in first if name.endswith(".svg")}
    assert {name.removesuffix(".svg") + ".png" for name in plots} == {name for name in first if name.endswith(".png")}
    assert {"score-M-samsum-streaming.svg", "kl-M-samsum-streaming.svg", "similarity-M-samsum.svg"} <= plots
    for link in re.findall(r'href="([^"#]+)"', page):
        assert link == "data:," or link in first
    assert not re.findall(r'(?:src|href|srcset)\s*=\s*"(?!data:|#)[^"]*:', page), "nothing is loaded from elsewhere"
    assert not re.findall(r"url\(\s*[\"']?(?!data:)", page) and "@import" not in page
    # The CSV has eval.py's numbers.
    for row in csv.DictReader(first["score.csv"].decode().splitlines()):
        evaluate.main([row["folder"]])
        detail = json.loads(Path(row["folder"], "result_detail.json").read_text())["datasets"]["samsum"]
        assert [float(row[key]) for key in ("score", "low", "high")] == [detail["score"], *detail["interval"]]
    # The same again, to the byte; and what is no more is gone from the folder.
    assert report.main(flags) == 0
    assert files(Path("out/report")) == first
    for path in root.glob("**/fidelity/run.json"):
        path.unlink()
    assert report.main(flags) == 0
    after = files(Path("out/report"))
    assert not any(name.startswith("kl") for name in after)
    assert set(after) == set(json.loads(after["report.json"])["files"]) | {"report.json"}


def test_a_folder_with_other_files_is_left_alone(tmp_path, capsys):
    make_run(tmp_path / "runs/full")
    out = tmp_path / "out"
    out.mkdir()
    (out / "index.html").write_text("mine")
    flags = [str(tmp_path / "runs"), "--out", str(out)]
    assert report.main(flags) == 2
    assert "out holds index.html, which this command did not write" in capsys.readouterr().err
    assert files(out) == {"index.html": b"mine"}
    (out / "index.html").unlink()
    assert report.main(flags) == 0
    (out / "notes.txt").write_text("mine")
    before = files(out)
    assert report.main(flags) == 2
    assert "out holds notes.txt, which" in capsys.readouterr().err
    assert files(out) == before
    # A list of files cannot reach out of the folder.
    (out / "notes.txt").unlink()
    (out / "report.json").write_text(
        json.dumps({"made_by": "python -m squeeze.report", "files": [*before, "../runs/full/run.json"]})
    )
    assert report.main(flags) == 2 or (tmp_path / "runs/full/run.json").exists()
    assert (tmp_path / "runs/full/run.json").exists()
    assert report.main([str(tmp_path / "runs"), "--out", str(out / "index.html")]) == 2
    assert "is not a folder" in capsys.readouterr().err


def test_names_are_text_and_not_markup(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = '<script>alert("x")</script>&$x_{1}$'
    make_run(Path("runs<b>/full"), model=name)
    make_run(Path("runs<b>/0.4/20"), ini_size=0.4, KV_class3=0.2, model=name)
    assert report.main(["runs<b>", "--out", "out"]) == 0
    page = Path("out/index.html").read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt;&amp;$x_{1}$" in page
    assert "runs&lt;b&gt;/0.4/20" in page
    assert all(re.fullmatch(r"[\w.-]+", path.name) for path in Path("out").iterdir())
    [score] = Path("out").glob("score-*.svg")
    assert "&lt;script&gt;" in score.read_text() and "$x_{1}$" in score.read_text()


def test_a_calibrated_runs_loss_curves_are_drawn(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "config/calibration/M-streaming.json"
    place.parent.mkdir(parents=True)
    losses = [[[[0.5 + layer / 10, 0.5] for layer in range(8)]] * 2]
    save_curves(place, algorithm="streaming", start_size=4, loss=losses)
    sha256 = calibration.read_calibration(place).sha256
    make_run(Path("runs/calibrated/0.2"), ini_size=0.2, allocation="calibrated", calibration=sha256)
    assert report.main(["runs", "--out", "out"]) == 0
    page = Path("out/index.html").read_text()
    assert Path("out/losses-M-samsum-streaming.svg").exists() and Path("out/budgets-M-samsum-calibrated.svg").exists()
    assert "keep 40% of the prompt, over that of 40% everywhere, less 1, mean over prompts (1)" in page
    assert "(M-streaming.json). Cutting to 0.5 of that costs the most in layers 7, 6, 5." in page
    save_curves(place, algorithm="streaming", start_size=4, loss=[[[[0.5, 0.5]] * 8] * 2])
    assert report.main(["runs", "--out", "out"]) == 0
    page = Path("out/index.html").read_text()
    assert "runs/calibrated/0.2 was made from loss curves that are not in" in page
    assert not list(Path("out").glob("losses*")) and Path("out/budgets-M-samsum-calibrated.svg").exists()


def test_budgets_of_heads_are_a_map_with_its_numbers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "config/calibration/M-streaming-heads.json"
    place.parent.mkdir(parents=True)
    losses = [[[[0.5 + head / 10, 0.5] for head in range(16)]] * 2]
    save_curves(place, algorithm="streaming", start_size=4, loss=losses, kv_heads=[2] * 8)
    sha256 = calibration.read_calibration(place).sha256
    run = Path("runs/calibrated/per-head/0.2")
    make_run(run, ini_size=0.2, allocation="calibrated", calibration=sha256, per="head")
    assert report.main(["runs", "--out", "out"]) == 0
    page = Path("out/index.html").read_text()
    assert "calibrated by head" in page and "costs the most in KV heads 15, 14, 13." in page
    assert {path.name for path in Path("out").glob("*by-head.svg")} == {
        "budgets-M-samsum-calibrated-by-head.svg",
        "heads-M-samsum-calibrated-by-head.svg",
    }
    with Path("out/layers.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    stats = json.loads((run / "samples/samsum.jsonl").read_text().splitlines()[0])["stats"]
    assert [row["heads"] for row in rows[:8]] == [" ".join(map(str, own)) for own in stats["budgets"]]
    assert [float(row["budget"]) for row in rows[:8]] == [sum(own) / 2 for own in stats["budgets"]]
    shares = head_shares(parse_layers(run, "samsum"))
    assert pytest.approx(np.array(stats["budgets"]) * 100 / stats["prompt_tokens"]) == shares.T
    assert "The heads of layer 7 differ most" in page


def test_runs_without_similarities_say_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(Path("runs/0.4/20"), ini_size=0.4, KV_class3=0.2, similarities=False)
    assert report.main(["runs", "--out", "out"]) == 0
    page = Path("out/index.html").read_text()
    assert "that did not keep the similarities, so there is no map of them" in page
    assert not list(Path("out").glob("similarity*")) and list(Path("out").glob("budgets*"))
    assert "No run of the full cache on the same samples." in page
    assert "no run of the full cache" in Path("out/cheapest.csv").read_text()
    (Path("runs/0.4/20/samples/samsum.jsonl")).write_text("{\n")
    assert report.main(["runs", "--out", "out"]) == 0
    assert "its layers are not drawn" in Path("out/index.html").read_text()
