"""Layouts of prediction files: LongBench's, which is this project's, and those of tools that both are compared with.

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
from pathlib import Path
from typing import Any

import msgspec

from squeeze.benchmarks.longbench.data import check_lists, dataset_names
from squeeze.benchmarks.longbench.metrics import METRICS
from squeeze.benchmarks.longbench.scoring import read_predictions
from squeeze.benchmarks.prediction_files import PredictionFiles, dataset_of, in_folder
from squeeze.benchmarks.records import Prediction
from squeeze.errors import InputError
from squeeze.storage.files import read_bytes
from squeeze.storage.schema import check, decode

#: Other tools' prefixes to a data set's name.
PREFIXES = ("MiniLongBench_", "LongBench_")

#: Files that lie beside predictions and hold none.
RESULTS = frozenset({"result.json", "result_detail.json", "metrics.json", "run.json"})

#: The most names that a sentence lists.
MOST_NAMED = 8


class Gold(msgspec.Struct):
    """The part of a row that MiniLongBench keeps where its data set has classes."""

    answers: list[str]
    all_classes: list[str] | None = None


class Answer(msgspec.Struct):
    """An answer in one of MiniLongBench's documents."""

    prediction: str
    gold: Gold | list[str]


def read(path: Path, dataset: str, task: str = "Long") -> list[Any]:
    """The predictions of a data set, `squeeze.benchmarks.records.Prediction`; of `e` with the rows' lengths.

    Raises:
        InputError: the file is not whole, or is no prediction file of the data set.
    """
    if dataset not in METRICS:
        raise InputError(f"{path} is named after none of the data sets")
    document = _document(path) if path.suffix == ".json" else None
    if document is None:
        return read_predictions(path, task, dataset)
    rows: list[Prediction] = []
    for number, answer in document.items():
        gold = answer.gold if isinstance(answer.gold, Gold) else Gold(answer.gold)
        prediction = {"pred": answer.prediction, "answers": gold.answers, "all_classes": gold.all_classes}
        row = check(prediction, Prediction, f"{path} answer {number}")
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


def find(run: Path, datasets: str | None = None, task: str = "Long") -> PredictionFiles:
    """The prediction files of a run.

    Args:
        run: a folder, a file, or a method of KVCache-Factory in its folder.
        datasets: which of them, as `--datasets` says it; None: those that are there.
        task: `Long`, or `e`, which has fewer data sets.
    Raises:
        InputError: there are none, one is half-written, or it is not clear which of several are meant.
    """
    known = dataset_names("all", task)
    wanted = dataset_names(datasets, task) if datasets not in (None, "all") else None
    if run.is_file():
        predictions = PredictionFiles(str(run), {_dataset_of_file(run, known): run})
    elif run.is_dir() and any(run.glob("*.jsonl")):
        predictions = in_folder(run, wanted, known)
    elif run.is_dir():
        predictions = PredictionFiles(str(run), _documents(run, known) or _only_method(run, known))
    else:
        method = run.name.removesuffix(".json")
        files = _methods(run.parent, known).get(method, {})
        if not files:
            raise InputError(f"the folder {run} is not there")
        predictions = PredictionFiles(str(run), files)
    return predictions.only(wanted, known)


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


def _documents(folder: Path, known: Sequence[str]) -> dict[str, Path]:
    """The files of MiniLongBench's layout."""
    documents: dict[str, Path] = {}
    for path in sorted(folder.glob("*.json")):
        dataset = _without_prefix(path.stem)
        if dataset in known and path.name not in RESULTS:
            if dataset in documents:
                raise InputError(f"{documents[dataset]} and {path.name} are both of {dataset}: give one of them")
            documents[dataset] = path
    return documents


def _methods(folder: Path, known: Sequence[str]) -> dict[str, dict[str, Path]]:
    """Method → data set → file, of KVCache-Factory's layout; of one data set where the folder is one's."""
    folders = [folder] if folder.absolute().name in known else [folder / dataset for dataset in known]
    methods: dict[str, dict[str, Path]] = {}
    for subfolder in folders:
        for path in sorted(subfolder.glob("*.json")):
            if path.name not in RESULTS and path.is_file():
                methods.setdefault(path.stem, {})[subfolder.absolute().name] = path
    return methods


def _only_method(folder: Path, known: Sequence[str]) -> dict[str, Path]:
    methods = _methods(folder, known)
    if len(methods) > 1:
        raise InputError(
            f"{folder} has the predictions of {len(methods)} methods, {_named([f'{name}.json' for name in methods])}: "
            f"say which, such as {folder / next(iter(methods))}"
        )
    if not methods:
        try:
            there = sorted(path.name for path in folder.iterdir())
        except OSError as error:
            raise InputError(f"cannot read {folder}: {error.strerror}") from None
        raise InputError(
            f"{folder} has no prediction file such as samsum.jsonl" + (f": there are {_named(there)}" if there else "")
        )
    return next(iter(methods.values()))


def _named(names: Sequence[str]) -> str:
    more = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
