"""Runs side by side: `python -m squeeze.report FOLDER…` prints a table of every run found in the folders."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from squeeze.config import InputError
from squeeze.files import read_object
from squeeze.request_files import HELM_TASKS
from squeeze.tables import table

COLUMNS = (
    *("model", "algorithm", "allocation", "ini_size", "KV_class3"),
    *("samples", "score", "KV kept", "KV MB", "tokens/s", "classes"),
)


def find_runs(folders: list[Path]) -> list[Path]:
    """Run folders in or below `folders`, in order of their path.

    Raises:
        InputError: a folder holds no run.
    """
    found: dict[Path, None] = {}
    for folder in folders:
        runs = sorted(path.parent for path in folder.rglob("run.json"))
        if not runs:
            raise InputError(f"{folder} holds no run: pred.py makes one")
        found |= dict.fromkeys(runs)
    return list(found)


def rows(folder: Path) -> list[dict[str, str]]:
    """One run's line for each of its finished data sets: the columns and `dataset`, as text."""
    manifest = read_object(folder / "run.json")
    if not {"settings", "datasets"} <= manifest.keys():
        raise InputError(f"{folder / 'run.json'} is not a run's manifest")
    if "measure" in manifest["settings"]:
        return []  # of fidelity, not of predictions
    score = read_object(folder / "result.json") if (folder / "result.json").exists() else {}
    lines = []
    for dataset, summary in manifest["datasets"].items():
        if "samples" not in summary:
            continue  # not finished
        measured = {
            "dataset": dataset,
            "model": summary["starts"][-1]["model"]["name"],
            "score": _text(score[dataset]) if dataset in score else "-",
            "KV kept": f"{100 * summary['kept']:.1f}%",
            "KV MB": f"{summary['kv_bytes'] / 1e6:.1f}",
            "tokens/s": f"{summary['tokens_per_second']:.1f}",
            "samples": str(summary["samples"]),
        }
        lines.append(describe(manifest["settings"], summary) | measured)
    return lines


def _text(score: float | dict[str, float | None]) -> str:
    """A score; LongBench-E's are one for each range of lengths, shortest first, HELM's one for each ROUGE."""
    if isinstance(score, dict):
        return "/".join("-" if value is None else f"{value:.2f}" for value in score.values())
    return f"{score:.2f}"


def describe(settings: dict[str, Any], summary: dict[str, Any]) -> dict[str, str]:
    """What was asked of a run: its algorithm, allocation and sizes, and how its layers fell into classes."""
    if settings["cache"] == "full":
        return dict.fromkeys(COLUMNS, "-") | {"algorithm": "full cache"}
    uniform = settings["ini_size"] == settings["KV_class3"]
    return {
        "algorithm": settings["algorithm"],
        "allocation": "uniform" if uniform else settings["allocation"],
        "ini_size": f"{settings['ini_size']:g}",
        "KV_class3": f"{settings['KV_class3']:g}",
        "classes": "-" if uniform else "/".join(f"{layers:g}" for layers in summary["layers_per_class"]),
    }


def main(arguments: list[str] | None = None) -> int:
    """Print a table for every data set of the runs; 2 and a sentence where there is no run."""
    parser = argparse.ArgumentParser(prog="python -m squeeze.report", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="run folders, or folders that hold any, like pred_Long")
    try:
        folders = parser.parse_args(arguments).folders
        lines = [line for folder in find_runs(folders) for line in rows(folder)]
        if not lines:
            raise InputError(f"no run in {', '.join(map(str, folders))} is finished: start pred.py again to go on")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for dataset in dict.fromkeys(line["dataset"] for line in lines):
        chosen = [line for line in lines if line["dataset"] == dataset]
        scale = "ROUGE-1/2/L by HELM" if dataset in HELM_TASKS else "LongBench's score"
        print(f"{dataset}: {scale}; KV is what is held after prefill, mean of the samples")
        # The full cache first, then as the folders came.
        print(table(COLUMNS, sorted(chosen, key=lambda line: line["algorithm"] != "full cache")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
