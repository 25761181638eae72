"""What each allocation gains over another on the same samples, as a table and as a figure."""

import shutil
from pathlib import Path

import pytest
from made_runs import ANSWER, make_fidelity, make_helm, make_run, write_lines

from squeeze import InputError
from squeeze.report.command import report

MEAN = (0.15 + (0.25 + 0.25 + 0.05) / 3) / 2  # half of uniform's, in every sample, mean of two data sets


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Two data sets of two samples and three, in two folders; squeezed budgets are twice as near in each sample."""
    monkeypatch.chdir(tmp_path)
    for folder, task, kl in (("a", "samsum", (0.4, 0.2, None)), ("b", "lcc", (0.5, 0.5, 0.1))):
        for path, class3, factor in (("0.2/20", 0.2, 1.0), ("0.2/10", 0.1, 0.5)):
            sizes = {"ini_size": 0.2, "KV_class3": class3}
            compared = make_fidelity(Path(folder, path, "fidelity"), 1, dataset=task, samples=3, **sizes)
            write_lines(compared / f"{task}.jsonl", [{"kl": one and factor * one} for one in kl])
    return tmp_path


def rows(capsys):
    said = capsys.readouterr().out.splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in said if line.startswith("|")]


def test_differences_are_on_the_same_samples(place, capsys):
    report(["a", "b", "--against", "uniform"])
    heading, _, uniform, squeezed = rows(capsys)
    assert heading[:5] == ["algorithm", "ini_size", "allocation", "KL", "less uniform"]
    assert heading[5:] == ["closer on", "samples", "samsum", "lcc"]
    assert uniform[2:7] == ["uniform", f"{2 * MEAN:.4f}", "", "", "5"]
    assert squeezed[2:4] == ["squeeze", f"{MEAN:.4f}"] and squeezed[5:] == ["5", "5", "0.1500", "0.1833"]
    assert squeezed[4].startswith(f"{-MEAN:+.4f} [-") and squeezed[4].endswith("]")


def test_a_line_for_each_method_and_a_figure(place, capsys):
    report(["a", "b", "--against", "uniform", "--wide", "--figure", "out/kl.png"])
    heading, _, line = rows(capsys)
    assert heading == ["algorithm", "ini_size", "uniform", "squeeze"]
    assert line[2] == f"{2 * MEAN:.4f}" and line[3].startswith(f"**{-MEAN:+.4f} [-")
    assert Path("out/kl.png").read_bytes().startswith(b"\x89PNG")
    assert b"--against uniform" in Path("out/kl.png").read_bytes(), "the command that made it"
    report(["a", "b", "--against", "squeeze", "--wide"])
    assert rows(capsys)[2][3].startswith(f"+{MEAN:.4f} [+"), "no worse one is bold"


def test_scores_are_compared_in_the_same_way_and_more_is_better(place, capsys):
    """Answers that are all right, or all wrong: 4 of 4, 1 of 4 and 3 of 4."""
    for folder, right, sizes in (
        ("s/full", 4, {}),
        ("s/0.2/20", 1, {"ini_size": 0.2, "KV_class3": 0.2}),
        ("s/0.2/10", 3, {"ini_size": 0.2, "KV_class3": 0.1}),
    ):
        run = make_run(Path(folder), dataset="samsum", samples=4, **sizes)
        words = [ANSWER if index < right else "no" for index in range(4)]
        lines = [{"pred": word, "answers": [ANSWER], "all_classes": None, "length": 12} for word in words]
        write_lines(run / "samsum.jsonl", lines)
    report(["s", "a", "--against", "uniform", "--score"])
    heading, _, full, uniform, squeezed = rows(capsys)
    assert heading[:4] == ["algorithm", "ini_size", "allocation", "score"]
    assert heading[4:] == ["less uniform", "better on", "samples", "samsum"]
    assert full == ["full cache", "-", "-", "100.00", "", "", "4", "100.00"]
    assert uniform[2:] == ["uniform", "25.00", "", "", "4", "25.00"]
    assert squeezed[2:4] == ["squeeze", "75.00"] and squeezed[5:] == ["2", "4", "75.00"]
    assert squeezed[4] == "+50.00 [+0.00, +100.00]"
    report(["s", "--against", "uniform", "--score", "--wide", "--figure", "score.png"])
    _, _, full, line = rows(capsys)
    assert full == ["full cache", "-", "100.00", "-"] and line == ["streaming", "0.2", "25.00", squeezed[4]]
    assert Path("score.png").read_bytes().startswith(b"\x89PNG")
    lines = [{"pred": "no", "answers": [ANSWER], "all_classes": None, "length": 12}] * 4
    write_lines(Path("s/0.2/20/samsum.jsonl"), lines)
    report(["s", "--against", "uniform", "--score", "--wide"])
    assert rows(capsys)[3][2:] == ["0.00", "**+75.00 [+25.00, +100.00]**"]
    make_helm(Path("s/h"), (30, 10, 20))
    report(["s", "--against", "uniform", "--score"])
    assert "xsum is scored by" in capsys.readouterr().err


def answered(folder, right, count, **settings):
    """A run of samsum whose answers are right or wrong, as `right` says."""
    run = make_run(Path(folder), dataset="samsum", samples=count, **settings)
    words = [ANSWER if one else "no" for one in right]
    lines = [{"pred": word, "answers": [ANSWER], "all_classes": None, "length": 12} for word in words]
    write_lines(run / "samsum.jsonl", lines)


def test_runs_of_other_samples_are_not_paired(place, capsys):
    """Seeds have samples of their own, and so have benchmarks; the full cache's score is on those compared."""
    uniform, squeezed = {"ini_size": 0.2, "KV_class3": 0.2}, {"ini_size": 0.2, "KV_class3": 0.1}
    for seed, right in ((42, False), (7, True)):
        answered(f"p/pred_Long/seed-{seed}/20", [not right] * 2, 2, seed=seed, **uniform)
        answered(f"p/pred_Long/seed-{seed}/10", [right] * 2, 2, seed=seed, **squeezed)
    answered("p/pred_Long/full", [True, False, False, False], 4)
    answered("p/pred_e/10", [True] * 2, 2, **squeezed)
    report(["p/pred_Long", "--against", "uniform", "--score"])
    _, _, full, first, second = rows(capsys)
    assert (full[3], full[6]) == ("50.00", "2"), "two of its four samples"
    assert first[3] == second[3] == "50.00" and second[4].startswith("+0.00 [") and second[5:7] == ["2", "4"]
    answered("q/full", [True] * 2, 2, seed=1)
    shutil.copytree("p/pred_Long/seed-7", "q/cut")
    report(["q", "--against", "uniform", "--score", "--figure", "q/score.png"])
    assert rows(capsys)[2][:4] == ["full cache", "-", "-", "-"], "it has none of these samples"
    report(["p/pred_Long", "p/pred_e", "--against", "uniform", "--score"])
    assert [row[3] for row in rows(capsys)[3:]] == [first[3], second[3]], "of pred_e there is nothing to compare with"


