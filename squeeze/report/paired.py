"""What each allocation gains over another on the same samples: `python -m squeeze.report --against`.

The KL divergence from the full cache, or the score, mean of the data sets' means, so that each counts the same, and
the difference from the other allocation's sample by sample, with its 95% bootstrap interval over the samples within
each data set; where one has a single sample, whose spread nobody knows, over the data sets.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from squeeze.benchmarks.records import Compared
from squeeze.benchmarks.scores import RESAMPLES
from squeeze.errors import InputError
from squeeze.runs.folder import check_count
from squeeze.runs.inventory import Entry, Inventory, describe
from squeeze.storage.files import read_jsonl

#: Of one allocation, by what tells samples from others (`_samples`): what each has; None of samples that have none.
Values = dict[tuple[str, ...], list[float | None]]


class Quantity(NamedTuple):
    """What allocations are compared in.

    Args:
        name: of its column.
        digits: that are shown.
        sign: of a difference that is a gain.
        gained: the column that counts samples with a gain.
        missing: said where nobody has it.
    """

    name: str
    digits: int
    sign: int
    gained: str
    missing: str


KL = Quantity(
    "KL", 4, -1, "closer on", "comparisons with the full cache beside those of {}: pred.py --fidelity makes them"
)
SCORE = Quantity("score", 2, 1, "better on", "predictions that are scored here beside those of {}: pred.py makes them")


def lines(inventory: Inventory, against: str, quantity: Quantity = KL) -> list[dict[str, str]]:
    """A line for each method, size and allocation, `against` first; of scores, one for the full cache before them.

    Args:
        against: the allocation that the others are compared with, as tables call it.
    Raises:
        InputError: there is nothing that could be compared with it.
    """
    found, full, compared = [], [], dict[str, Values]()  # by model, all that was compared of it
    methods = _by_method(inventory, quantity)
    for name, allocations in methods.items():
        if "-" in allocations:
            continue
        columns = dict(zip(("model", "algorithm", "ini_size"), name, strict=True))
        if against not in allocations:
            inventory.problems.append(f"{', '.join(name)}: there is no run of {against} to compare with")
            continue
        for allocation, values in sorted(allocations.items(), key=lambda item: (item[0] != against, item[0])):
            cells = _cells(values, allocations[against], against, quantity)
            found.append(columns | {"allocation": allocation} | cells)
        compared.setdefault(name[0], {}).update(allocations[against])
    for name, allocations in methods.items():
        if "-" in allocations and name[0] in compared:
            columns = dict(zip(("model", "algorithm", "ini_size"), name, strict=True)) | {"allocation": "-"}
            full.append(columns | _cells(allocations["-"], compared[name[0]], against, quantity, alone=True))
    if not found:
        problems = "".join(f"; {problem}" for problem in inventory.problems)
        raise InputError(f"there are no {quantity.missing.format(against)}{problems}")
    found = full + found
    if len({line["model"] for line in found}) == 1:
        found = [{key: value for key, value in line.items() if key != "model"} for line in found]
    return found


def side_by_side(found: Sequence[dict[str, str]], against: str, quantity: Quantity = KL) -> list[dict[str, str]]:
    """`lines` as a line for each method and size: each allocation's difference, bold where its interval is a gain."""
    made: dict[tuple[str, ...], dict[str, str]] = {}
    for line in found:
        names: dict[str, str] = {name: line[name] for name in ("model", "algorithm", "ini_size") if name in line}
        cells = made.setdefault(tuple(names.values()), names)
        if line["allocation"] in (against, "-"):
            cells[against] = line[quantity.name]
        else:
            difference = line[f"less {against}"]
            cells[line["allocation"]] = f"**{difference}**" if _is_gain(difference, quantity) else difference
    return list(made.values())


def _is_gain(difference: str, quantity: Quantity) -> bool:
    """Whether all of a difference's interval, as `shown` gives it, is on the side of a gain."""
    if not difference.endswith("]"):
        return False
    low, high = map(float, difference[difference.index("[") + 1 : -1].split(", "))
    return high < 0 if quantity.sign < 0 else low > 0


