"""Runs of `pred.py`, done: one, or several that share a model and prompts."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from squeeze.benchmarks import records
from squeeze.benchmarks.longbench.data import Data
from squeeze.benchmarks.requests import HELM_TASKS, Requests
from squeeze.ranks import Ranks
from squeeze.runs.folder import Run
from squeeze.runs.jobs import Job
from squeeze.runs.samples import Samples
from squeeze.text import printable

if TYPE_CHECKING:
    from tqdm import tqdm

    from squeeze.benchmarks.predict import Work
    from squeeze.engine.squeezed_model import SqueezedModel
    from squeeze.generation.generate import Prompt


@dataclass(frozen=True)
class Kind:
    """What is done with a prompt.

    Args:
        sample: the kind of what is there of a sample when it is done, see `squeeze.benchmarks.records`.
        work: makes the work on a run's batches.
        summarize, describe: what was measured, for `run.json` and in a few words.
    """

    sample: type[Any]
    work: Callable[..., Work]
    summarize: Callable[[Sequence[dict[str, Any]]], dict[str, Any]]
    describe: Callable[[Sequence[dict[str, Any]]], str]


def kind_of(args: argparse.Namespace) -> Kind:
    """What a job's flags want to be done."""
    from squeeze.benchmarks import completions, fidelity, predict
    from squeeze.runs import stats

    if args.fidelity:
        return Kind(records.ComparedSample, fidelity.Comparison().measure, fidelity.summarize, fidelity.describe)
    if args.pred in HELM_TASKS:
        return Kind(records.AnsweredSample, completions.answer, stats.summarize, stats.progress)
    return Kind(records.PredictedSample, predict.predict, stats.summarize, stats.progress)


class OpenJob:
    """A job whose folder was looked into: what is there of each data set. Nothing is written yet.

    Raises:
        InputError: the folder holds a run with other settings.
    """

    def __init__(self, job: Job, process: Ranks) -> None:
        self.job = job
        self.kind = kind_of(job.args)
        self.run = Run(job.place, job.settings, job.info, job.args.overwrite, self.kind.sample, process)
        self.samples: list[Samples] = [
            self.run.open(one.dataset, job.settings_of(one), one.count(job.args.sample_num)) for one in job.data
        ]

    @property
    def missing(self) -> int:
        """Samples that are still to be run."""
        return sum(len(one.missing) for one in self.samples)

    def finish(self, index: int) -> None:
        """Publish a data set whose samples are all there."""
        data = self.job.data[index]
        self.run.finish(self.samples[index], self.kind.summarize, **self.job.facts_of(data))

    def report(self, index: int) -> str:
        """What a data set has come to, in a line or two."""
        samples = self.samples[index]
        found = [record["stats"] for record in samples.records]
        text = f"{printable(samples.published)}: {len(found)} samples, {self.kind.describe(found)}"
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


#: Does what jobs miss of one data set, given by its number; the batch size at the end.
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
                batch_size = worker(jobs, index)  # all of them: what is compared together stays together
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

        def work(jobs: Sequence[OpenJob], index: int) -> int:
            assert engine is not None, "nothing was missing when the folders were read"
            return work_on([(one.job, one.samples[index]) for one in jobs], index, engine, process, bar)

        yield work


@contextmanager
def load(jobs: Sequence[Job]) -> Iterator[Engine]:
    """Load the model of some jobs, squeezed where one of them wants it; afterwards it is let go."""
    import torch

    from squeeze import squeezed
    from squeeze.benchmarks.longbench import prompts
    from squeeze.models import loading

    job, args = jobs[0], jobs[0].args
    torch.manual_seed(args.seed)
    model, tokenizer = loading.load(job.model, job.device, job.dtype, args.attn, args.allow_pickle, args.device_map)
    if args.chat:
        prompts.check_chat_template(tokenizer, job.source.name)
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
    from squeeze.benchmarks import predict
    from squeeze.runs.batching import Point, progress_bar, run_batches

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
    """A job's work on its batches; it is made and done with the squeezed model in the job's configuration."""
    config, run = job.config, engine.squeezed if job.config is not None else None
    if config is not None and run is not None:
        run.use(config)
    work = kind.work(engine.model, engine.tokenizer, data, prompts, run, job.how)

    def configured(batch: list[int]) -> list[dict[str, Any]]:
        if engine.squeezed is not None:
            engine.squeezed.use(config) if config is not None else engine.squeezed.forget_prefill()
        return work(batch)

    return configured
