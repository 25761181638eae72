"""Run folders → tables of numbers (pandas): scores with their intervals, fidelity, speed, and what follows from them.

Scores are computed from the predictions by what `eval.py` uses, each time anew; HELM's are what HELM wrote.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from squeeze.allocations import ALLOCATIONS
from squeeze.bench.files import read_bench, speed
from squeeze.benchmarks.records import Compared
from squeeze.benchmarks.registry import BENCHMARKS, titled
from squeeze.errors import InputError
from squeeze.runs.folder import check_count
from squeeze.runs.inventory import Entry, Inventory, describe
from squeeze.storage.files import read_jsonl
from squeeze.text import printable

#: What runs must have in common to be compared.
GROUP = ["model", "benchmark", "dataset"]
WITHIN = (1, 3, 5)
COMMON = [*GROUP, "algorithm", "allocation", "ini_size", "KV_class3", "seed", "samples"]
RUN_COLUMNS = [
    *COMMON,
    *("score", "low", "high", "kept", "kv_bytes", "tokens_per_second", "together", "layers_per_class"),
    *dict.fromkeys(column for benchmark in BENCHMARKS.values() for column in benchmark.score_columns),
    *("device", "settings", "versions", "command", "data", "folder"),
]
FIDELITY_COLUMNS = [
    *COMMON,
    *("kl", "low", "high", "agreement", "agreement_low", "agreement_high", "kept", "compared", "tokens"),
    *("device", "settings", "versions", "command", "data", "folder"),
]
BENCH_COLUMNS = [
    *("file", "machine", "model", "device", "prompt_length", "engine", "cache", "dtype", "batch_size"),
    *("tokens_per_second", "low", "high", "prefill_seconds", "kv_bytes", "peak_bytes"),
]
#: What spreadsheets take for a formula, in full-width letters too; a lone dash stands for nothing.
FORMULA = re.compile(r"\s*(?:[=+@＝＋＠]|[-－].)")
#: Settings that have columns of their own, or say too much.
OWN = {"model", "cache", "algorithm", "allocation", "per", "ini_size", "KV_class3", "seed", "measure", "chat_template"}


@dataclass(frozen=True)
class Results:
    """Args:
    runs: a row for each run and data set of predictions (`RUN_COLUMNS`); scores in percent, NaN where HELM has not
        scored yet; `kept` a fraction of the full cache; `allocation` is `full` or `uniform` for those.
    fidelity: the same of runs with `--fidelity` (`FIDELITY_COLUMNS`); KL in nats a token.
    bench: a row for each measurement of `squeeze.bench` (`BENCH_COLUMNS`).
    problems: a sentence for each thing that was left out.
    unscored: the command that scores it, for each run that HELM has not scored.
    """

    runs: pd.DataFrame
    fidelity: pd.DataFrame
    bench: pd.DataFrame
    problems: list[str]
    unscored: list[str]


def read(inventory: Inventory) -> Results:
    """Score and tabulate what is there; what is damaged is named in `problems` and left out."""
    runs, compared, benches, problems = [], [], [], list(inventory.problems)
    for entry in inventory.entries:
        try:
            if entry.fidelity:
                compared.append(_fidelity(entry))
            else:
                runs.append(_run(entry))
        except InputError as error:
            problems.append(str(error))
    for path in inventory.benches:
        try:
            benches += _bench(path)
        except InputError as error:
            problems.append(str(error))
    return Results(
        _sorted(pd.DataFrame(runs, columns=RUN_COLUMNS)),
        _sorted(pd.DataFrame(compared, columns=FIDELITY_COLUMNS)),
        pd.DataFrame(benches, columns=BENCH_COLUMNS),
        problems,
        [entry.unscored for entry in inventory.entries if entry.unscored],
    )


def _sorted(frame: pd.DataFrame) -> pd.DataFrame:
    """Data sets together, of each the full cache first, whatever the order of the folders."""
    order = {name: number for number, name in enumerate(("full", *ALLOCATIONS.names))}
    rank = frame["allocation"].map(order)
    columns = [*GROUP, "algorithm", "rank", "allocation", "ini_size", "KV_class3", "seed", "folder"]
    return frame.assign(rank=rank).sort_values(columns).drop(columns="rank").reset_index(drop=True)


def _common(entry: Entry) -> dict[str, Any]:
    """The columns that predictions and comparisons share, from `run.json`."""
    settings, summary, start = entry.settings, entry.summary, entry.start
    named = describe(settings, summary)
    full = settings["cache"] == "full"
    versions = start.get("versions", {})
    return {
        "model": start["model"]["name"],
        "benchmark": entry.benchmark.title,
        "dataset": entry.dataset,
        "algorithm": "-" if full else named["algorithm"],
        "allocation": "full" if full else named["allocation"],
        "ini_size": None if full else settings["ini_size"],
        "KV_class3": settings.get("KV_class3"),
        "seed": settings.get("seed", 42),
        "samples": summary["samples"],
        "kept": summary["kept"],
        "layers_per_class": named["classes"],
        "device": start.get("device", ""),
        "settings": ", ".join(f"{key} {value}" for key, value in settings.items() if key not in OWN),
        "versions": ", ".join(f"{key} {value}" for key, value in versions.items() if value is not None),
        "command": start.get("command", ""),
        "data": summary.get("data", {}).get("sha256", ""),
        "folder": str(entry.folder),
    }


def _run(entry: Entry) -> dict[str, Any]:
    """A row of `Results.runs`; InputError if the predictions are damaged."""
    row = _common(entry) | {key: entry.summary[key] for key in ("kv_bytes", "tokens_per_second")}
    row["together"] = entry.start.get("together", 1)
    count, scores = entry.benchmark.read_scores(entry.folder, entry.dataset)
    check_count(entry.folder, entry.dataset, count)
    return row | scores


def _fidelity(entry: Entry) -> dict[str, Any]:
    """A row of `Results.fidelity`; InputError if the comparisons are damaged."""
    path, summary = entry.folder / f"{entry.dataset}.jsonl", entry.summary
    check_count(entry.folder, entry.dataset, len(read_jsonl(path, Compared)))
    row = _common(entry) | {"compared": summary.get("compared"), "tokens": summary.get("tokens")}
    if "kl" not in summary:
        raise InputError(f"{entry.folder}: {entry.dataset} has no tokens to compare: the answers are one token long")
    for key, names in (("kl", ("kl", "low", "high")), ("agreement", ("agreement", "agreement_low", "agreement_high"))):
        row |= dict(zip(names, (summary[key][part] for part in ("mean", "low", "high")), strict=True))
    return row


def _bench(path: Path) -> list[dict[str, Any]]:
    """Rows of `Results.bench`, without the measurements that failed."""
    content = read_bench(path)
    rows = []
    for record in content["runs"]:
        spec, result = record["spec"], record["result"]
        if "error" in result:
            continue
        row: dict[str, Any] = {
            key: spec[key] for key in ("device", "prompt_length", "engine", "cache", "dtype", "batch_size")
        }
        row |= {"file": str(path), "machine": content.get("machine", ""), "model": Path(spec["model"]).name}
        step = result["step_seconds"]
        row |= {"tokens_per_second": speed(record), "prefill_seconds": result["prefill_seconds"]["median"]}
        row |= {"low": spec["batch_size"] / step["high"], "high": spec["batch_size"] / step["low"]}
        rows.append(row | {key: result[key] for key in ("kv_bytes", "peak_bytes")})
    return rows


def full_of(runs: pd.DataFrame, run: Any) -> Any | None:
    """The full cache's run on the same samples as `run`, with its seed if there is such; None if none is."""
    same = runs[(runs["allocation"] == "full") & runs["score"].notna()]
    for key in (*GROUP, "samples", "data"):
        same = same[same[key] == getattr(run, key)]
    seeded = same[same["seed"] == run.seed]
    return next((seeded if len(seeded) else same).itertuples(), None)


