"""How far runs' caches are from the full one: the comparison of `--fidelity` beside each run of predictions, and what
all of them come to, as one sentence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Annotated, Any, TypedDict

from msgspec import Meta

from squeeze.benchmarks.records import Compared
from squeeze.benchmarks.scores import interval
from squeeze.errors import InputError
from squeeze.runs.folder import check_count
from squeeze.runs.inventory import Entry, describe
from squeeze.storage.files import read_json, read_jsonl

COLUMNS = ("KL", "agreement")

#: Settings by which the allocations that a sentence compares may differ.
ALLOCATED = {"allocation", "KV_class3", "calibration", "per"}

#: Comparisons that are named one by one; of more, which allocation was how often the nearest.
MOST_NAMED = 6

Percent = Annotated[float, Meta(ge=0, le=100)]


class Detail(TypedDict):
    """The fields that are read of a data set in `result_detail.json`."""

    interval: Annotated[list[Percent], Meta(min_length=2, max_length=2)]


class Details(TypedDict):
    datasets: dict[str, Detail]


@dataclass(frozen=True)
class Measured:
    """A run of predictions whose cache was also compared with the full one.

    Args:
        entry: the run.
        summary: what `run.json` says of the comparison; without `kl` where no token was compared.
        kl: nats a token on each prompt, None where no token was compared.
        score_interval: 95% of the score, in percent; None where `eval.py` has not scored it.
    """

    entry: Entry
    summary: dict[str, Any]
    kl: list[float | None]
    score_interval: tuple[float, float] | None = None


def measured(entries: Sequence[Entry], problems: list[str]) -> dict[int, Measured]:
    """The comparison of each run of predictions that has one, by the run's place among `entries`.

    A comparison belongs to the run that it lies beside, of the same settings and prompts. What is damaged is left
    out, and named in `problems`.
    """
    compared = {(run.folder.resolve(), run.dataset): run for run in entries if run.fidelity}
    comparisons = {}
    for number, entry in enumerate(entries):
        other = compared.get((entry.folder.resolve() / "fidelity", entry.dataset))
        if other is None or _asked_for(entry) != _asked_for(other):
            continue
        try:
            rows = read_jsonl(other.folder / f"{entry.dataset}.jsonl", Compared)
            check_count(other.folder, entry.dataset, len(rows))
            comparisons[number] = Measured(entry, other.summary, [row["kl"] for _, row in rows], _interval(entry))
        except InputError as error:
            problems.append(str(error))
    return comparisons


def _asked_for(entry: Entry) -> tuple[Any, ...]:
    settings = {key: value for key, value in entry.settings.items() if key != "measure"}
    return settings, entry.summary.get("settings"), entry.summary["samples"]


def _interval(entry: Entry) -> tuple[float, float] | None:
    path = entry.folder / "result_detail.json"
    detail = read_json(path, Details)["datasets"].get(entry.dataset) if path.exists() else None
    return None if detail is None else (detail["interval"][0], detail["interval"][1])


def cells(summary: dict[str, Any] | None) -> dict[str, str]:
    """`COLUMNS` of a comparison's summary, dashes where there is none or no token was compared."""
    if summary is None or "kl" not in summary:
        return dict.fromkeys(COLUMNS, "-")
    return {"KL": f"{summary['kl']['mean']:.4f}", "agreement": f"{100 * summary['agreement']['mean']:.1f}%"}


def cells_beside(entry: Entry, comparison: Measured | None) -> dict[str, str]:
    """`COLUMNS` of a run of predictions; the full cache is no distance from itself."""
    if entry.settings["cache"] == "full":
        return {"KL": f"{0:.4f}", "agreement": f"{100:.1f}%"}
    return cells(None if comparison is None else comparison.summary)


