"""The finished samples of a run, which survive an interruption.

While a data set runs, each finished sample is a line of `<dataset>.partial.jsonl`; several processes that share a run
have one such file each. When it is done, the published `<dataset>.jsonl` is written, and the samples with what was
measured on each become `samples/<dataset>.jsonl`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from squeeze.config import InputError
from squeeze.files import read_bytes, to_jsonl, write_whole
from squeeze.records import Sample, check_layers, published, read_samples

#: Seconds after which finished samples are forced to the disk, so that a power cut costs no more.
SYNC_SECONDS = 3


class Samples:
    """The finished samples of one data set, in the order of their index.

    Args:
        kind: of a sample, see `squeeze.records`: `index`, what is published of it, and `stats`, what was measured.
        writer: which of several processes this one is, the first being ""; only that one merges and publishes.

    Attributes:
        records: the finished samples, of that kind.
        missing: indices that are still to be run.
    """

    def __init__(
        self,
        folder: Path,
        dataset: str,
        settings: dict[str, Any],
        total: int,
        kind: type[Any] = Sample,
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
        self._synced = time.monotonic()

    @property
    def partials(self) -> list[Path]:
        """Partial files of all processes that took part."""
        return sorted(self.folder.glob(f"{self.dataset}.partial*.jsonl"))

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
        found: dict[int, Any] = {}
        for source in self.partials or [self.finished]:
            whole = _whole_lines(source)
            rows = read_samples(whole, source, self.kind) if whole else []
            # A merge that was cut short leaves a sample in two files, the same in both.
            found = {row["index"]: row for row in rows} | found
        check_layers(list(found.values()), self.kind, self.partials[0] if self.partials else self.finished)
        self.records = [found[index] for index in sorted(found)]
        self.missing = [index for index in range(self.total) if index not in found]

    def reopen(self) -> None:
        """Put what `read` found into one partial file, whatever it was in, and take back what was published."""
        others = [path for path in self.partials if path != self.partial]
        if others or _torn(self.partial) or (self.records and not self.partial.exists()):
            write_whole(self.partial, to_jsonl(self.records))
        for path in others:
            path.unlink()
        self.published.unlink(missing_ok=True)
        self.finished.unlink(missing_ok=True)

    def append(self, records: Sequence[dict[str, Any]]) -> None:
        """Add a finished batch, handed to the operating system before the next one starts; what is there stays.

        Args:
            records: `index`, the published fields and `stats` of each sample.
        Raises:
            InputError: it cannot be written.
        """
        fresh = [record for record in records if record["index"] in self.missing]
        try:
            with self.partial.open("a", encoding="utf-8", newline="\n") as file:
                file.write(to_jsonl(fresh))
                file.flush()
                if time.monotonic() - self._synced > SYNC_SECONDS:
                    os.fsync(file.fileno())
                    self._synced = time.monotonic()
        except OSError as error:
            raise InputError(f"cannot write {self.partial}: {error.strerror}; earlier samples are kept") from None
        self.records = sorted([*self.records, *fresh], key=lambda row: row["index"])
        done = {record["index"] for record in fresh}
        self.missing = [index for index in self.missing if index not in done]

    def publish(self) -> None:
        """Write `<dataset>.jsonl` and all that is known of its samples, and let go of the partial files."""
        fields = published(self.kind)
        write_whole(self.published, to_jsonl([{key: row[key] for key in fields} for row in self.records]))
        self.finished.parent.mkdir(exist_ok=True)
        write_whole(self.finished, to_jsonl(self.records))
        for path in self.partials:
            path.unlink()

    def remove(self) -> None:
        """Forget every sample of this data set."""
        for path in (*self.partials, self.finished, self.published):
            path.unlink(missing_ok=True)


def _whole_lines(path: Path) -> bytes:
    data = read_bytes(path) if path.exists() else b""
    return data[: data.rfind(b"\n") + 1]


def _torn(path: Path) -> bool:
    return path.exists() and len(_whole_lines(path)) < path.stat().st_size