def cheapest(runs: pd.DataFrame) -> pd.DataFrame:
    """The least KV that still scores within 1, 3 and 5% of the full cache, uniform and squeezed.

    Relative to the full cache: within 3% is `score >= 0.97 * full`. Of equal KV the highest score counts.

    Returns:
        A row for each model, benchmark, data set, algorithm, `kind` (uniform or squeezed) and `within` (percent);
        where no run is within, `kept` is NaN and `reason` says why.
    """
    rows = []
    bounded = runs[(runs["allocation"] != "full") & runs["score"].notna()]
    for key, group in bounded.groupby([*GROUP, "algorithm"], sort=False):
        for kind in ("uniform", "squeezed"):
            tried = [run for run in group.itertuples() if (run.allocation == "uniform") == (kind == "uniform")]
            pairs = [(run, full_of(runs, run)) for run in tried]
            compared = [(run, full) for run, full in pairs if full is not None]
            for within in WITHIN:
                row: dict[Hashable, Any] = {**dict(zip([*GROUP, "algorithm"], key, strict=True)), "kind": kind}
                row |= {"within": within, "full": compared[0][1].score if compared else None}
                # Scores have two decimals.
                good = [(run, full) for run, full in compared if 100 * run.score >= (100 - within) * full.score - 1e-7]
                if good:
                    best, full = min(good, key=lambda pair: (pair[0].kept, -pair[0].score, pair[0].folder))
                    row |= {"full": full.score, "reason": ""}
                    names = ("kept", "score", "allocation", "ini_size", "KV_class3", "folder")
                    row |= {name: getattr(best, name) for name in names}
                else:
                    row["reason"] = _reason(runs, group, kind, tried, compared)
                rows.append(row)
    columns = [*GROUP, "algorithm", "kind", "within", "kept", "score", "full", "allocation", "ini_size", "KV_class3"]
    return pd.DataFrame(rows, columns=[*columns, "reason", "folder"])


