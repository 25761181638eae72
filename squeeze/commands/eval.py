"""Score a run's predictions with its benchmark's own metrics: `python eval.py --help`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from squeeze.benchmarks import scores as sample_scores
from squeeze.benchmarks.base import Benchmark
from squeeze.benchmarks.longbench.benchmark import LONGBENCH, LongBench
from squeeze.benchmarks.registry import BENCHMARKS, owner
from squeeze.cli.tables import table
from squeeze.errors import InputError
from squeeze.runs.flags import eval_parser, named_run
from squeeze.runs.folder import check_count
from squeeze.runs.resolve import named_folder
from squeeze.storage.files import write_json, writing
from squeeze.text import say

SCORES = ("data set", "samples", "score", "95% interval")


def main(argv: Sequence[str] | None = None) -> None:
    args = eval_parser().parse_args(argv)
    if args.compare:
        if args.folder is not None:
            raise InputError(f"--compare takes all runs behind it: give {args.folder} there, the first one first")
        compare([Path(run) for run in args.compare], args.datasets)
        return
    asked = BENCHMARKS.get(args.pred)
    if asked is not None and asked.scorer is not None:
        raise InputError(f"{asked.title} is scored by {asked.scored_by}: {asked.scorer}")
    folder = find_folder(args)
    benchmark = asked if asked is not None and args.pred != "Long" else owner(folder)
    run = benchmark.find(folder, args.datasets)
    details: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    for dataset, path in run.files.items():
        try:
            rows = benchmark.predictions(path, dataset)
            check_count(path.parent, dataset, len(rows))
            details[dataset] = benchmark.score(dataset, rows)
        except InputError as error:
            left_out[dataset] = str(error)
    if not details:
        raise InputError("; ".join(left_out.values()))
    scores = {dataset: benchmark.result(detail) for dataset, detail in details.items()}
    groups = benchmark.group_scores({dataset: detail["score"] for dataset, detail in details.items()})
    if run.folder is not None:
        with writing(run.folder / "result.json"):
            content = {"datasets": details, "groups": groups, "left_out": left_out}
            write_json(run.folder / "result_detail.json", content)
            write_json(run.folder / "result.json", scores)
    print_scores(details, groups, benchmark)
    if left_out:
        print(f"left out: {len(left_out)} of {len(left_out) + len(details)} data sets")
    if run.folder is not None:
        say(run.folder / "result.json")
    else:
        say(f"nothing is written beside {run.name}: result.json is for whole folders of data sets' .jsonl files")
    if left_out:
        raise InputError("; ".join(left_out.values()))


def print_scores(details: dict[str, Any], groups: dict[str, float], benchmark: Benchmark) -> None:
    """The table of a run's scores, LongBench-E's by length, and the means of whole task groups."""
    columns = (*SCORES, *benchmark.score_columns)
    lines = [
        {
            "data set": dataset,
            "samples": str(detail["samples"]),
            "score": f"{detail['score']:.2f}",
            "95% interval": "{:.2f}–{:.2f}".format(*detail["interval"]),
            **{name: "-" if value is None else f"{value:.2f}" for name, value in detail.get("buckets", {}).items()},
        }
        for dataset, detail in details.items()
    ]
    for group, score in groups.items():
        lines.append(dict.fromkeys(columns, "") | {"data set": f"mean: {group}", "score": f"{score:.2f}"})
    print(table(columns, lines))
    for dataset, detail in details.items():
        if "rouge_score" in detail:
            means = ", ".join(f"{variant} {value:.2f}" for variant, value in detail["rouge_score"].items())
            print(f"{dataset}: by rouge-score: {means}")


def compare(folders: list[Path], datasets: str | None) -> None:
    """Print runs side by side, and their differences from the first, with 95% intervals over pairs of samples.

    Raises:
        InputError: there is nothing to compare, or two runs' samples are not the same.
    """
    if len(folders) < 2:
        raise InputError("--compare needs two folders of prediction files or more: the first is compared with")
    # LongBench-E has LongBench's data sets, and other tools' files do not say which they are of.
    owners = [LONGBENCH if isinstance(one, LongBench) else one for one in map(owner, folders)]
    benchmark = owners[0]
    if any(other is not benchmark for other in owners):
        raise InputError(f"the runs are of different benchmarks: {', '.join(one.title for one in owners)}")
    if benchmark.scorer is not None:
        raise InputError(f"{benchmark.title} is scored by {benchmark.scored_by}: {benchmark.scorer}")
    runs = [benchmark.find(folder, datasets) for folder in folders]
    common = [dataset for dataset in runs[0].files if all(dataset in run.files for run in runs)]
    if not common:
        raise InputError(f"no data set is in every one of {', '.join(map(str, folders))}")
    names = [f"run {number}" for number in range(1, len(runs) + 1)]
    columns = ("data set", "samples", names[0], *(part for name in names[1:] for part in (name, f"{name} - run 1")))
    lines = []
    for dataset in common:
        predictions = [benchmark.predictions(run.files[dataset], dataset) for run in runs]
        count = min(map(len, predictions))
        for run, rows in zip(runs[1:], predictions[1:], strict=True):
            for number in range(count):
                if rows[number]["answers"] != predictions[0][number]["answers"]:
                    where = f"{run.files[dataset]} line {number + 1}"
                    raise InputError(f"{where} answers another sample than {runs[0].files[dataset]}")
        scores = [benchmark.sample_scores(dataset, rows[:count]) for rows in predictions]
        line = {"data set": dataset, "samples": str(count), names[0]: f"{sample_scores.dataset_score(scores[0]):.2f}"}
        for name, run_scores in zip(names[1:], scores[1:], strict=True):
            mean, low, high = (100 * value for value in sample_scores.difference(scores[0], run_scores))
            line[name] = f"{sample_scores.dataset_score(run_scores):.2f}"
            line[f"{name} - run 1"] = f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"
        lines.append(line)
        left = max(map(len, predictions)) - count
        if left:
            print(f"{dataset}: {left} samples that are not in every run are left out")
    for name, run in zip(names, runs, strict=True):
        say(f"{name}: {run.name}")
    print(table(columns, lines))
    print("differences: mean over samples, in points, and its 95% interval (paired bootstrap); noise where it holds 0")


def find_folder(args: argparse.Namespace) -> Path:
    """The folder or file that the flags name; the folder of a run must be there."""
    if args.folder is not None:
        if args.model is not None:
            raise InputError(f"give the folder {args.folder} or the flags of a run such as --model, not both")
        return Path(args.folder)
    spec = named_run(args, "compress", "pred", "datasets")
    if spec.model is None:
        raise InputError("nothing to score: give a folder of prediction files, or --model and pred.py's other flags")
    folder = named_folder(spec)
    if not folder.is_dir():
        there = sorted({str(path.parent) for path in Path(*folder.parts[:2]).rglob("run.json")})
        hint = f"; there are runs in {', '.join(there)}" if there else ""
        raise InputError(f"there is no run in {folder}: start pred.py with the same flags first{hint}")
    return folder
