"""Score a run's predictions with LongBench's own metrics: `python eval.py --help`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from squeeze.config import InputError
from squeeze.files import write_json
from squeeze.flags import check_flags, config_from_flags, eval_parser, for_model, run_command
from squeeze.longbench import dataset_names
from squeeze.metrics import ROUGE_VARIANTS, check_scored, dataset_score, read_predictions, rouge_details, sample_scores
from squeeze.models import guess_model_type, run_name
from squeeze.runs import check_count, run_folder


def main(argv: Sequence[str] | None = None) -> None:
    args = eval_parser().parse_args(argv)
    folder = find_folder(args)
    scores: dict[str, float] = {}
    details: dict[str, Any] = {}
    for path in prediction_files(folder, args.datasets):
        dataset = path.name.split(".")[0]
        check_scored(dataset)
        rows = read_predictions(path)
        check_count(folder, dataset, len(rows))
        each = sample_scores(dataset, rows)
        rouge = rouge_details(dataset, rows)
        scores[dataset] = dataset_score(each)
        details[dataset] = {
            "score": scores[dataset],
            "samples": len(rows),
            "rouge_score": {variant: round(fmean(one[variant] for one in rouge), 2) for variant in ROUGE_VARIANTS},
            "per_sample": [{"score": round(100 * one, 2), **more} for one, more in zip(each, rouge, strict=True)],
        }
    try:
        write_json(folder / "result_detail.json", details)
        write_json(folder / "result.json", scores)
    except OSError as error:
        raise InputError(f"cannot write {folder / 'result.json'}: {error.strerror}") from None
    print(json.dumps(scores))
    for dataset, detail in details.items():
        rouge_means = ", ".join(f"{variant} {detail['rouge_score'][variant]:.2f}" for variant in ROUGE_VARIANTS)
        print(f"{dataset}: {detail['samples']} samples; by rouge-score: {rouge_means}")
    print(folder / "result.json")


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


def prediction_files(folder: Path, datasets: str | None) -> list[Path]:
    """The finished prediction files to score; unfinished ones are an error unless `datasets` leaves them out."""
    wanted = dataset_names(datasets) if datasets is not None else None
    partial = {path.name.split(".")[0]: path for path in sorted(folder.glob("*.partial.jsonl"))}
    for dataset, path in partial.items():
        if wanted is None or dataset in wanted:
            count = path.read_bytes().count(b"\n")
            raise InputError(f"{path} is half-written, {count} samples so far: start pred.py again to go on")
    files = [path for path in sorted(folder.glob("*.jsonl")) if path not in partial.values()]
    finished = {path.name.split(".")[0]: path for path in files}
    missing = [dataset for dataset in wanted or () if dataset not in finished]
    if missing or not finished:
        raise InputError(f"{folder} has no {missing[0] if missing else 'prediction file such as samsum'}.jsonl")
    return [finished[dataset] for dataset in wanted or finished]


if __name__ == "__main__":
    sys.exit(run_command(main))
