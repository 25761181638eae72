"""A run's folder: where it is, its lock, and what made it (`run.json`)."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from squeeze.allocations import ALLOCATIONS, DEFAULT
from squeeze.benchmarks.records import PredictedSample
from squeeze.config import SqueezeConfig, default_algorithm
from squeeze.errors import InputError
from squeeze.evictors import EVICTORS
from squeeze.ranks import ALONE, Ranks
from squeeze.runs.manifest import Begun, Counted
from squeeze.runs.samples import Samples
from squeeze.storage.files import Open, lock, read_bytes, read_json, remove, write_json, writing
from squeeze.storage.paths import in_checkout
from squeeze.text import file_name

RESULTS = ("result.json", "result_detail.json")
#: What a data set can be called: a manifest may come from anywhere, and its names become those of files.
PLAIN = re.compile(r"[A-Za-z0-9_-]{1,100}")
#: Settings that runs of earlier versions do not name; such a run goes on.
LATER = ("chat_template",)
PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "scikit-learn")


def run_folder(task: str, name: str, config: SqueezeConfig | None, model_type: str, seed: int = 42) -> Path:
    """A run's folder, relative to the working directory.

    Args:
        task: `Long`.
        name: the model's name.
        config: None for the full cache.
        model_type: the model's architecture, whose default algorithm has no level of its own.
        seed: 42 has no level of its own.
    """
    folder = Path(f"pred_{task}") / name
    if config is not None and config.algorithm_name not in (None, default_algorithm(model_type)):
        folder /= file_name(str(config.algorithm_name))
    if config is not None and config.allocation_name != DEFAULT:
        folder /= file_name(config.allocation_name)
    if config is not None and config.per != "layer":
        folder /= f"per-{config.per}"
    if seed != 42:
        folder /= f"seed-{seed}"
    if config is None:
        return folder / "full"
    folder /= f"{float(config.share):g}"
    return folder if "KV_class3" not in config.sizes else folder / f"{float(100 * config.fractions[1]):g}"


def cache_settings(config: SqueezeConfig | None) -> dict[str, Any]:
    """The settings of the cache that change results, for `Run`."""
    if config is None:
        return {"cache": "full"}
    algorithm, allocation = config.algorithm_name, config.allocation_name
    settings: dict[str, Any] = {"cache": "squeezed", "algorithm": algorithm, "allocation": allocation}
    settings |= config.sizes
    if config.per != "layer":
        settings["per"] = config.per
    if config.calibration is not None:
        settings["calibration"] = config.calibration.sha256
    if config.compile:  # rounds in another way, so that a near tie can fall to another token
        settings["compile"] = True
    if config.cuda_graph:  # attends to empty slots as well
        settings["cuda_graph"] = True
    if config.prefill_chunk is not None:
        settings["prefill_chunk"] = config.prefill_chunk
    settings |= ALLOCATIONS.record(allocation, config.allocator)
    if algorithm is None:
        return settings
    settings |= EVICTORS.record(algorithm, config.evictor)
    return settings | ({"start_size": config.evictor.sinks} if config.evictor.has("sinks") else {})


def versions() -> dict[str, str | None]:
    """Versions of what computes the results, and this project's own revision where git knows it."""
    record: dict[str, str | None] = {"python": platform.python_version()}
    record |= {package: version(package) for package in PACKAGES} | {"git": None}
    if in_checkout():  # elsewhere git would speak of whatever the environment lies in
        with suppress(OSError):  # no git
            git = ["git", "describe", "--always", "--dirty"]
            done = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True)
            record["git"] = done.stdout.strip() or None
    return record


