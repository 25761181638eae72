"""Where predictions lie: as LongBench and this project write them, and as tools do that both are compared with.

- LongBench, this project: a folder with `<data set>.jsonl`.
- KVCache-Factory (PyramidKV): `<data set>/<method>.json` in a folder for a model and a size, JSON Lines in spite of
  the name. A run is one method: `FOLDER/<method>` names it.
- MiniLongBench, and OpenCompass, whose layout it has: `MiniLongBench_<data set>.json`, one document that holds, by
  number, a `prediction` and its `gold`.
- A file of any of these by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from squeeze.benchmarks.longbench.data import check_lists, dataset_names
from squeeze.benchmarks.longbench.scoring import dataset_of, read_predictions
from squeeze.benchmarks.records import Prediction
from squeeze.errors import InputError
from squeeze.storage.files import read_bytes
from squeeze.storage.schema import check, decode

#: What other tools put before a data set's name.
PREFIXES = ("MiniLongBench_", "LongBench_")

#: What is written beside predictions and is none.
RESULTS = frozenset({"result.json", "result_detail.json", "metrics.json", "run.json"})

#: Names of files that a sentence lists.
MOST_NAMED = 8


class Gold(msgspec.Struct):
    """What MiniLongBench holds of a row of a data set with classes."""

    answers: list[str]
    all_classes: list[str] | None = None


class Answer(msgspec.Struct):
    """An answer in one of MiniLongBench's documents."""

    prediction: str
    gold: Gold | list[str]


@dataclass(frozen=True)
class Layout:
    """The files of a run.

    Args:
        name: what the user called it.
        files: of each data set.
        folder: the run's, for `result.json`; None where that is not to be written: into other tools' layouts, whose
            own programs read every file there, and for single files.
    """

    name: str
    files: dict[str, Path]
    folder: Path | None = None

    def rows(self, dataset: str, task: str = "Long") -> list[Any]:
        """The predictions of a data set, `squeeze.benchmarks.records.Prediction`; of `e` with the rows' lengths.

        Raises:
            InputError: the file is not whole, or is no prediction file.
        """
        path = self.files[dataset]
        document = _document(path) if path.suffix == ".json" else None
        if document is None:
            return read_predictions(path, task, dataset)
        rows: list[Prediction] = []
        for number, one in document.items():
            gold = one.gold if isinstance(one.gold, Gold) else Gold(one.gold)
            said = {"pred": one.prediction, "answers": gold.answers, "all_classes": gold.all_classes}
            row = check(said, Prediction, f"{path} answer {number}")
            check_lists(row, dataset, f"{path} answer {number}")
            rows.append(row)
        if task == "e":
            raise InputError(f"{path} has no field length, as files of MiniLongBench have none")
        if not rows:
            raise InputError(f"{path} has no rows")
        return rows


def _document(path: Path) -> dict[str, Answer] | None:
    """The answers of a file in MiniLongBench's layout; None of a file in JSON Lines."""
    data = read_bytes(path)
    if data.split(b"\n", 1)[0].strip() != b"{":  # else it is a document, indented to be read
        try:
            if "pred" in decode(data, dict[str, Any], path):  # one line
                return None
        except InputError:
            return None
    return decode(data, dict[str, Answer], path)


