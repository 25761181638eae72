"""Runs of `pred.py`: what its flags ask for, checked, and then done: one run, or several that share a model."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from squeeze import models, request_files
from squeeze.calibration import with_curves
from squeeze.config import InputError, SqueezeConfig
from squeeze.distributed import ALONE, Ranks
from squeeze.flags import check_flags, check_task_flags, config_from_flags, for_model, pred_parser
from squeeze.longbench import Data, dataset_names, load_data
from squeeze.request_files import HELM_TASKS, Requests, read_requests
from squeeze.runs import Run, cache_settings, run_folder, versions
from squeeze.samples import PUBLISHED, Samples

if TYPE_CHECKING:
    import torch
    from tqdm import tqdm

    from squeeze.batching import Work
    from squeeze.predict import Options, Prompt
    from squeeze.squeezed_model import SqueezedModel


@dataclass(frozen=True)
class Job:
    """One run of `pred.py`, checked, before its model is loaded.

    Args:
        argv, args: the flags.
        config: of the cache; None for the full one.
        source, model: the model's name, and its folder.
        note: a sentence for the user, or None.
        place: the run's folder.
        settings, info: for `squeeze.runs.Run`.
        how: prompts are made and run.
    """

    argv: Sequence[str]
    args: argparse.Namespace
    config: SqueezeConfig | None
    source: models.ModelSource
    model: Path
    device: torch.device
    dtype: torch.dtype
    data: Sequence[Data | Requests]
    note: str | None
    place: Path
    settings: dict[str, Any]
    info: dict[str, Any]
    how: Options

    @property
    def loads(self) -> tuple[Any, ...]:
        """What jobs must have in common to share a loaded model."""
        args = self.args
        return self.model, self.device, self.dtype, args.attn, args.allow_pickle, args.device_map, args.chat


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
    helm = args.pred in HELM_TASKS
    datasets = [] if helm else dataset_names("samsum" if args.datasets is None else args.datasets, args.pred)
    source = models.resolve(args.model, args.model_path)

    # torch and transformers take seconds to import: --help and what is wrong with the flags should not wait for them.
    import torch

    from squeeze import loading, predict

    device = loading.pick_device(args.device, process.local)
    dtype = loading.pick_dtype(args.dtype, device)
    data: list[Data | Requests] = [inputs.once(load_data, one, args.data_dir, args.pred) for one in datasets]
    if helm:
        data = [inputs.once(read_requests, args.pred, args.requests)]
    folder = inputs.once(models.fetch, source, args.allow_pickle)
    model_config = models.read_config(folder)
    model_type = model_config["model_type"]
    models.check_arch(args.model_arch, model_type)
    identity = inputs.once(models.identity, source, folder, args.allow_pickle)
    config = with_curves(for_model(config, model_type), source.name, identity)
    max_length, note = models.positions(model_config), None
    if not helm:
        max_length, note = models.prompt_limit(source, model_config)
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
        note=note,
        place=place / "fidelity" if args.fidelity else place,
        settings=settings | _asked_for(args),
        info={
            "command": shlex.join(["python", "pred.py", *argv]),
            "flags": vars(args),
            "model": {"name": source.name, "path": source.path, "type": model_type},
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "processes": process.world,
            "versions": inputs.once(versions),
        },
        how=predict.Options(
            max_length=max_length,
            model_name=source.name,
            chat=args.chat,
            batch_size=args.batch_size,
            temperature=args.temperature,
            top_p=args.top_p,
            seed=args.seed,
            ranks=process,
        ),
    )


def prepare_all(commands: Sequence[Sequence[str]]) -> list[Job | InputError]:
    """Read and check command lines of `pred.py` for this process alone; what is wrong stands in a job's place."""
    inputs = Inputs()

    def attempt(argv: Sequence[str]) -> Job | InputError:
        try:
            return prepare(argv, ALONE, inputs)
        except InputError as error:
            return error

    return [attempt(argv) for argv in commands]


def _asked_for(args: argparse.Namespace) -> dict[str, Any]:
    """Settings that change results and are named in a run's settings only where they are not the default."""
    found: dict[str, Any] = {"chat": True} if args.chat else {}
    found |= {"temperature": args.temperature, "top_p": args.top_p} if args.temperature > 0 else {}
    return found | ({"measure": "fidelity"} if args.fidelity else {})


@dataclass(frozen=True)
class Kind:
    """What is done with a prompt.

    Args:
        published: the fields of a line of the published file.
        work: makes the work on a run's batches.
        summarize, describe: what was measured, for `run.json` and in a few words.
    """

    published: Sequence[str]
    work: Callable[..., Work]
    summarize: Callable[[Sequence[dict[str, Any]]], dict[str, Any]]
    describe: Callable[[Sequence[dict[str, Any]]], str]


def kind_of(args: argparse.Namespace) -> Kind:
    """What a job's flags want to be done."""
    from squeeze import completions, fidelity, predict, stats

    if args.fidelity:
        return Kind(fidelity.PUBLISHED, fidelity.Comparison().measure, fidelity.summarize, fidelity.describe)
    if args.pred in HELM_TASKS:
        return Kind(request_files.PUBLISHED, completions.answer, stats.summarize, stats.progress)
    return Kind(PUBLISHED, predict.predict, stats.summarize, stats.progress)