class Run:
    """A run's folder. `start` locks it for this process until `close`, and nothing that is there is changed before
    the first sample is computed: where that fails, the folder is left as it was found.

    Args:
        folder: see `run_folder`.
        settings: everything that changes results, the same for all data sets.
        info: how this process was started and on what; `run.json` lists every start of a data set.
        overwrite: drop the samples that are there, all of them if they were made with other settings.
        kind: of a sample, see `squeeze.benchmarks.base.Measure`.
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
        kind: type[Any] = PredictedSample,
        ranks: Ranks = ALONE,
    ) -> None:
        self.ranks = ranks
        self.folder = folder
        self.path = folder / "run.json"
        self.settings = settings
        self.info = info
        self.overwrite = overwrite
        self.kind = kind
        self._lock: Open | None = None
        self._made: list[Path] = []
        self._begun: list[Samples] = []
        self._read()

    def _read(self) -> None:
        previous = self._previous()
        difference = _difference(previous["settings"], self.settings) if previous else None
        if difference and not self.overwrite:
            raise InputError(f"{self.folder} holds a run with {difference}: --overwrite replaces it")
        #: Data sets of a run with other settings, whose files are dropped.
        self.replaced = list(filter(PLAIN.fullmatch, previous["datasets"])) if previous and difference else []
        known = previous["datasets"] if previous and not difference else {}
        self.manifest: dict[str, Any] = {"settings": self.settings, "datasets": known}

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let other processes write into the folder; it is as it was found if no sample was computed."""
        if not any(samples.exist for samples in self._begun):
            for path in reversed(self._made):
                with suppress(OSError):  # others' files are in it by now
                    if path.is_dir():
                        path.rmdir()
                    else:
                        path.unlink()
        if self._lock is not None:
            os.ftruncate(self._lock.number, 0)
            self._lock.close()
        self._lock, self._made, self._begun = None, [], []

    def _previous(self) -> dict[str, Any] | None:
        if not self.path.exists():
            return None
        try:
            manifest = read_json(self.path, Begun)
            return {"settings": manifest["settings"], "datasets": manifest["datasets"]}
        except InputError as error:
            if self.overwrite:
                return {"settings": {}, "datasets": {}}
            raise InputError(f"{error}: --overwrite replaces the run") from None

    def open(self, dataset: str, settings: dict[str, Any], total: int) -> Samples:
        """Read what is there of one data set's first `total` samples.

        Args:
            settings: what changes results for this data set only, such as its data and prompt.
        Raises:
            InputError: the samples that are there were made with other settings, or cannot be read.
        """
        samples = Samples(self.folder, dataset, settings, total, self.kind, str(self.ranks.rank or ""))
        if self.ranks.first and not self.overwrite:
            self._find(samples)
        if self.ranks.first and not samples.complete:
            with writing(f"into {self.folder}"):
                samples.check()
        return samples

    def _find(self, samples: Samples) -> None:
        """Read the samples that are there, which must be those of this run."""
        dataset, settings = samples.dataset, samples.settings
        previous = self.manifest["datasets"].get(dataset)
        if previous is None and samples.exist:
            raise InputError(
                f"{self.folder} has {dataset} samples that run.json does not know: --overwrite drops them"
            )
        difference = _difference(previous["settings"], settings) if previous else None
        if difference:
            raise InputError(f"{self.folder} holds {dataset} with {difference}: --overwrite replaces it")
        samples.read()

    def start(self, samples: Samples) -> None:
        """Lock the folder if samples are missing, and look at them again; every process of the run calls this.

        Raises:
            InputError: the folder cannot be written, or another run's process is writing into it.
        """
        if self.ranks.first and not samples.complete:
            with writing(f"into {self.folder}"):
                if self._lock is None:
                    self._take()
                    self._read()  # another process may have written meanwhile
                samples.check()
                if not self.overwrite:
                    self._find(samples)
        samples.missing, complete = self.ranks.share((samples.missing, samples.complete))
        samples.begin = None if complete else partial(self.begin, samples)

    def _take(self) -> None:
        """Make the folder where it is not there, and lock it."""
        self._made = [folder for folder in (self.folder, *self.folder.parents) if not folder.exists()][::-1]
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / ".lock"
        fresh = not path.exists()
        self._lock = lock(path)
        if self._lock is None:
            holder = read_bytes(path).decode(errors="replace").strip() or "another process"
            raise InputError(f"{self.folder} is being written by {holder}: wait for it, or end it")
        self._made += [path] if fresh else []
        os.ftruncate(self._lock.number, 0)
        self._lock.write(f"process {os.getpid()} on {platform.node()}".encode())

    def begin(self, samples: Samples) -> None:
        """Make the folder ready for new samples; every process of the run calls this once, when it has some or is
        through, and goes on when all have: before that, nothing in the folder is changed.

        Raises:
            InputError: the folder cannot be written.
        """
        samples.begin = None
        self.ranks.share(None)
        if self.ranks.first:
            with writing(f"into {self.folder}"):
                self._begin(samples)
        self.ranks.share(None)

    def _begin(self, samples: Samples) -> None:
        self._begun.append(samples)
        for name in RESULTS:
            remove(self.folder / name)
        for dataset in self.replaced:
            Samples(self.folder, dataset, {}, 0).remove()
        self.replaced = []
        if self.overwrite:
            samples.remove()
        if not self.path.exists():
            self._made.append(self.path)
        known = self.manifest["datasets"]
        earlier = [] if self.overwrite else known.get(samples.dataset, {}).get("starts", [])
        starts = [*earlier, {"samples_done": len(samples.records), **self.info}]
        known[samples.dataset] = {"settings": samples.settings, "starts": starts}
        write_json(self.path, self.manifest)
        samples.reopen()
        for dataset in filter(PLAIN.fullmatch, known):  # what a kill left of data sets that this start does not want
            Samples(self.folder, dataset, {}, 0).sweep()

    def note(self, samples: Samples, **facts: Any) -> None:
        """Add to what `run.json` will say about the latest start."""
        if self.ranks.first:
            if samples.begin is not None:
                samples.begin()
            self.manifest["datasets"][samples.dataset]["starts"][-1] |= facts

    def finish(self, samples: Samples, summarize: Callable[[Sequence[Any]], dict[str, Any]], **more: Any) -> None:
        """Write the published file of a data set whose samples are all there; every process of the run calls this.

        Args:
            summarize: turns the samples' `stats` into what `run.json` says about the data set.
            more: what it says beside that.
        """
        if samples.begin is not None:
            samples.begin()
        self.ranks.share(None)  # until all have done theirs
        if not self.ranks.first or samples.complete:
            return
        samples.read()
        summary = summarize([record["stats"] for record in samples.records])
        self.manifest["datasets"][samples.dataset] |= {**more, **summary}
        with writing(f"into {self.folder}", "; no sample is lost"):
            write_json(self.path, self.manifest)
            samples.publish()


def check_count(folder: Path, dataset: str, lines: int) -> None:
    """Raises InputError if `run.json` knows of another number of samples than the prediction file has lines."""
    path = folder / "run.json"
    if not path.exists():
        return  # not a folder of this project's
    samples = read_json(path, Counted)["datasets"].get(dataset, {}).get("samples", lines)
    if samples != lines:
        raise InputError(f"{folder / dataset}.jsonl has {lines} lines, but run.json counts {samples} samples")


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """Words for the settings that differ, or None."""
    new = json.loads(json.dumps(new))  # as it reads back
    known = {**old, **{key: value for key, value in new.items() if key in old or key not in LATER}}
    changed = [key for key in known if old.get(key) != new.get(key)]
    return ", ".join(f"{key} {_short(old.get(key))} (now {_short(new.get(key))})" for key in changed) or None


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
