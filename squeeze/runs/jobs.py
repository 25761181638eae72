"""Runs of `pred.py`, prepared: descriptions checked, models and data found, before any model is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from squeeze.benchmarks.base import Benchmark, DataSet, Options
from squeeze.benchmarks.registry import BENCHMARKS
from squeeze.config import SqueezeConfig
from squeeze.errors import InputError
from squeeze.models import sources
from squeeze.ranks import ALONE, Ranks
from squeeze.runs.folder import cache_settings, versions
from squeeze.runs.resolve import Reader, folder_of, reader, resolve
from squeeze.runs.spec import MODEL_MISSING, RunSpec

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Job:
    """One run of `pred.py`, checked, before its model is loaded.

    Args:
        spec: its description.
        config: of the cache, complete; None for the full one.
        source, model_folder: the model's name, and where its files are.
        data: a data set or a file of requests each.
        notes: sentences for the user.
        folder: the run's own.
        settings, info: for `squeeze.runs.folder.Run`.
        options: what prompts are made and run with.
    """

    spec: RunSpec
    config: SqueezeConfig | None
    source: sources.ModelSource
    model_folder: Path
    device: torch.device
    dtype: torch.dtype
    data: Sequence[DataSet]
    notes: tuple[str, ...]
    folder: Path
    settings: dict[str, Any]
    info: dict[str, Any]
    options: Options

    @property
    def benchmark(self) -> Benchmark:
        """The benchmark of the data."""
        return BENCHMARKS[self.spec.pred]

    @property
    def model_key(self) -> tuple[Any, ...]:
        """Equal for jobs that can share a loaded model and its prompts, and what is sampled after them."""
        spec = self.spec
        loaded = self.model_folder, self.device, self.dtype, spec.attn, spec.allow_pickle, spec.device_map
        return *loaded, self.options

    def settings_of(self, data: DataSet) -> dict[str, Any]:
        """The settings that change the results of one data set, for `Run.open`."""
        return self.benchmark.settings(data, self.options)

    def count(self, data: DataSet) -> int:
        """Samples of one data set."""
        return self.benchmark.count(data, self.spec.sample_num)


def prepare(spec: RunSpec, process: Ranks, read: Reader | None = None) -> Job:
    """Check a run's description, and find its model and data.

    Args:
        process: this one among those of the run.
        read: what is read once for several jobs, see `squeeze.runs.resolve.reader`.
    Raises:
        InputError: a flag is wrong, or the model or the data are not there.
    """
    read = read or reader()
    spec.check()
    if spec.model is None:
        raise InputError(MODEL_MISSING)
    spec.config()
    benchmark = BENCHMARKS[spec.pred]
    datasets = benchmark.asked(spec.flags)
    read(sources.resolve, spec.model, spec.model_path)  # a wrong name is said before data are looked for

    # torch and transformers take seconds to import: --help and what is wrong with the flags should not wait for them.
    import torch

    from squeeze import devices

    device = devices.pick_device(spec.device, process.local)
    dtype = devices.pick_dtype(spec.dtype, device)
    if spec.cuda_graph:
        from squeeze.engine.graph import check_device

        check_device(device)
    location = [getattr(spec, name) for name in benchmark.locations]
    data: list[DataSet] = [read(benchmark.read, dataset, *location) for dataset in datasets]
    model = resolve(spec, read)
    name, model_type = model.source.name, model.kind
    max_length, note = benchmark.prompt_limit(model.source, model.positions)
    for one in data:
        benchmark.check(one, max_length)
    benchmark_note = benchmark.note(datasets, name, model.folder, spec.chat)
    settings = {"model": model.identity, "max_length": max_length, "dtype": str(dtype).removeprefix("torch.")}
    settings |= {"attn": "sdpa" if spec.attn == "auto" else spec.attn, "seed": spec.seed}
    settings |= cache_settings(model.config)
    folder = folder_of(spec, name, model.config, model_type)
    return Job(
        spec=spec,
        config=model.config,
        source=model.source,
        model_folder=model.folder,
        device=device,
        dtype=dtype,
        data=data,
        notes=tuple(filter(None, (note, benchmark_note))),
        folder=folder / "fidelity" if spec.fidelity else folder,
        settings=settings | _asked_for(spec, model.folder),
        info={
            "command": spec.command,
            "flags": spec.flags,
            "model": {"name": name, "path": model.source.path, "type": model_type},
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "processes": process.world,
            "versions": read(versions),
        },
        options=Options(
            max_length=max_length,
            model_name=name,
            chat=spec.chat,
            context=spec.compress == "context",
            batch_size=spec.batch_size,
            temperature=spec.temperature,
            top_p=spec.top_p,
            seed=spec.seed,
        ),
    )


def prepare_all(specs: Iterable[RunSpec | InputError]) -> list[Job | InputError]:
    """Prepare runs for this process alone; an error of one, now or before, stands in its job's place."""
    read = reader()

    def attempt(spec: RunSpec | InputError) -> Job | InputError:
        try:
            return spec if isinstance(spec, InputError) else prepare(spec, ALONE, read)
        except InputError as error:
            return error

    return [attempt(spec) for spec in specs]


def _asked_for(spec: RunSpec, model_folder: Path) -> dict[str, Any]:
    """Settings that change results and are named in a run's settings only where they are not the default."""
    settings: dict[str, Any] = (
        {"chat": True, "chat_template": sources.chat_identity(model_folder)} if spec.chat else {}
    )
    wishes = sources.greedy_wishes(model_folder)
    settings |= {"without_effect": wishes} if wishes else {}
    settings |= {"temperature": spec.temperature, "top_p": spec.top_p} if spec.temperature > 0 else {}
    settings |= {"compress": "context"} if spec.compress == "context" else {}
    return settings | ({"measure": "fidelity"} if spec.fidelity else {})
