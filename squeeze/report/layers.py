"""The runs whose layers are shown, and the measurements of a run on each of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd

from squeeze.allocations import calibration
from squeeze.benchmarks.records import LayeredSample, check_layers, read_samples
from squeeze.errors import InputError
from squeeze.report.results import GROUP
from squeeze.runs.manifest import Manifest, ProbedRun
from squeeze.storage.files import read_bytes, read_json


def chosen(runs: pd.DataFrame) -> pd.DataFrame:
    """A squeezed run of each model, data set and allocation: at the median `ini_size`, then the median `KV_class3`."""
    rows = []
    squeezed = runs[~runs["allocation"].isin(["full", "uniform"])]
    for _, group in squeezed.groupby([*GROUP, "allocation"], sort=False):
        for size in ("ini_size", "KV_class3"):
            values = sorted(set(group[size].dropna()))
            if not values:  # loss curves take no KV_class3
                continue
            group = group[group[size] == values[(len(values) - 1) // 2]]
        rows.append(group.iloc[0])
    return pd.DataFrame(rows, columns=runs.columns)


def parse_layers(folder: Path, dataset: str) -> pd.DataFrame:
    """The measurements of a squeezed run on each prompt and layer.

    Returns:
        A row for each prompt and layer, in order: `prompt` and `layer` from 0, `similarity` (NaN in runs that did not
        keep it), `layer_class` 1 to 3, `budget` in tokens (the mean of the layer's KV heads where they have theirs),
        `share`, the budget as a fraction of the prompt, and `reach`, that part of the prompt which `ini_size` is a
        fraction of (docs/budgets.md): less than 1 in a layer whose own window is shorter. Where KV heads have budgets
        of their own, `heads` has them as text, with blanks between.
    Raises:
        InputError: the run's samples are damaged or have no budgets.
    """
    path = folder / "samples" / f"{dataset}.jsonl"
    samples = read_samples(read_bytes(path), path, LayeredSample)
    check_layers(samples, path)
    windows = _windows(folder, dataset)
    rows = []
    for sample in samples:
        stats = sample["stats"]
        similarities: Sequence[float | None] = stats.similarities or [None] * len(stats.budgets)
        for layer, (similarity, layer_class, budget) in enumerate(
            zip(similarities, stats.classes, stats.budgets, strict=True)
        ):
            tokens = fmean(budget) if isinstance(budget, list) else budget
            row: dict[str, Any] = {
                "prompt": sample["index"],
                "layer": layer,
                "similarity": similarity,
                "layer_class": layer_class,
            }
            reach = min(windows.get(layer, stats.prompt_tokens), stats.prompt_tokens) / stats.prompt_tokens
            row |= {"budget": tokens, "share": tokens / stats.prompt_tokens, "reach": reach}
            rows.append(row | ({"heads": " ".join(map(str, budget))} if isinstance(budget, list) else {}))
    frame = pd.DataFrame(rows)
    frame["similarity"] = frame["similarity"].astype(float)
    return frame


def _windows(folder: Path, dataset: str) -> dict[int, int]:
    """Tokens that the own windows or chunks of layers hold, by their numbers; empty where all layers are alike."""
    starts = read_json(folder / "run.json", ProbedRun)["datasets"][dataset]["starts"]
    kinds = next((attention["layers"] for start in reversed(starts) if (attention := start.get("attention"))), [])
    if len({(kind.get("window"), kind.get("chunk")) for kind in kinds}) < 2:
        return {}
    found: dict[int, int] = {}
    for kind in kinds:
        tokens = kind.get("window", kind.get("chunk"))
        if tokens is None:
            continue
        for span in kind["layers"].split(", "):
            first, _, last = span.partition("-")
            found |= dict.fromkeys(range(int(first), int(last or first) + 1), tokens)
    return found


def curves_of(folder: Path, name: str, algorithm: str) -> calibration.Calibration | None:
    """The loss curves that a run was made from, if it was made from a file of them.

    Args:
        folder: the run's.
        name: the model's name.
    Raises:
        InputError: they are not there any more.
    """
    settings = read_json(folder / "run.json", Manifest)["settings"]
    sha256 = settings.get("calibration")
    if sha256 is None:
        return None
    path = calibration.curves_file(name, algorithm, "head" if settings.get("per") == "head" else "layer")
    curves = calibration.read_calibration(path) if path.exists() else None
    if curves is None or curves.sha256 != sha256:
        raise InputError(f"{folder} was made from loss curves that are not in {path} any more")
    return curves