def find(place: Path, datasets: str | None = None, task: str = "Long") -> Layout:
    """The prediction files of a run.

    Args:
        place: a folder, a file, or a method of KVCache-Factory in its folder.
        datasets: which of them, as `--datasets` says it; None: those that are there.
        task: `Long`, or `e`, which has fewer data sets.
    Raises:
        InputError: there are none, one is half-written, or it is not clear which of several are meant.
    """
    known = dataset_names("all", task)
    wanted = dataset_names(datasets, task) if datasets not in (None, "all") else None
    if place.is_file():
        found = Layout(str(place), {_dataset_of_file(place, known): place})
    elif place.is_dir() and any(place.glob("*.jsonl")):
        found = Layout(str(place), _lines(place, wanted, known), place)
    elif place.is_dir():
        found = Layout(str(place), _documents(place, known) or _only_method(place, known))
    else:
        method = place.name.removesuffix(".json")
        files = _methods(place.parent, known).get(method, {})
        if not files:
            raise InputError(f"the folder {place} is not there")
        found = Layout(str(place), files)
    missing = [dataset for dataset in wanted or () if dataset not in found.files]
    if missing:
        raise InputError(f"{place} has no {missing[0]}.jsonl: there are predictions of {', '.join(found.files)}")
    return Layout(found.name, {one: found.files[one] for one in wanted or known if one in found.files}, found.folder)


def _dataset_of_file(path: Path, known: Sequence[str]) -> str:
    """The data set that a file is named after, or its folder, or that its first line says."""
    names = [_without_prefix(dataset_of(path)), path.absolute().parent.name]
    with suppress(InputError):  # one document, or no JSON, which reading it will say
        names.append(str(decode(read_bytes(path).split(b"\n", 1)[0], dict[str, Any], path).get("dataset")))
    for name in names:
        if name in known:
            return name
    raise InputError(f"{path} is named after none of the data sets, nor is its folder: {', '.join(known)}")


def _without_prefix(name: str) -> str:
    return next((name.removeprefix(prefix) for prefix in PREFIXES if name.startswith(prefix)), name)


def _lines(folder: Path, wanted: Sequence[str] | None, known: Sequence[str]) -> dict[str, Path]:
    """The files of LongBench's own layout; unfinished ones are an error unless `wanted` leaves them out."""
    partial = sorted(folder.glob("*.partial*.jsonl"))
    finished = {dataset_of(path): path for path in sorted(folder.glob("*.jsonl")) if path not in partial}
    for path in partial:
        if wanted is None or dataset_of(path) in wanted:
            count = read_bytes(path).count(b"\n")
            raise InputError(f"{path} is half-written, {count} samples so far: start pred.py again to go on")
    for dataset, path in finished.items():
        if wanted is None and dataset not in known:
            raise InputError(f"{path} is named after none of the data sets: {', '.join(known)}")
    return finished


def _documents(folder: Path, known: Sequence[str]) -> dict[str, Path]:
    """The files of MiniLongBench's layout."""
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.json")):
        dataset = _without_prefix(path.stem)
        if dataset in known and path.name not in RESULTS:
            if dataset in found:
                raise InputError(f"{found[dataset]} and {path.name} are both of {dataset}: give one of them")
            found[dataset] = path
    return found


def _methods(folder: Path, known: Sequence[str]) -> dict[str, dict[str, Path]]:
    """Method → data set → file, of KVCache-Factory's layout; of one data set where the folder is one's."""
    places = [folder] if folder.absolute().name in known else [folder / dataset for dataset in known]
    found: dict[str, dict[str, Path]] = {}
    for place in places:
        for path in sorted(place.glob("*.json")):
            if path.name not in RESULTS and path.is_file():
                found.setdefault(path.stem, {})[place.absolute().name] = path
    return found


def _only_method(folder: Path, known: Sequence[str]) -> dict[str, Path]:
    methods = _methods(folder, known)
    if len(methods) > 1:
        raise InputError(
            f"{folder} has the predictions of {len(methods)} methods, {_some([f'{one}.json' for one in methods])}: "
            f"say which, such as {folder / next(iter(methods))}"
        )
    if not methods:
        try:
            there = sorted(path.name for path in folder.iterdir())
        except OSError as error:
            raise InputError(f"cannot read {folder}: {error.strerror}") from None
        raise InputError(
            f"{folder} has no prediction file such as samsum.jsonl" + (f": there are {_some(there)}" if there else "")
        )
    return next(iter(methods.values()))


def _some(names: Sequence[str]) -> str:
    more = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
