"""A run's folder: where it is, its lock, and what made it (`run.json`)."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from squeeze.config import DEFAULT_ALGORITHM, InputError, SqueezeConfig
from squeeze.distributed import ALONE, Ranks
from squeeze.files import write_json
from squeeze.samples import PUBLISHED, Samples

RESULTS = ("result.json", "result_detail.json")
#: Settings that runs of earlier versions do not name; such a run goes on.
LATER = ("chat_template",)
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
    folder /= f"{float(config.share):g}"
    return folder if config.kv_class3 is None else folder / f"{float(100 * config.fractions[1]):g}"


def cache_settings(config: SqueezeConfig | None) -> dict[str, Any]:
    """The settings of the cache that change results, for `Run`."""
    if config is None:
        return {"cache": "full"}
    settings: dict[str, Any] = {"cache": "squeezed", "algorithm": config.algorithm, "allocation": config.allocation}
    settings |= config.sizes
    if config.calibration is not None:
        settings["calibration"] = config.calibration.sha256
    if config.compile:  # rounds in another way, so that a near tie can fall to another token
        settings["compile"] = True
    if config.prefill_chunk is not None:
        settings["prefill_chunk"] = config.prefill_chunk
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
        published: the fields of a sample that its published file has.
        ranks: this process among those of the run: only the first reads and locks the folder, and writes `run.json`.
    Raises:
        InputError: the folder holds a run with other settings.
    """

    def __init__(
        self,
        folder: Path,
        settings: dict[str, Any],
        info: dict[str, Any],
        overwrite: bool = False,
        published: Sequence[str] = PUBLISHED,
        ranks: Ranks = ALONE,
    ) -> None:
        self.ranks = ranks
        self.folder = folder
        self.path = folder / "run.json"
        self.settings = settings
        self.info = info
        self.overwrite = overwrite
        self.published = published
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
        samples = Samples(self.folder, dataset, settings, total, self.published, str(self.ranks.rank or ""))
        if self.overwrite or not self.ranks.first:
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
        """Make the folder ready for the samples that are missing, if any are; every process of the run calls this.

        Raises:
            InputError: the folder cannot be written, or another run's process is writing into it.
        """
        if self.ranks.first and not samples.complete:
            self._start(samples)
        samples.missing = self.ranks.share(samples.missing)

    def _start(self, samples: Samples) -> None:
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
            stale = self.folder.glob(".*.json*.*")  # what `write_whole` was writing when it was killed
            for path in (*stale, *(self.folder / name for name in RESULTS)):
                path.unlink(missing_ok=True)
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
        if self.ranks.first:
            self.manifest["datasets"][samples.dataset]["starts"][-1] |= found

    def finish(
        self, samples: Samples, summarize: Callable[[Sequence[dict[str, Any]]], dict[str, Any]], **more: Any
    ) -> None:
        """Write the published file of a data set whose samples are all there; every process of the run calls this.

        Args:
            summarize: turns the samples' `stats` into what `run.json` says about the data set.
            more: what it says beside that.
        """
        self.ranks.share(None)  # until all have done theirs
        if not self.ranks.first or samples.complete:
            return
        samples.read()
        summary = summarize([record["stats"] for record in samples.records])
        self.manifest["datasets"][samples.dataset] |= {**more, **summary}
        try:
            write_json(self.path, self.manifest)
            samples.publish()
        except OSError as error:
            raise InputError(f"cannot write into {self.folder}: {error.strerror}; no sample is lost") from None


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
    known = {**old, **{key: value for key, value in new.items() if key in old or key not in LATER}}
    changed = [key for key in known if old.get(key) != new.get(key)]
    return ", ".join(f"{key} {_short(old.get(key))} (now {_short(new.get(key))})" for key in changed) or None


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
