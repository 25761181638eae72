"""The distance from the full cache beside the scores, and the sentence on what was seen."""

import json

import pytest
from made_runs import make_fidelity, make_run, write_lines, write_manifest

from squeeze.report import command as report

SCORES = "; the scores of 6 answers "


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def change(folder, settings, summary):
    manifest = json.loads((folder / "run.json").read_text())
    manifest["datasets"]["samsum"] |= summary
    write_manifest(folder, manifest["settings"] | settings, manifest["datasets"])


def make(root, allocation, kl, interval=None, ini_size=0.2, algorithm="h2o", **more):
    """A run below `root`, compared with the full cache: nats a token on each prompt; `None` is no comparison.

    Args:
        interval: of the score, as `eval.py` writes it.
    """
    sizes = {"calibrated": {}, "uniform": {"KV_class3": ini_size}}.get(allocation, {"KV_class3": ini_size / 2})
    sizes |= {"ini_size": ini_size, "algorithm": algorithm}
    sizes |= {"allocation": "squeeze" if allocation == "uniform" else allocation} | more
    folder = root / algorithm / f"{allocation} {sizes}"
    make_run(folder, **sizes)
    if kl is not None:
        known = [one for one in kl if one is not None]
        make_fidelity(folder / "fidelity", sum(known) / len(known) if known else 1, **sizes)
        write_lines(folder / "fidelity/samsum.jsonl", [{"kl": one, "agreement": 0.9, "tokens": 8} for one in kl])
        if not known:
            manifest = json.loads((folder / "fidelity/run.json").read_text())
            del manifest["datasets"]["samsum"]["kl"], manifest["datasets"]["samsum"]["agreement"]
            write_manifest(folder / "fidelity", manifest["settings"], manifest["datasets"])
    if interval is not None:
        detail = {"score": 20, "interval": interval, "per_sample": []}
        (folder / "result_detail.json").write_text(json.dumps({"datasets": {"samsum": detail}}))
    return folder


def shown(root, capsys):
    assert report.main([str(root)]) == 0
    return capsys.readouterr().out.splitlines()


