"""The finished samples of a run, which survive an interruption.

While a data set runs, each finished sample is a line of `<dataset>.partial.jsonl`; several processes that share a run
have one such file each. When it is done, the published `<dataset>.jsonl` is written, and the samples with what was
measured on each become `samples/<dataset>.jsonl`.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from squeeze.benchmarks.records import PredictedSample, check_layers, published, read_samples
from squeeze.storage.files import Open, check_place, read_bytes, remove, sweep, to_jsonl, write_whole, writing

#: Seconds after which finished samples are forced to the disk, so that a power cut costs no more.
SYNC_SECONDS = 3


class Samples:
    """The finished samples of one data set, in the order of their index.

    Args:
        kind: of a sample, see `squeeze.benchmarks.base.Measure`.
        writer: which of several processes this one is, the first being ""; only that one merges and publishes.

    Attributes:
        records: the finished samples, of that kind.
        missing: indices that are still to be run.
        begin: what is to be done once, before the first sample is added; None where it is done.
    """

    def __init__(
        self,
        folder: Path,
        dataset: str,
        settings: dict[str, Any],
        total: int,
        kind: type[Any] = PredictedSample,
        writer: str = "",
    ) -> None:
        self.folder = folder
        self.dataset = dataset
        self.settings = settings
        self.kind = kind
        self.partial = folder / (f"{dataset}.partial.{writer}.jsonl" if writer else f"{dataset}.partial.jsonl")
        self.finished = folder / "samples" / f"{dataset}.jsonl"
        self.published = folder / f"{dataset}.jsonl"
        self.total = total
        self.records: list[dict[str, Any]] = []
        self.missing = list(range(total))
        self.begin: Callable[[], None] | None = None
        self._gathered = True  # `partial` holds all of `records`
        self._synced = time.monotonic()

    @property
    def partials(self) -> list[Path]:
        """Partial files of all processes that took part: `samsum.partial.jsonl`, `samsum.partial.1.jsonl`, ..."""
        name = re.compile(rf"{re.escape(self.dataset)}\.partial(\.\d+(-.+)?)?\.jsonl")
        return sorted(path for path in self.folder.glob("*.partial*") if name.fullmatch(path.name))

    @property
    def files(self) -> list[Path]:
        """Every file of this data set, whether it is there or not."""
        return sorted({*self.partials, self.partial, self.finished, self.published})

    @property
    def exist(self) -> bool:
        """True if there is any file of this data set."""
        return bool(self.partials) or self.finished.exists() or self.published.exists()

    @property
    def complete(self) -> bool:
        """True if the published file is there and nothing is missing."""
        return not self.missing and self.published.exists() and not self.partials

    def read(self) -> None:
        """Read the samples that are there; a torn last line does not count.

        Raises:
            InputError: a file is not what was written into it.
        """
        samples: dict[int, Any] = {}
        own = 0
        for source in [*self.partials, self.finished]:
            whole = _whole_lines(source)
            rows = read_samples(whole, source, self.kind) if whole else []
            # What was cut short while files were put together leaves a sample in two of them, the same in both.
            samples = {row["index"]: row for row in rows} | samples
            own = len(rows) if source == self.partial else own
        check_layers(list(samples.values()), self.partials[0] if self.partials else self.finished)
        self.records = [samples[index] for index in sorted(samples)]
        self.missing = [index for index in range(self.total) if index not in samples]
        self._gathered = own == len(samples) and not _torn(self.partial)

    def check(self) -> None:
        """Raises OSError if anything but a regular file is in the place of a file that is written, or a link in that
        of a folder."""
        check_place(self.finished.parent, folder=True)
        for path in self.files:
            check_place(path)

    def reopen(self) -> None:
        """Put what `read` found into one partial file, whatever it was in, and take back what was published."""
        if not self._gathered:
            write_whole(self.partial, _lines(self.records))
        stale = [path for path in self.partials if path != self.partial]
        for path in (*stale, self.published, self.finished):
            remove(path)

    def append(self, records: Sequence[dict[str, Any]]) -> None:
        """Add a finished batch, handed to the operating system before the next one starts; what is there stays.

        Args:
            records: `index`, the published fields and `stats` of each sample.
        Raises:
            InputError: it cannot be written.
        """
        if self.begin is not None:
            self.begin()
        fresh = [record for record in records if record["index"] in self.missing]
        with (
            writing(self.partial, "; earlier samples are kept"),
            Open(self.partial, os.O_WRONLY | os.O_CREAT | os.O_APPEND) as file,
        ):
            file.write(_lines(fresh).encode("utf-8"))
            if time.monotonic() - self._synced > SYNC_SECONDS:
                file.sync()
                self._synced = time.monotonic()
        self.records = sorted([*self.records, *fresh], key=lambda row: row["index"])
        done = {record["index"] for record in fresh}
        self.missing = [index for index in self.missing if index not in done]

    def publish(self) -> None:
        """Write `<dataset>.jsonl` and all that is known of its samples, and let go of the partial files."""
        self.check()
        fields = published(self.kind)
        write_whole(self.published, to_jsonl([{key: row[key] for key in fields} for row in self.records]))
        self.finished.parent.mkdir(exist_ok=True)
        write_whole(self.finished, _lines(self.records))
        for path in self.partials:
            remove(path)

    def remove(self) -> None:
        """Forget every sample of this data set."""
        for path in self.files:
            remove(path)

    def sweep(self) -> None:
        """Remove what was left of writing its files when a process was killed."""
        for path in self.files:
            sweep(path)


def _lines(records: Sequence[dict[str, Any]]) -> str:
    """Samples as lines of a file."""
    return to_jsonl([record | {"stats": record["stats"].to_json()} for record in records])


def _whole_lines(path: Path) -> bytes:
    data = read_bytes(path) if path.exists() else b""
    return data[: data.rfind(b"\n") + 1]


def _torn(path: Path) -> bool:
    return path.exists() and len(_whole_lines(path)) < path.stat().st_size
