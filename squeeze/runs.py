"""A run's folder: where it is, what made it (`run.json`), and its samples, which survive an interruption.

While a data set runs, each finished sample is a line of `<dataset>.partial.jsonl`. When it is done, the published
`<dataset>.jsonl` is written and the partial file moves to `samples/<dataset>.jsonl`, since it also holds what was
measured on each sample.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from squeeze.config import DEFAULT_ALGORITHM, InputError, SqueezeConfig
from squeeze.files import parse_jsonl, to_jsonl, write_json, write_whole

#: A line of the published prediction file.
PUBLISHED = ("pred", "answers", "all_classes", "length")
RESULTS = ("result.json", "result_detail.json")
PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "scikit-learn")


def run_folder(task: str, name: str, config: SqueezeConfig | None, model_type: str, seed: int = 42) -> Path:
    """Where a run lies, relative to the working directory.

    Args:
        task: `Long`.
        name: the model's name.
        config: None for the full cache.
        model_type: `llama` or `mistral`, whose default algorithm has no level of its own.
        seed: 42 has no level of its own.
    """
    folder = Path(f"pred_{task}") / name
    if config is not None and config.algorithm not in (None, DEFAULT_ALGORITHM[model_type]):
        folder /= str(config.algorithm)
    if config is not None and config.allocation != "squeeze":
        folder /= config.allocation
    if seed != 42:
        folder /= f"seed-{seed}"
    if config is None:
        return folder / "full"
    ini_size, kv_class3 = config.fractions
    return folder / f"{float(ini_size):g}" / f"{float(100 * kv_class3):g}"


def cache_settings(config: SqueezeConfig | None) -> dict[str, Any]:
    """The settings of the cache that change results, for `Run`."""
    if config is None:
        return {"cache": "full"}
    ini_size, kv_class3 = config.fractions
    settings = {
        "cache": "squeezed",
        "algorithm": config.algorithm,
        "allocation": config.allocation,
        "ini_size": float(ini_size),
        "KV_class3": float(kv_class3),
    }
    if config.compile:  # rounds in another way, so that a near tie can fall to another token
        settings["compile"] = True
    return settings | ({"start_size": config.start_size} if config.algorithm == "streaming" else {})


def versions() -> dict[str, str | None]:
    """Versions of what computes the results, and this project's own revision where git knows it."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    found |= {package: version(package) for package in PACKAGES}
    try:
        git = ["git", "describe", "--always", "--dirty"]
        done = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True)
        return found | {"git": done.stdout.strip() or None}
    except OSError:  # no git here
        return found | {"git": None}


class Run:
    """A run's folder. Nothing is written before `start`, which locks it for this process until `close`.

    Args:
        folder: see `run_folder`.
        settings: everything that changes results, the same for all data sets.
        info: how this process was started and on what; `run.json` lists every start of a data set.
        overwrite: drop the samples that are there, all of them if they were made with other settings.
    Raises:
        InputError: the folder holds a run with other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], info: dict[str, Any], overwrite: bool = False) -> None:
        self.folder = folder
        self.path = folder / "run.json"
        self.settings = settings
        self.info = info
        self.overwrite = overwrite
        self._lock: IO[str] | None = None
        self._read()

    def _read(self) -> None:
        previous = self._previous()
        difference = _difference(previous["settings"], _plain(self.settings)) if previous else None
        if difference and not self.overwrite:
            raise InputError(f"{self.folder} holds a run with {difference}: --overwrite replaces it")
        self.replaced = bool(difference)
        known = previous["datasets"] if previous and not difference else {}
        self.manifest: dict[str, Any] = {"settings": self.settings, "datasets": known}

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let other processes write into the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _previous(self) -> dict[str, Any] | None:
        if not self.path.exists():
            return None
        try:
            manifest = json.loads(self.path.read_text(encoding="utf-8"))
            return {"settings": dict(manifest["settings"]), "datasets": dict(manifest["datasets"])}
        except (OSError, ValueError, KeyError, TypeError):
            if self.overwrite:
                return {"settings": {}, "datasets": {}}
            raise InputError(f"{self.path} is not a run's manifest: --overwrite replaces the run") from None

    def open(self, dataset: str, settings: dict[str, Any], total: int) -> Samples:
        """Read what is there of one data set's first `total` samples.

        Args:
            settings: what changes results for this data set only, such as its data and prompt.
        Raises:
            InputError: the samples that are there were made with other settings, or cannot be read.
        """
        samples = Samples(self.folder, dataset, settings, total)
        if self.overwrite:
            return samples
        previous = self.manifest["datasets"].get(dataset)
        if previous is None and samples.exist:
            raise InputError(
                f"{self.folder} has {dataset} samples that run.json does not know: --overwrite drops them"
            )
        difference = _difference(previous["settings"], _plain(settings)) if previous else None
        if difference:
            raise InputError(f"{self.folder} holds {dataset} with {difference}: --overwrite replaces it")
        samples.read()
        return samples

    def start(self, samples: Samples) -> None:
        """Make the folder ready for the samples that are missing.

        Raises:
            InputError: the folder cannot be written, or another process is writing into it.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self._lock is None:
                self._lock = _lock(self.folder)
                self._read()  # another process may have written meanwhile
            if not self.overwrite:
                samples.read()
            if self.replaced:
                _remove_run(self.folder)
                self.replaced = False
            for name in RESULTS:
                (self.folder / name).unlink(missing_ok=True)
            if self.overwrite:
                samples.remove()
            earlier = [] if self.overwrite else self.manifest["datasets"].get(samples.dataset, {}).get("starts", [])
            starts = [*earlier, {"samples_done": len(samples.records), **self.info}]
            self.manifest["datasets"][samples.dataset] = {"settings": samples.settings, "starts": starts}
            write_json(self.path, self.manifest)
            samples.reopen()
        except OSError as error:
            raise InputError(f"cannot write into {self.folder}: {error.strerror}") from None

    def note(self, samples: Samples, **found: Any) -> None:
        """Add to what `run.json` will say about the latest start."""
        self.manifest["datasets"][samples.dataset]["starts"][-1] |= found

    def finish(self, samples: Samples, summary: dict[str, Any]) -> None:
        """Write the published predictions of a data set whose samples are all there, and what was measured."""
        self.manifest["datasets"][samples.dataset] |= summary
        try:
            write_json(self.path, self.manifest)
            samples.publish()
        except OSError as error:
            raise InputError(f"cannot write into {self.folder}: {error.strerror}; no sample is lost") from None


