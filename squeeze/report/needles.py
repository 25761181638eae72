"""Runs of the needle map → a table of its cells: what was found, and how far the cache was from the full one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from squeeze.benchmarks.records import Compared
from squeeze.benchmarks.ruler.needle_map import NEEDLE_MAP
from squeeze.benchmarks.ruler.tasks import Asked
from squeeze.errors import InputError
from squeeze.report.results import Results
from squeeze.runs.manifest import Manifest, Mapped
from squeeze.storage.files import read_json, read_jsonl
from squeeze.storage.schema import check

#: What makes a configuration, which has a map of its own.
CONFIGURATION = ["model", "haystack", "algorithm", "allocation", "ini_size", "KV_class3", "seed", "folder"]
CELL = [*CONFIGURATION, "length", "depth"]


def cells(tables: Results, problems: list[str]) -> pd.DataFrame:
    """The cells of all maps.

    Args:
        problems: gets a sentence for each run whose map cannot be read.
    Returns:
        A row for each configuration (`folder` is that of its predictions, be they there or not), length and depth:
        `score`, the share of needles that were found, in percent, of `needles`; and `kl`, the mean distance from the
        full cache over the tokens of the number, in nats a token, of `compared` needles. NaN where there is no run.
    """
    rows: list[dict[str, Any]] = []
    for frame, fidelity in ((tables.runs, False), (tables.fidelity, True)):
        for run in frame[frame["benchmark"] == NEEDLE_MAP.title].to_dict("records"):
            try:
                rows += _samples(run, fidelity)
            except InputError as error:
                problems.append(f"{error}; its needle map is not drawn")
    if not rows:
        return pd.DataFrame(columns=[*CELL, "score", "needles", "kl", "compared"])
    groups = pd.DataFrame(rows, columns=[*CELL, "score", "kl"]).groupby(CELL, dropna=False, sort=False)
    counted = groups.agg(
        score=("score", "mean"), needles=("score", "count"), kl=("kl", "mean"), compared=("kl", "count")
    )
    return counted.reset_index()


def _samples(run: dict[Any, Any], fidelity: bool) -> list[dict[str, Any]]:
    folder, asked = Path(run["folder"]), Asked.read(run["dataset"])
    path, manifest = folder / "run.json", read_json(folder / "run.json", Manifest)
    depths = check(manifest["datasets"][run["dataset"]], Mapped, f"{path}: datasets.{run['dataset']}")["depths"]
    path = folder / f"{run['dataset']}.jsonl"
    if fidelity:
        values = [row["kl"] for _, row in read_jsonl(path, Compared)]
    else:
        rows = NEEDLE_MAP.predictions(path, run["dataset"])
        values = [100 * score for score in NEEDLE_MAP.sample_scores(run["dataset"], rows)]
    place = {name: run[name] for name in CONFIGURATION if name in run}
    place |= {"haystack": asked.name, "length": asked.length, "folder": str(folder.parent if fidelity else folder)}
    measured = "kl" if fidelity else "score"
    return [place | {"depth": depths[index % len(depths)], measured: value} for index, value in enumerate(values)]
