"""Prediction files of a run: `<data set>.jsonl` in a folder, as LongBench and this project write them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from squeeze.errors import InputError
from squeeze.storage.files import read_bytes


@dataclass(frozen=True)
class PredictionFiles:
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

    def only(self, wanted: Sequence[str] | None, known: Sequence[str]) -> PredictionFiles:
        """These files in the order of `known`, or those that are `wanted`; InputError if one of them is not there."""
        missing = [dataset for dataset in wanted or () if dataset not in self.files]
        if missing:
            raise InputError(
                f"{self.name} has no {missing[0]}.jsonl: there are predictions of {', '.join(self.files)}"
            )
        files = {
            dataset: self.files[dataset] for dataset in (known if wanted is None else wanted) if dataset in self.files
        }
        return PredictionFiles(self.name, files, self.folder)


def dataset_of(path: Path) -> str:
    """The data set whose rows or predictions a file holds, by its name."""
    return path.name.split(".")[0]


def in_folder(folder: Path, wanted: Sequence[str] | None, known: Sequence[str]) -> PredictionFiles:
    """The finished prediction files in a folder.

    Args:
        wanted: the data sets that count; None: all.
        known: those of the benchmark.
    Raises:
        InputError: a file that counts is half-written, or is named after no data set.
    """
    partial = sorted(folder.glob("*.partial*.jsonl"))
    finished = {dataset_of(path): path for path in sorted(folder.glob("*.jsonl")) if path not in partial}
    for path in partial:
        if wanted is None or dataset_of(path) in wanted:
            count = read_bytes(path).count(b"\n")
            raise InputError(f"{path} is half-written, {count} samples so far: start pred.py again to go on")
    for dataset, path in finished.items():
        if wanted is None and dataset not in known:
            raise InputError(f"{path} is named after none of the data sets: {', '.join(known)}")
    return PredictionFiles(str(folder), finished, folder)