class OpenJob:
    """A job whose folder was looked into: what is there of each data set. Nothing is written yet.

    Raises:
        InputError: the folder holds a run with other settings.
    """

    def __init__(self, job: Job, process: Ranks) -> None:
        self.job = job
        self.kind = kind_of(job.args)
        self.run = Run(job.place, job.settings, job.info, job.args.overwrite, self.kind.published, process)
        self.samples: list[Samples] = [
            self.run.open(one.dataset, one.settings, one.count(job.args.sample_num)) for one in job.data
        ]

    @property
    def missing(self) -> int:
        """Samples that are still to be run."""
        return sum(len(one.missing) for one in self.samples)

    def finish(self, index: int) -> None:
        """Publish a data set whose samples are all there."""
        self.run.finish(self.samples[index], self.kind.summarize, data=self.job.data[index].origin)

    def report(self, index: int) -> str:
        """What a data set has come to, in a line or two."""
        samples = self.samples[index]
        found = [record["stats"] for record in samples.records]
        text = f"{samples.published}: {len(found)} samples, {self.kind.describe(found)}"
        summary = self.run.manifest["datasets"][samples.dataset]
        if "layers_per_class" in summary:
            text += "\n  layers in class 1, 2, 3: " + ", ".join(f"{n:g}" for n in summary["layers_per_class"])
        return text


@dataclass(frozen=True)
class Engine:
    """A loaded model; `squeezed` is what all squeezed jobs run on, one configuration after the other."""

    model: Any
    tokenizer: Any
    squeezed: SqueezedModel | None


#: Does what is missing of one data set, given by its number; the batch size at the end.
Worker = Callable[[Sequence[OpenJob], int], int]


def do(jobs: Sequence[OpenJob], worker: Worker) -> Iterator[tuple[OpenJob, int]]:
    """Do what jobs on one model and the same data miss.

    Yields:
        Each job with the number of the data set that it has just finished.
    Raises:
        InputError: a folder cannot be written, or a prompt does not fit into memory.
    """
    with ExitStack() as stack:
        for one in jobs:
            stack.enter_context(one.run)
        for index in range(len(jobs[0].job.data)):
            for one in jobs:
                one.run.start(one.samples[index])
            todo = [one for one in jobs if one.samples[index].missing]
            if todo:
                batch_size = worker(todo, index)
                for one in todo:
                    one.run.note(one.samples[index], batch_size=batch_size)
            for one in jobs:
                one.finish(index)
                yield one, index


@contextmanager
def here(jobs: Sequence[OpenJob], process: Ranks, bar: tqdm | None = None) -> Iterator[Worker]:
    """A worker in this process, with the model that the jobs share; prompts that several miss are prefilled once.

    Args:
        process: this one among those of the run.
        bar: to move on; None: one for each data set.
    """
    with ExitStack() as stack:
        engine = None
        if process.share(any(one.missing for one in jobs)):
            engine = stack.enter_context(load([one.job for one in jobs]))

        def work(todo: Sequence[OpenJob], index: int) -> int:
            assert engine is not None, "nothing was missing when the folders were read"
            return work_on([(one.job, one.samples[index]) for one in todo], index, engine, process, bar)

        yield work


@contextmanager
def load(jobs: Sequence[Job]) -> Iterator[Engine]:
    """Load the model of some jobs, squeezed where one of them wants it; afterwards it is let go."""
    import torch

    from squeeze import loading, prompting, squeezed

    job, args = jobs[0], jobs[0].args
    torch.manual_seed(args.seed)
    model, tokenizer = loading.load(job.model, job.device, job.dtype, args.attn, args.allow_pickle, args.device_map)
    if args.chat:
        prompting.check_chat_template(tokenizer, job.source.name)
    configs = [one.config for one in jobs if one.config is not None]
    with squeezed(model, configs[0]) if configs else nullcontext() as run:
        if run is not None:
            run.share_prefills = len(configs) > 1
        yield Engine(model, tokenizer, run)


def work_on(
    jobs: Sequence[tuple[Job, Samples]], index: int, engine: Engine, process: Ranks, bar: tqdm | None = None
) -> int:
    """Run what jobs miss of one data set.

    Args:
        jobs: each with its samples of that data set.
        index: the data set's number.
        process: which share of the batches is run here.
        bar: to move on; None: one of its own.
    Returns:
        The batch size at the end.
    """
    from squeeze import predict
    from squeeze.batching import Point, progress_bar, run_batches

    # Those that prefill in the same way one after the other: only one prefill is kept.
    jobs = sorted(jobs, key=lambda one: one[0].config is not None and one[0].config.algorithm == "h2o")
    how, data = jobs[0][0].how, jobs[0][0].data[index]
    prompts = predict.encode(engine.tokenizer, data, max(samples.total for _, samples in jobs), how)
    points: list[Point] = []
    kinds: dict[bool, Kind] = {}
    for job, samples in jobs:
        kind = kinds.setdefault(job.args.fidelity, kind_of(job.args))  # one, since comparisons share what they can
        points.append(Point(samples, _work(job, kind, data, prompts, engine), kind.describe))
    if bar is not None:
        return run_batches(points, prompts, how.batch_size, process, bar)
    with progress_bar(points, prompts, how.batch_size, process) as own:
        return run_batches(points, prompts, how.batch_size, process, own)


def _work(job: Job, kind: Kind, data: Data | Requests, prompts: Sequence[Prompt], engine: Engine) -> Work:
    """A job's work on its batches, with the squeezed model in the job's configuration while it is done."""
    config, run = job.config, engine.squeezed if job.config is not None else None
    work = kind.work(engine.model, engine.tokenizer, data, prompts, run, job.how)

    def configured(batch: list[int]) -> list[dict[str, Any]]:
        if engine.squeezed is not None:
            engine.squeezed.use(config) if config is not None else engine.squeezed.forget_prefill()
        return work(batch)

    return configured