class Samples:
    """The finished samples of one data set, in the order of their index.

    Attributes:
        records: the finished samples: `index`, the published fields, and `stats`, what was measured.
        missing: indices that are still to be run.
    """

    def __init__(self, folder: Path, dataset: str, settings: dict[str, Any], total: int) -> None:
        self.dataset = dataset
        self.settings = settings
        self.partial = folder / f"{dataset}.partial.jsonl"
        self.finished = folder / "samples" / f"{dataset}.jsonl"
        self.published = folder / f"{dataset}.jsonl"
        self.total = total
        self.records: list[dict[str, Any]] = []
        self.missing = list(range(total))

    @property
    def exist(self) -> bool:
        """True if there is any file of this data set."""
        return any(path.exists() for path in (self.partial, self.finished, self.published))

    @property
    def complete(self) -> bool:
        """True if the published file is there and nothing is missing."""
        return not self.missing and self.published.exists() and not self.partial.exists()

    def read(self) -> None:
        """Read the samples that are there; a torn last line does not count.

        Raises:
            InputError: the file is not what was written into it.
        """
        source = self.partial if self.partial.exists() else self.finished
        whole = _whole_lines(source)
        if whole:
            self.records = [row for _, row in parse_jsonl(whole, source, ("index", "stats", *PUBLISHED))]
            self.records.sort(key=lambda row: row["index"])
        done = {row["index"] for row in self.records}
        if len(done) < len(self.records):
            raise InputError(f"{source} has a sample twice: --overwrite starts anew")
        self.missing = [index for index in range(self.total) if index not in done]

    def reopen(self) -> None:
        """Cut a torn last line off; take a finished data set up again where more samples are wanted than it has."""
        if not self.partial.exists() and self.finished.exists():
            os.replace(self.finished, self.partial)
        self.published.unlink(missing_ok=True)
        if self.partial.exists():
            os.truncate(self.partial, len(_whole_lines(self.partial)))

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
        except OSError as error:
            raise InputError(f"cannot write {self.partial}: {error.strerror}; earlier samples are kept") from None
        self.records = sorted([*self.records, *fresh], key=lambda row: row["index"])
        done = {record["index"] for record in fresh}
        self.missing = [index for index in self.missing if index not in done]

    def publish(self) -> None:
        """Write `<dataset>.jsonl` in LongBench's form and put the partial file away."""
        write_whole(self.published, to_jsonl([{key: row[key] for key in PUBLISHED} for row in self.records]))
        self.finished.parent.mkdir(exist_ok=True)
        if self.partial.exists():
            os.replace(self.partial, self.finished)

    def remove(self) -> None:
        """Forget every sample of this data set."""
        for path in (self.partial, self.finished, self.published):
            path.unlink(missing_ok=True)


def _lock(folder: Path) -> IO[str]:
    """Take the folder's lock, which ends with this process; InputError says who holds it."""
    file = (folder / ".lock").open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise InputError(f"{folder} is being written by {holder}: wait for it, or end it") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    return file


def check_count(folder: Path, dataset: str, lines: int) -> None:
    """Raises InputError if `run.json` knows of another number of samples than the prediction file has lines."""
    try:
        manifest = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        samples = manifest["datasets"][dataset]["samples"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # not a folder of this project's
    if samples != lines:
        raise InputError(f"{folder / dataset}.jsonl has {lines} lines, but run.json counts {samples} samples")


def _whole_lines(path: Path) -> bytes:
    data = path.read_bytes() if path.exists() else b""
    return data[: data.rfind(b"\n") + 1]


def _remove_run(folder: Path) -> None:
    """Delete what a run wrote into its folder, and nothing else."""
    for path in [*folder.glob("*.jsonl"), folder / "run.json", *(folder / name for name in RESULTS)]:
        path.unlink(missing_ok=True)
    shutil.rmtree(folder / "samples", ignore_errors=True)


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """`settings` as they read back from JSON."""
    return json.loads(json.dumps(settings))


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """Words for the settings that differ, or None."""
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return ", ".join(f"{key} {_short(old.get(key))} (now {_short(new.get(key))})" for key in changed) or None


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
