"""What each allocation gains over another on the same samples: `python -m squeeze.report --against`.

The KL divergence from the full cache, mean of the data sets' means, so that each counts the same, and the difference
from the other allocation's sample by sample, with its 95% bootstrap interval over the samples within each data set;
where one has a single sample, whose spread nobody knows, over the data sets.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from squeeze.benchmarks.records import Compared
from squeeze.benchmarks.scores import RESAMPLES
from squeeze.errors import InputError
from squeeze.runs.folder import check_count
from squeeze.runs.inventory import Entry, Inventory, describe
from squeeze.storage.files import read_jsonl

#: Of one allocation, by data set: nats a token on each sample, None where no token was compared.
Divergences = dict[str, list[float | None]]


def lines(inventory: Inventory, against: str) -> list[dict[str, str]]:
    """A line for each method, size and allocation of the comparisons with the full cache; `against` comes first.

    Args:
        against: the allocation that the others are compared with, as tables call it.
    Raises:
        InputError: there is nothing that could be compared with it.
    """
    found = []
    for name, allocations in _by_method(inventory).items():
        if against not in allocations:
            inventory.problems.append(f"{', '.join(name)}: no run of {against} was compared with the full cache")
            continue
        for allocation, kl in sorted(allocations.items(), key=lambda item: (item[0] != against, item[0])):
            columns = dict(zip(("model", "algorithm", "ini_size"), name, strict=True))
            found.append(columns | {"allocation": allocation} | _cells(kl, allocations[against], against))
    if not found:
        raise InputError(
            f"there are no comparisons with the full cache beside those of {against}: pred.py --fidelity makes them"
        )
    if len({line["model"] for line in found}) == 1:
        found = [{key: value for key, value in line.items() if key != "model"} for line in found]
    return found


def side_by_side(found: Sequence[dict[str, str]], against: str) -> list[dict[str, str]]:
    """`lines` as a line for each method and size: each allocation's difference, bold where its interval is below 0."""
    made: dict[tuple[str, ...], dict[str, str]] = {}
    for line in found:
        names: dict[str, str] = {name: line[name] for name in ("model", "algorithm", "ini_size") if name in line}
        cells = made.setdefault(tuple(names.values()), names)
        if line["allocation"] == against:
            cells[against] = line["KL"]
        else:
            difference = line[f"less {against}"]
            below = difference.endswith("]") and float(difference.split(", ")[1].rstrip("]")) < 0
            cells[line["allocation"]] = f"**{difference}**" if below else difference
    return list(made.values())


def _by_method(inventory: Inventory) -> dict[tuple[str, str, str], dict[str, Divergences]]:
    """Model, algorithm and size → allocation → its divergences; what is damaged goes to the problems."""
    runs: dict[tuple[str, str, str], list[tuple[Entry, list[float | None]]]] = {}
    for entry in inventory.entries:
        if entry.fidelity:
            try:
                rows = read_jsonl(entry.folder / f"{entry.dataset}.jsonl", Compared)
                check_count(entry.folder, entry.dataset, len(rows))
            except InputError as error:
                inventory.problems.append(str(error))
                continue
            told = describe(entry.settings, entry.summary)
            name = entry.start["model"]["name"], told["algorithm"], told["ini_size"]
            runs.setdefault(name, []).append((entry, [row["kl"] for _, row in rows]))
    found: dict[tuple[str, str, str], dict[str, Divergences]] = {}
    for name, own in runs.items():
        sizes: dict[str, set[str]] = {}
        for entry, _ in own:
            told = describe(entry.settings, entry.summary)
            sizes.setdefault(told["allocation"], set()).add(told["KV_class3"])
        for entry, kl in own:
            told = describe(entry.settings, entry.summary)
            allocation = told["allocation"]
            if allocation != "uniform" and len(sizes[allocation]) > 1:
                allocation += f" {told['KV_class3']}"
            found.setdefault(name, {}).setdefault(allocation, {})[entry.dataset] = kl
    return found


def _cells(kl: Divergences, other: Divergences, against: str) -> dict[str, str]:
    """The columns of one allocation, on the data sets and samples that both have."""
    means, differences = {}, []
    for dataset, values in kl.items():
        pairs = zip(values, other.get(dataset, []), strict=False)
        both = [(mine, theirs) for mine, theirs in pairs if mine is not None and theirs is not None]
        if both:
            means[dataset] = statistics.fmean(mine for mine, _ in both)
            differences.append([mine - theirs for mine, theirs in both])
    if not means:
        return dict.fromkeys(("KL", f"less {against}", "closer on", "samples"), "-")
    cells = {"KL": f"{statistics.fmean(means.values()):.4f}", f"less {against}": "", "closer on": ""}
    if kl is not other:
        cells[f"less {against}"] = shown(*mean_over_data_sets(differences))
        cells["closer on"] = str(sum(one < 0 for own in differences for one in own))
    cells["samples"] = str(sum(map(len, differences)))
    return cells | {dataset: f"{mean:.4f}" for dataset, mean in means.items()}


def shown(mean: float, interval: tuple[float, float] | None) -> str:
    """A difference, and its interval where there is one."""
    return f"{mean:+.4f}" + ("" if interval is None else f" [{interval[0]:+.4f}, {interval[1]:+.4f}]")


def mean_over_data_sets(differences: Sequence[Sequence[float]]) -> tuple[float, tuple[float, float] | None]:
    """Mean of the data sets' means, and its 95% bootstrap interval.

    Args:
        differences: of each data set, one or more.
    Returns:
        the interval is over the samples within each data set; where one has a single sample, over the data sets, each
        counting as one; None where that is one, too.
    """
    import numpy as np  # half a second to import, of which --help knows nothing

    means = list(map(statistics.fmean, differences))
    parts = differences if min(map(len, differences)) > 1 else [means]
    if min(map(len, parts)) < 2:
        return statistics.fmean(means), None
    rng = np.random.default_rng(0)
    resampled = sum(rng.choice(np.array(own), (RESAMPLES, len(own))).mean(axis=1) for own in parts)
    low, high = np.percentile(resampled / len(parts), [2.5, 97.5])
    return statistics.fmean(means), (float(low), float(high))
