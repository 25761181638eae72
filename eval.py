"""Score a run's predictions with LongBench's own metrics: `python eval.py --help`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from squeeze import scoring
from squeeze.config import InputError
from squeeze.files import read_bytes, write_json, writing
from squeeze.flags import check_flags, config_from_flags, eval_parser, for_model, run_command
from squeeze.longbench import dataset_names
from squeeze.models import guess_model_type, run_name
from squeeze.request_files import HELM_TASKS
from squeeze.runs import run_folder
from squeeze.tables import table
from squeeze.text import say

SCORES = ("data set", "samples", "score", "95% interval")


def main(argv: Sequence[str] | None = None) -> None:
    args = eval_parser().parse_args(argv)
    if args.compare:
        compare([Path(folder) for folder in args.compare], args.datasets)
        return
    if args.pred in HELM_TASKS:
        raise InputError(f"{HELM_TASKS[args.pred]} is scored by HELM itself: sh script/helm.sh")
    folder = find_folder(args)
    task = "e" if args.pred == "e" else scoring.task_of(folder)
    details: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    for path in prediction_files(folder, args.datasets, task):
        try:
            details[scoring.dataset_of(path)] = scoring.score_file(folder, path, task)
        except InputError as error:
            left_out[scoring.dataset_of(path)] = str(error)
    if not details:
        raise InputError("; ".join(left_out.values()))
    scores = {dataset: detail["buckets" if task == "e" else "score"] for dataset, detail in details.items()}
    groups = scoring.group_scores({dataset: detail["score"] for dataset, detail in details.items()})
    with writing(folder / "result.json"):
        write_json(folder / "result_detail.json", {"datasets": details, "groups": groups, "left_out": left_out})
        write_json(folder / "result.json", scores)
    print_scores(details, groups, task)
    if left_out:
        print(f"left out: {len(left_out)} of {len(left_out) + len(details)} data sets")
    say(folder / "result.json")
    if left_out:
        raise InputError("; ".join(left_out.values()))


def print_scores(details: dict[str, Any], groups: dict[str, float], task: str) -> None:
    """The table of a run's scores, LongBench-E's by length, and the means of whole task groups."""
    columns = (*SCORES, *scoring.BUCKETS) if task == "e" else SCORES
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
    """Print runs side by side, and what each differs from the first, with 95% intervals over pairs of samples.

    Raises:
        InputError: there is nothing to compare, or two runs' samples are not the same.
    """
    if len(folders) < 2:
        raise InputError("--compare needs two folders of prediction files or more: the first is compared with")
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"the folder {folder} is not there")
    files = [{scoring.dataset_of(path): path for path in prediction_files(one, datasets)} for one in folders]
    common = [dataset for dataset in files[0] if all(dataset in one for one in files)]
    if not common:
        raise InputError(f"no data set is in every one of {', '.join(map(str, folders))}")
    names = [f"run {number}" for number in range(1, len(folders) + 1)]
    columns = ("data set", "samples", names[0], *(part for name in names[1:] for part in (name, f"{name} - run 1")))
    lines = []
    for dataset in common:
        runs = [scoring.read_predictions(one[dataset]) for one in files]
        count = min(map(len, runs))
        for paths, rows in zip(files[1:], runs[1:], strict=True):
            for number in range(count):
                if rows[number]["answers"] != runs[0][number]["answers"]:
                    where = f"{paths[dataset]} line {number + 1}"
                    raise InputError(f"{where} answers another sample than {files[0][dataset]}")
        scores = [scoring.sample_scores(dataset, rows[:count]) for rows in runs]
        line = {"data set": dataset, "samples": str(count), names[0]: f"{scoring.dataset_score(scores[0]):.2f}"}
        for name, one in zip(names[1:], scores[1:], strict=True):
            mean, low, high = (100 * value for value in scoring.difference(scores[0], one))
            line[name] = f"{scoring.dataset_score(one):.2f}"
            line[f"{name} - run 1"] = f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"
        lines.append(line)
        left = max(map(len, runs)) - count
        if left:
            print(f"{dataset}: {left} samples that are not in every run are left out")
    for name, folder in zip(names, folders, strict=True):
        say(f"{name}: {folder}")
    print(table(columns, lines))
    print("differences: mean over samples, in points, and its 95% interval (paired bootstrap); noise where it holds 0")


def find_folder(args: argparse.Namespace) -> Path:
    """The folder that the flags name, which must be there."""
    if args.folder is not None:
        if args.model is not None:
            raise InputError(f"give the folder {args.folder} or the flags of a run such as --model, not both")
        if not Path(args.folder).is_dir():
            raise InputError(f"the folder {args.folder} is not there")
        return Path(args.folder)
    check_flags(args)
    if args.model is None:
        raise InputError("nothing to score: give a folder of prediction files, or --model and pred.py's other flags")
    # The published command says nothing but the sizes.
    args.enable_squeeze = args.enable_squeeze or args.ini_size is not None or args.KV_class3 is not None
    config = config_from_flags(args)
    name = run_name(args.model)
    model_type = guess_model_type(args.model, args.model_path, args.model_arch)
    folder = run_folder(args.pred, name, for_model(config, model_type), model_type, args.seed)
    if not folder.is_dir():
        there = sorted({str(path.parent) for path in Path(f"pred_{args.pred}", name).rglob("run.json")})
        others = f"; there are runs in {', '.join(there)}" if there else ""
        raise InputError(f"there is no run in {folder}: start pred.py with the same flags first{others}")
    return folder


def prediction_files(folder: Path, datasets: str | None, task: str = "Long") -> list[Path]:
    """The finished prediction files to score; unfinished ones are an error unless `datasets` leaves them out."""
    partial = sorted(folder.glob("*.partial*.jsonl"))
    finished = {scoring.dataset_of(path): path for path in sorted(folder.glob("*.jsonl")) if path not in partial}
    known = dataset_names("all", task)
    wanted = dataset_names(datasets, task) if datasets not in (None, "all") else None
    for path in partial:
        if wanted is None or scoring.dataset_of(path) in wanted:
            count = read_bytes(path).count(b"\n")
            raise InputError(f"{path} is half-written, {count} samples so far: start pred.py again to go on")
    missing = [dataset for dataset in wanted or () if dataset not in finished]
    if missing or not finished:
        raise InputError(f"{folder} has no {missing[0] if missing else 'prediction file such as samsum'}.jsonl")
    for dataset, path in finished.items():
        if wanted is None and dataset not in known:
            raise InputError(f"{path} is named after none of the data sets: {', '.join(known)}")
    return [finished[dataset] for dataset in wanted or known if dataset in finished]


if __name__ == "__main__":
    sys.exit(run_command(main))
