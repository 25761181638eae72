"""The table of runs: made from what the runs recorded, nothing else."""

import json

from squeeze import report


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
    assert "run.json is not a run's manifest" in capsys.readouterr().err


def test_scores_by_length_stand_side_by_side(tmp_path, capsys):
    write_run(tmp_path / "e", SETTINGS, SUMMARY, {"0-4k": 20, "4-8k": 31.25, "8k+": None})
    assert report.main([str(tmp_path)]) == 0
    assert "| 20.00/31.25/- |" in capsys.readouterr().out