def test_the_table_has_the_distance_of_each_run(tmp_path, capsys):
    make_run(tmp_path / "full")
    make(tmp_path, "squeeze", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    make(tmp_path, "paper", None)
    title, header, _, full, paper, squeeze, *_ = shown(tmp_path, capsys)
    assert title.endswith("; KL in nats a token, and agreement of the likeliest token, are with the full cache")
    assert cells(header) == [*report.COLUMNS[:7], "KL", "agreement", *report.COLUMNS[7:]]
    assert cells(full)[7:9] == ["0.0000", "100.0%"]
    assert cells(paper)[2] == "paper" and cells(paper)[7:9] == ["-", "-"]
    assert cells(squeeze)[2] == "squeeze" and cells(squeeze)[7:9] == ["0.3500", "90.0%"]


@pytest.mark.parametrize(
    ("settings", "summary"),
    [
        ({"dtype": "bfloat16"}, {}),
        ({"calibration": "other"}, {}),
        ({}, {"samples": 5}),
        ({}, {"settings": {"data_sha256": "of other rows"}}),
    ],
)
def test_a_comparison_of_another_configuration_is_not_the_runs(tmp_path, capsys, settings, summary):
    folder = make(tmp_path, "squeeze", [0.1] * 6) / "fidelity"
    change(folder, settings, summary)
    write_lines(folder / "samsum.jsonl", [{"kl": 0.1}] * summary.get("samples", 6))
    title, header, *_, last = shown(tmp_path, capsys)
    assert title == "samsum: LongBench's score; KV is what is held after prefill, mean of the samples"
    assert cells(header) == list(report.COLUMNS) and last.startswith("| M"), "and there is no sentence"


def test_a_damaged_comparison_is_left_out_and_named(tmp_path, capsys):
    folder = make(tmp_path, "squeeze", [0.1] * 6)
    (folder / "fidelity/samsum.jsonl").write_text('{"kl": 0.1}\n')
    assert report.main([str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert "samsum.jsonl has 1 lines, but run.json counts 6 samples" in said.err
    assert cells(said.out.splitlines()[1]) == list(report.COLUMNS)


def test_the_nearest_of_each_evictor_is_named_against_uniform(tmp_path, capsys):
    make_run(tmp_path / "full")
    make(tmp_path, "uniform", [0.4, 0.4, 0.4, 0.4, 0.4, None], [10, 30])
    make(tmp_path, "squeeze", [0.3, 0.3, 0.3, 0.5, None, 0.1], [12, 31])
    make(tmp_path, "calibrated", [0.2, 0.2, 0.2, 0.5, 0.5, 0.1], [40, 50])
    make(tmp_path, "uniform", [0.1] * 6, algorithm="streaming")
    make(tmp_path, "squeeze", [0.3, 0.3, 0.3, 0.05, 0.3, 0.3], algorithm="streaming")
    assert shown(tmp_path, capsys)[-1] == (
        "M on samsum: nearest to the full cache at the same KV kept was calibrated with h2o at 20% KV (KL 0.2833 "
        "against 0.4000 of uniform, nearer on 3 of 5 prompts; its lead over uniform is noise) and uniform with "
        "streaming at 20% KV (KL 0.1000 against "
        f"0.2583 of squeeze, nearer on 5 of 6 prompts){SCORES}are noise in 1 of 3 pairs of these runs, whose 95% "
        "intervals overlap."
    )


@pytest.mark.parametrize(
    ("intervals", "said"),
    [
        ([[0, 30], [10, 40]], "are noise: the 95% intervals overlap in every pair of these runs."),
        ([[0, 30], [30, 40]], "are noise: the 95% intervals overlap in every pair of these runs."),
        ([[30.1, 35], [0, 30]], "have 95% intervals that are apart in every pair of these runs."),
    ],
)
def test_scores_are_noise_where_their_intervals_overlap(tmp_path, capsys, intervals, said):
    make(tmp_path, "uniform", [0.4] * 6, intervals[0])
    make(tmp_path, "squeeze", [0.5] * 6, intervals[1])
    assert shown(tmp_path, capsys)[-1].endswith(f"of 6 prompts){SCORES}{said}")


def test_ties_are_named_together(tmp_path, capsys):
    make(tmp_path, "uniform", [10.00004] * 6)
    make(tmp_path, "squeeze", [9.99996] * 6)
    assert "was squeeze and uniform with h2o at 20% KV (KL 10.0000 each)." in shown(tmp_path, capsys)[-1]
    make(tmp_path, "squeeze-log", [9.5] * 6)
    make(tmp_path, "calibrated", [9.5] * 6)
    assert (
        "was calibrated and squeeze-log with h2o at 20% KV (KL 9.5000 each against 10.0000 of uniform)."
        in (shown(tmp_path, capsys)[-1])
    )


def test_a_lead_that_may_be_chance_is_called_noise(tmp_path, capsys):
    """By the same prompts in pairs: what is a little nearer on all of them leads, whatever the prompts' own spread."""
    make(tmp_path, "uniform", [0.1, 0.2, 0.4, 0.8, 1.6, 3.2])
    make(tmp_path, "squeeze", [0.09, 0.18, 0.37, 0.79, 1.58, 3.17])
    make(tmp_path, "calibrated", [0.1, 0.17, 0.39, 0.77, 1.59, 3.17])
    make(tmp_path, "squeeze-log", [0.05, 0.3, 0.4, 0.7, 1.6, 3.2])
    assert shown(tmp_path, capsys)[-1].endswith(
        "squeeze with h2o at 20% KV (KL 1.0300 against 1.0500 of uniform, nearer on 6 of 6 prompts; its lead over "
        "calibrated and squeeze-log is noise)."
    )


def test_only_the_same_kv_is_compared(tmp_path, capsys):
    make(tmp_path, "uniform", [0.4] * 6)
    larger = make(tmp_path, "squeeze", [0.1] * 6)
    change(larger, {}, {"kept": 0.3})
    make(tmp_path, "calibrated", [0.6] * 6)
    assert "was uniform with h2o at 20% KV (KL 0.4000 against 0.6000 of calibrated" in shown(tmp_path, capsys)[-1]


def test_several_sizes_of_one_allocation_are_told_apart(tmp_path, capsys):
    make(tmp_path, "squeeze", [0.4] * 6)
    make(tmp_path, "squeeze", [0.3] * 6, KV_class3=0.05)
    assert (
        "was squeeze 0.05 with h2o at 20% KV (KL 0.3000 against 0.4000 of squeeze 0.1, nearer on 6 of 6"
        in (shown(tmp_path, capsys)[-1])
    )


def test_nothing_measured_is_said(tmp_path, capsys):
    make(tmp_path, "uniform", [None] * 6)
    make(tmp_path, "squeeze", [0.1] * 6)
    said = shown(tmp_path, capsys)
    assert said[-1] == (
        "M on samsum: no two allocations were compared with the full cache at the same KV kept, so none is the nearer."
    )
    assert cells(said[4])[2:9:5] == ["uniform", "-"]


def test_many_comparisons_are_counted(tmp_path, capsys):
    for number, ini_size in enumerate((0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)):
        make(tmp_path, "uniform", [0.3] * 6, ini_size=ini_size)
        make(tmp_path, "squeeze", [0.2 if number < 5 else 0.4] * 6, ini_size=ini_size)
    assert shown(tmp_path, capsys)[-1] == (
        "M on samsum: nearest to the full cache at the same KV kept was, of 7 comparisons, squeeze in 5 and uniform "
        "in 2."
    )