def _reason(runs: pd.DataFrame, group: pd.DataFrame, kind: str, tried: list[Any], compared: list[Any]) -> str:
    if not tried:
        return f"no {kind} run"
    if compared:
        return "none"
    same = runs[runs["allocation"] == "full"]
    for key in GROUP:
        same = same[same[key] == group[key].iloc[0]]
    if same["score"].notna().any():
        counts = "/".join(sorted({str(value) for value in same["samples"]}))
        return f"the full cache's run ({counts} samples) answered other samples"
    return "the full cache's run is not scored yet" if len(same) else "no run of the full cache"


def sensitivity(runs: pd.DataFrame) -> pd.DataFrame:
    """Scores over `ratio = KV_class3 / ini_size`, where an `ini_size` has two ratios or more on the same samples.

    A uniform run is ratio 1 of every allocation.
    """
    bounded = runs[runs["KV_class3"].notna() & runs["score"].notna()]
    bounded = bounded.assign(ratio=(bounded["KV_class3"] / bounded["ini_size"]).astype(float).round(6))
    parts = []
    for _, group in bounded.groupby([*GROUP, "algorithm", "samples", "data"], sort=False):
        uniform = group[group["allocation"] == "uniform"]
        for allocation, squeezed in group[group["allocation"] != "uniform"].groupby("allocation", sort=False):
            both = pd.concat([squeezed, uniform.assign(allocation=allocation)])
            for _, line in both.groupby("ini_size"):
                if line["ratio"].nunique() > 1 and (line["ratio"] < 1).any():
                    parts.append(line.sort_values(["ratio", "folder"]))
    columns = [*GROUP, "algorithm", "allocation", "ini_size", "KV_class3", "ratio", "score", "low", "high"]
    columns += ["kept", "samples", "data", "folder"]
    return pd.concat(parts)[columns].reset_index(drop=True) if parts else pd.DataFrame(columns=columns)


def shown_score(row: dict[Hashable, Any]) -> Any:
    """A row's score for tables of text, or several by name, such as LongBench-E's; None where there is none."""

    def pick(*names: str) -> dict[str, float | None]:
        return {name: None if pd.isna(row[name]) else float(row[name]) for name in names}

    score, columns = pick("score")["score"], titled(str(row["benchmark"])).score_columns
    return pick(*columns) if score is not None and columns else score


def to_csv(frame: pd.DataFrame) -> str:
    """A table as CSV, the same for the same table. No cell of text is a formula to a spreadsheet."""
    return frame.map(_csv_cell).to_csv(index=False, lineterminator="\n")


def _csv_cell(value: Any) -> Any:
    """A cell as a spreadsheet should read it: text that begins as formulas do gets an apostrophe, numbers stay."""
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if FORMULA.match(text) and not _is_number(text) else text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