def sentence(model: str, dataset: str, runs: Iterable[Measured]) -> str:
    """One sentence on which allocation is nearest to the full cache at the same KV kept, with each evictor.

    To four digits, as the table shows them, so that what is the same there is the same here.
    """
    groups: dict[str, list[Measured]] = {}
    for run in runs:
        if "kl" in run.summary:
            common = {key: value for key, value in run.entry.settings.items() if key not in ALLOCATED}
            group = groups.setdefault(repr((common, _asked_for(run.entry)[1:], _kept(run))), [])
            if all(run.entry.settings != other.entry.settings for other in group):
                group.append(run)
    chosen = [group for group in groups.values() if len(group) > 1]
    if not chosen:
        clause = "no two allocations were compared with the full cache at the same KV kept, so none is the nearer"
    elif len(chosen) <= MOST_NAMED:
        clause = f"nearest to the full cache at the same KV kept was {listed([_nearest(group) for group in chosen])}"
    else:
        counts = Counter(_allocation(run) for group in chosen for run in _first(group))
        names = listed([f"{name} in {count}" for name, count in counts.most_common()])
        clause = f"nearest to the full cache at the same KV kept was, of {len(chosen)} comparisons, {names}"
    return f"{model} on {dataset}: {clause}{_scores(chosen)}."


def _first(group: Sequence[Measured]) -> list[Measured]:
    least = min(map(_kl, group))
    return [run for run in group if _kl(run) == least]


def _nearest(group: Sequence[Measured]) -> str:
    """The nearest of a group, against uniform budgets, or where those are the nearest, against the next."""
    first = _first(group)
    rest = sorted((run for run in group if run not in first), key=_kl)
    rival = next((run for run in rest if _allocation(run) == "uniform"), next(iter(rest), None))
    names = listed([_label(run, group) for run in first])
    text = f"{names} with {first[0].entry.settings['algorithm']} at {_kept(first[0])} (KL {_kl(first[0]):.4f}"
    text += " each" if len(first) > 1 else ""
    if rival is not None:
        text += f" against {_kl(rival):.4f} of {_label(rival, group)}"
        if len(first) == 1:
            leads = _leads(first[0], rival)
            text += f", nearer on {sum(lead > 0 for lead in leads)} of {len(leads)} prompts"
        unsure = [_label(run, group) for run in rest if _is_noise(_leads(first[0], run))]
        if unsure:
            text += f"; {'its' if len(first) == 1 else 'their'} lead over {listed(unsure)} is noise"
    return text + ")"


def _leads(run: Measured, other: Measured) -> list[float]:
    """The lead of one run over another on each prompt, in nats a token."""
    return [b - a for a, b in zip(run.kl, other.kl, strict=True) if a is not None and b is not None]


def _is_noise(leads: Sequence[float]) -> bool:
    """True if the 95% interval of the mean holds 0, or there are less than two leads, which have no interval."""
    low, high = interval(leads) if len(leads) > 1 else (0.0, 0.0)
    return low <= 0 <= high


def _scores(groups: Sequence[Sequence[Measured]]) -> str:
    """A clause on the scores of the same runs, which tell nothing where their intervals overlap."""
    pairs = [
        pair
        for group in groups
        for pair in combinations([run.score_interval for run in group if run.score_interval], 2)
    ]
    if not pairs:
        return ""
    overlap = sum(a[0] <= b[1] and b[0] <= a[1] for a, b in pairs)
    samples = sorted({run.entry.summary["samples"] for group in groups for run in group})
    few = f"of {'/'.join(map(str, samples))} answers"
    if overlap == len(pairs):
        return f"; the scores {few} are noise: the 95% intervals overlap in every pair of these runs"
    if overlap == 0:
        return f"; the scores {few} have 95% intervals that are apart in every pair of these runs"
    return (
        f"; the scores {few} are noise in {overlap} of {len(pairs)} pairs of these runs, whose 95% intervals overlap"
    )


def _kl(run: Measured) -> float:
    return round(run.summary["kl"]["mean"], 4)


def _kept(run: Measured) -> str:
    return f"{100 * run.entry.summary['kept']:.0f}% KV"


def _allocation(run: Measured) -> str:
    return describe(run.entry.settings, run.entry.summary)["allocation"]


def _label(run: Measured, group: Sequence[Measured]) -> str:
    """An allocation's name, with its `KV_class3` where it is there more than once."""
    name = _allocation(run)
    several = sum(_allocation(other) == name for other in group) > 1
    return f"{name} {run.entry.settings['KV_class3']:g}" if several else name


def listed(parts: Sequence[str]) -> str:
    """Parts of a sentence, as English lists them."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