def _by_method(inventory: Inventory, quantity: Quantity) -> dict[tuple[str, str, str], dict[str, Values]]:
    """Model, algorithm and size → allocation → its values; what is damaged goes to the problems."""
    runs: dict[tuple[str, str, str], list[tuple[Entry, list[float | None]]]] = {}
    for entry in inventory.entries:
        if entry.fidelity == (quantity is KL):
            try:
                values = _values(entry)
            except InputError as error:
                inventory.problems.append(str(error))
                continue
            told = describe(entry.settings, entry.summary)
            name = entry.start["model"]["name"], told["algorithm"], told["ini_size"]
            runs.setdefault(name, []).append((entry, values))
    found: dict[tuple[str, str, str], dict[str, Values]] = {}
    for name, own in runs.items():
        sizes: dict[str, set[str]] = {}
        for entry, _ in own:
            told = describe(entry.settings, entry.summary)
            sizes.setdefault(told["allocation"], set()).add(told["KV_class3"])
        for entry, values in own:
            told = describe(entry.settings, entry.summary)
            allocation = told["allocation"]
            if allocation != "uniform" and len(sizes[allocation]) > 1:
                allocation += f" {told['KV_class3']}"
            found.setdefault(name, {}).setdefault(allocation, {})[_samples(entry)] = values
    return found


def _samples(entry: Entry) -> tuple[str, ...]:
    """A data set's name, and what else tells its samples from those of other runs: benchmark, data, seed."""
    data = entry.summary.get("data", {}).get("sha256", "")
    return entry.dataset, entry.benchmark.title, data, str(entry.settings.get("seed", 42))


def _values(entry: Entry) -> list[float | None]:
    """Of each sample its nats a token, or its score in percent; InputError where that is damaged, or not to be had."""
    if entry.fidelity:
        rows = read_jsonl(entry.folder / f"{entry.dataset}.jsonl", Compared)
        check_count(entry.folder, entry.dataset, len(rows))
        return [row["kl"] for _, row in rows]
    if entry.benchmark.scorer is not None:
        raise InputError(f"{entry.folder}: {entry.dataset} is scored by {entry.benchmark.scorer}, as a whole")
    predictions = entry.benchmark.predictions(entry.folder / f"{entry.dataset}.jsonl", entry.dataset)
    check_count(entry.folder, entry.dataset, len(predictions))
    return [100 * score for score in entry.benchmark.sample_scores(entry.dataset, predictions)]


def _cells(values: Values, other: Values, against: str, quantity: Quantity, alone: bool = False) -> dict[str, str]:
    """The columns of one allocation, on the data sets and samples that both have; `alone`: without the difference."""
    by_dataset: dict[str, list[tuple[float, float]]] = {}  # several benchmarks and seeds may have one
    for samples, own in values.items():
        pairs = zip(own, other.get(samples, []), strict=False)
        both = [(mine, theirs) for mine, theirs in pairs if mine is not None and theirs is not None]
        if both:
            by_dataset.setdefault(samples[0], []).extend(both)
    means = {dataset: statistics.fmean(mine for mine, _ in both) for dataset, both in by_dataset.items()}
    differences = [[mine - theirs for mine, theirs in both] for both in by_dataset.values()]
    if not means:
        return dict.fromkeys((quantity.name, f"less {against}", quantity.gained, "samples"), "-")
    digits = quantity.digits
    cells = {
        quantity.name: f"{statistics.fmean(means.values()):.{digits}f}",
        f"less {against}": "",
        quantity.gained: "",
    }
    if values is not other and not alone:
        cells[f"less {against}"] = shown(*mean_over_data_sets(differences), digits)
        cells[quantity.gained] = str(sum(one * quantity.sign > 0 for own in differences for one in own))
    cells["samples"] = str(sum(map(len, differences)))
    return cells | {dataset: f"{mean:.{digits}f}" for dataset, mean in means.items()}


def shown(mean: float, interval: tuple[float, float] | None, digits: int = 4) -> str:
    """A difference, and its interval where there is one."""
    limits = "" if interval is None else f" [{interval[0]:+.{digits}f}, {interval[1]:+.{digits}f}]"
    return f"{mean:+.{digits}f}{limits}"


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
