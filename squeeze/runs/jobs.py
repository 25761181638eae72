"""Runs of `pred.py`: what its flags ask for, checked, before any model is loaded."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from squeeze.allocations import calibration
from squeeze.benchmarks.base import Benchmark, DataSet, Options
from squeeze.benchmarks.registry import BENCHMARKS
from squeeze.config import SqueezeConfig
from squeeze.errors import InputError
from squeeze.models import sources
from squeeze.ranks import ALONE, Ranks
from squeeze.runs.flags import check_flags, check_task_flags, config_from_flags, for_model, pred_parser
from squeeze.runs.folder import cache_settings, run_folder, versions

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Job:
    """One run of `pred.py`, checked, before its model is loaded.

    Args:
        argv, args: the flags.
        config: of the cache; None for the full one.
        source, model: the model's name, and its folder.
        notes: sentences for the user.
        place: the run's folder.
        settings, info: for `squeeze.runs.folder.Run`.
        options: what prompts are made and run with.
    """

    argv: Sequence[str]
    args: argparse.Namespace
    config: SqueezeConfig | None
    source: sources.ModelSource
    model: Path
    device: torch.device
    dtype: torch.dtype
    data: Sequence[DataSet]
    notes: tuple[str, ...]
    place: Path
    settings: dict[str, Any]
    info: dict[str, Any]
    options: Options

    @property
    def benchmark(self) -> Benchmark:
        """The benchmark of the data."""
        return BENCHMARKS[self.args.pred]

    @property
    def loads(self) -> tuple[Any, ...]:
        """What jobs must have in common to share a loaded model."""
        args = self.args
        return self.model, self.device, self.dtype, args.attn, args.allow_pickle, args.device_map, args.chat

    def settings_of(self, data: DataSet) -> dict[str, Any]:
        """What changes the results of one data set, for `Run.open`."""
        return self.benchmark.settings(data, self.options)

    def facts_of(self, data: DataSet) -> dict[str, Any]:
        """What `run.json` says about one data set beside that."""
        return self.benchmark.facts(data, self.options)

    def count(self, data: DataSet) -> int:
        """Samples of one data set."""
        return self.benchmark.count(data, self.args.sample_num)


@dataclass
class Inputs:
    """Models and data, read once however many jobs want them."""

    known: dict[Any, Any] = field(default_factory=dict)

    def once(self, read: Callable[..., Any], *what: Any) -> Any:
        """`read(*what)`, or what it gave before."""
        key = (read, *what)
        if key not in self.known:
            self.known[key] = read(*what)
        return self.known[key]


def prepare(argv: Sequence[str], process: Ranks, inputs: Inputs | None = None) -> Job:
    """Read and check a command line of `pred.py`.

    Args:
        argv: the flags.
        process: this one among those of the run.
        inputs: shared with other jobs.
    Raises:
        InputError: something in it is wrong, or the model or the data are not there.
    """
    inputs = inputs or Inputs()
    args = pred_parser().parse_args(argv)
    check_flags(args)
    check_task_flags(args)
    if args.model is None:
        raise InputError("--model is missing: a name in config/model2path.json, a local folder or a Hub name")
    config = config_from_flags(args)
    benchmark = BENCHMARKS[args.pred]
    datasets = benchmark.datasets(args.datasets)
    source = inputs.once(sources.resolve, args.model, args.model_path)

    # torch and transformers take seconds to import: --help and what is wrong with the flags should not wait for them.
    import torch

    from squeeze import devices

    device = devices.pick_device(args.device, process.local)
    dtype = devices.pick_dtype(args.dtype, device)
    location = getattr(args, benchmark.location)
    data: list[DataSet] = [inputs.once(benchmark.read, dataset, location) for dataset in datasets]
    folder = inputs.once(sources.fetch, source, args.allow_pickle)
    model_config = inputs.once(sources.read_config, folder)
    model_type = model_config.model_type
    sources.check_arch(args.model_arch, model_type)
    identity = inputs.once(sources.identity, source, folder, args.allow_pickle)
    config = with_curves(for_model(config, model_type), source.name, identity)
    max_length, note = benchmark.prompt_limit(source, model_config.max_position_embeddings)
    said = benchmark.note(datasets, source.name, folder, args.chat)
    settings = {"model": identity, "max_length": max_length, "dtype": str(dtype).removeprefix("torch.")}
    settings |= {"attn": "sdpa" if args.attn == "auto" else args.attn, "seed": args.seed, **cache_settings(config)}
    place = run_folder(args.pred, source.name, config, model_type, args.seed)
    return Job(
        argv=argv,
        args=args,
        config=config,
        source=source,
        model=folder,
        device=device,
        dtype=dtype,
        data=data,
        notes=tuple(filter(None, (note, said))),
        place=place / "fidelity" if args.fidelity else place,
        settings=settings | _asked_for(args, folder),
        info={
            "command": shlex.join(["python", "pred.py", *argv]),
            "flags": vars(args),
            "model": {"name": source.name, "path": source.path, "type": model_type},
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "processes": process.world,
            "versions": inputs.once(versions),
        },
        options=Options(
            max_length=max_length,
            model_name=source.name,
            chat=args.chat,
            batch_size=args.batch_size,
            temperature=args.temperature,
            top_p=args.top_p,
            seed=args.seed,
        ),
    )


def with_curves(config: SqueezeConfig | None, name: str, model: dict[str, Any]) -> SqueezeConfig | None:
    """`config` with the loss curves of the model called `name`, where it needs them.

    Args:
        model: what tells it from another, see `squeeze.models.sources.identity`.
    Raises:
        InputError: there are none, or they are another model's.
    """
    if config is None or config.allocation != "calibrated":
        return config
    assert config.algorithm is not None
    path = calibration.place(name, config.algorithm)
    if not path.exists():
        raise InputError(
            f"{path} is not there, from which the allocation calibrated makes budgets: "
            f"python -m squeeze.calibrate --model {name} --algorithm {config.algorithm}"
        )
    found = calibration.read_calibration(path)
    found.check(config.algorithm, config.start_size, found.losses.shape[2], model)
    return dataclasses.replace(config, calibration=found)


def prepare_all(commands: Iterable[Sequence[str]]) -> list[Job | InputError]:
    """Read and check command lines of `pred.py` for this process alone; what is wrong stands in a job's place."""
    inputs = Inputs()

    def attempt(argv: Sequence[str]) -> Job | InputError:
        try:
            return prepare(argv, ALONE, inputs)
        except InputError as error:
            return error

    return [attempt(argv) for argv in commands]


def _asked_for(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Settings that change results and are named in a run's settings only where they are not the default."""
    found: dict[str, Any] = {"chat": True, "chat_template": sources.chat_identity(folder)} if args.chat else {}
    wishes = sources.greedy_wishes(folder)
    found |= {"without_effect": wishes} if wishes else {}
    found |= {"temperature": args.temperature, "top_p": args.top_p} if args.temperature > 0 else {}
    return found | ({"measure": "fidelity"} if args.fidelity else {})
