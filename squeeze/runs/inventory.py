"""The runs in folders: what each says about itself, and what is left out and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from squeeze.benchmarks.base import Benchmark
from squeeze.benchmarks.registry import owner
from squeeze.errors import InputError
from squeeze.runs.manifest import Manifest, check_settings, check_summary
from squeeze.storage.files import read_json

COLUMNS = (
    *("model", "algorithm", "allocation", "ini_size", "KV_class3"),
    *("samples", "score", "KV kept", "KV MB", "tokens/s", "classes"),
)
GO_ON = "start pred.py with the same flags to go on"


@dataclass(frozen=True)
class Entry:
    """A finished data set of a run.

    Args:
        folder: the run's.
        dataset: its name.
        settings: the run's, of `run.json`.
        summary: what `run.json` says about the data set.
    """

    folder: Path
    dataset: str
    settings: dict[str, Any]
    summary: dict[str, Any]

    @property
    def fidelity(self) -> bool:
        """True for a comparison with the full cache, token by token, in place of predictions."""
        return self.settings.get("measure") == "fidelity"

    @property
    def start(self) -> dict[str, Any]:
        """The run's last start: `command`, `model`, `device`, `versions`."""
        return self.summary["starts"][-1]

    @property
    def benchmark(self) -> Benchmark:
        """The benchmark whose data set it is."""
        return owner(self.folder, self.dataset)

    @property
    def unscored(self) -> str | None:
        """The command that scores it, where the benchmark has its own; None if there is a score, or none is needed."""
        scorer = self.benchmark.scorer
        if scorer is None or self.fidelity or (self.folder / "result.json").exists():
            return None
        return f"{scorer} {self.folder}"


@dataclass
class Inventory:
    """Args:
    entries: finished data sets of runs, in order of their folders.
    benches: files of `squeeze.bench`.
    problems: a sentence for each thing that is there and was left out.
    damaged: True if any of it is damaged, and not just unfinished.
    """

    entries: list[Entry] = field(default_factory=list)
    benches: list[Path] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    damaged: bool = False


def find(paths: Sequence[Path]) -> Inventory:
    """Read every run, and find every `bench.json`, in or below `paths`.

    Raises:
        InputError: a path holds neither.
    """
    runs: dict[Path, Path] = {}
    benches: dict[Path, Path] = {}
    for path in paths:
        manifests = [path] if path.name == "run.json" else sorted(path.rglob("run.json"))
        measured = [path] if path.is_file() and path.suffix == ".json" and not manifests else []
        measured += sorted(path.rglob("bench.json"))
        if not manifests and not measured:
            raise InputError(f"{path} holds no run: pred.py makes one")
        for manifest in manifests:
            runs.setdefault(manifest.parent.resolve(), manifest.parent)
        for bench in measured:
            benches.setdefault(bench.resolve(), bench)
    inventory = Inventory(benches=list(benches.values()))
    for folder in runs.values():
        _read(folder, inventory)
    return inventory


def _read(folder: Path, inventory: Inventory) -> None:
    """Add a run's data sets to `inventory`, or why they are left out."""
    path = folder / "run.json"
    try:
        manifest = read_json(path, Manifest)
        settings, datasets = manifest["settings"], manifest["datasets"]
        check_settings(settings, path)
    except InputError as error:
        inventory.problems.append(str(error))
        inventory.damaged = True
        return
    partial = {path.name.split(".")[0]: path.name for path in sorted(folder.glob("*.partial*.jsonl"))}
    for dataset in {**dict.fromkeys(partial), **datasets}:
        summary = datasets.get(dataset, {})
        if dataset in partial or "samples" not in summary:
            which = f" ({partial[dataset]} is there)" if dataset in partial else ""
            inventory.problems.append(f"{folder}: {dataset} is not finished{which}: {GO_ON}")
            continue
        entry = Entry(folder, dataset, settings, summary)
        try:
            check_summary(summary, entry.fidelity, path, dataset)
            inventory.entries.append(entry)
        except InputError as error:
            inventory.problems.append(str(error))
            inventory.damaged = True
    if not datasets:
        inventory.problems.append(f"{folder} has no data set yet: {GO_ON}")


def at_once(together: int) -> str:
    """What is said after a run's speed, its share of a batch's where several runs decoded as one."""
    return f" ({together:g} runs at once)" if together > 1 else ""


def describe(settings: dict[str, Any], summary: dict[str, Any]) -> dict[str, str]:
    """A run's algorithm, allocation and sizes as text, and how its layers fell into classes."""
    if settings["cache"] == "full":
        return dict.fromkeys(COLUMNS, "-") | {"algorithm": "full cache"}
    uniform = settings["ini_size"] == settings.get("KV_class3")
    # Without KV_class3 budgets do not follow from classes.
    layers = summary.get("layers_per_class", []) if "KV_class3" in settings else []
    allocation = "uniform" if uniform else settings["allocation"]
    return {
        "algorithm": settings["algorithm"] + (" of the context" if "compress" in settings else ""),
        "allocation": allocation
        + {"layer": "", "head": " by head", "adakv": " + adakv"}[settings.get("per", "layer")],
        "ini_size": f"{settings['ini_size']:g}",
        "KV_class3": f"{settings['KV_class3']:g}" if "KV_class3" in settings else "-",
        "classes": "-" if uniform or not layers else "/".join(f"{count:g}" for count in layers),
    }