def test_a_single_sample_has_no_spread_of_its_own(place, capsys):
    """Where one data set has no more, the interval is over the data sets; of one sample alone there is none."""
    for path, kl in (("0.2/20", 0.4), ("0.2/10", 0.2)):
        write_lines(Path("a", path, "fidelity/samsum.jsonl"), [{"kl": kl}, {"kl": None}, {"kl": None}])
    report(["a", "b", "--against", "uniform"])
    lcc = -(0.25 + 0.25 + 0.05) / 3  # and -0.2 on samsum
    assert rows(capsys)[3][4] == f"{(lcc - 0.2) / 2:+.4f} [-0.2000, {lcc:+.4f}]"
    report(["a", "--against", "uniform", "--wide"])
    assert rows(capsys)[2][3] == "-0.2000", "and nothing is bold"


def test_sizes_of_class_3_and_models_have_lines_of_their_own(place, capsys):
    more = {"dataset": "samsum", "ini_size": 0.2, "samples": 3}
    other = make_fidelity(Path("a/0.2/4/fidelity"), 1, KV_class3=0.04, **more)
    write_lines(other / "samsum.jsonl", [{"kl": 0.9}, {"kl": 0.8}, {"kl": 0.7}])
    report(["a", "b", "--against", "uniform"])
    names = [row[2] for row in rows(capsys)[2:]]
    assert names == ["uniform", "squeeze 0.04", "squeeze 0.1"]
    far = make_fidelity(Path("c/0.2/20/fidelity"), 1, KV_class3=0.2, model="N", **more)
    write_lines(far / "samsum.jsonl", [{"kl": 0.9}] * 3)
    report(["a", "b", "c", "--against", "uniform"])
    assert [row[0] for row in rows(capsys) if "--" not in row[0]] == ["model", "M", "M", "M", "N"]
    with pytest.raises(InputError, match="--figure draws the runs of one model"):
        report(["a", "c", "--against", "uniform", "--figure", "kl.svg"])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--wide"], "--wide is for --against"),
        (["--figure", "f.png"], "--figure is for --against"),
        (["--score"], "--score is for --against"),
        (["--against", "uniform", "--score"], "no predictions that are scored here beside those of uniform"),
        (["--against", "uniform", "--out", "page"], "leave --out out"),
        (["--against", "uniform", "--figure", "f.pdf"], "must end in .png or .svg"),
        (["--against", "pyramid"], "no comparisons with the full cache beside those of pyramid"),
    ],
)
def test_bad_input_is_a_sentence(place, flags, said):
    with pytest.raises(InputError, match=said):
        report(["a", *flags])


def test_what_has_no_partner_is_named(place, capsys):
    make_fidelity(Path("a/h2o/0.2/10/fidelity"), 1, algorithm="h2o", dataset="samsum", ini_size=0.2, KV_class3=0.1)
    report(["a", "--against", "uniform"])
    told = capsys.readouterr()
    assert "h2o, 0.2: there is no run of uniform to compare with" in told.err
    assert "| h2o" not in told.out
