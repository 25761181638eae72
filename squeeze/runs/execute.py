"""Execute prepared runs: one, or several that share a loaded model and prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from squeeze.benchmarks.base import Measure, Workload
from squeeze.ranks import Ranks
from squeeze.runs.folder import Run
from squeeze.runs.jobs import Job
from squeeze.runs.samples import Samples
from squeeze.text import printable

if TYPE_CHECKING:
    from tqdm import tqdm

    from squeeze.engine.squeezed_model import SqueezedModel
    from squeeze.runs.batching import Point


def measure_of(job: Job) -> Measure[Any]:
    """A job's work on its prompts: the benchmark's answers, or their distance from the full cache."""
    if not job.spec.fidelity:
        return job.benchmark
    from squeeze.benchmarks.fidelity import Fidelity

    return Fidelity()


class OpenJob:
    """A job whose folder was looked into: what is there of each data set. Nothing is written yet.

    Raises:
        InputError: the folder holds a run with other settings.
    """

    def __init__(self, job: Job, process: Ranks) -> None:
        self.job = job
        self.measure = measure_of(job)
        self.run = Run(job.folder, job.settings, job.info, job.spec.overwrite, self.measure.sample, process)
        self.samples: list[Samples] = [
            self.run.open(data.dataset, job.settings_of(data), job.count(data)) for data in job.data
        ]

    @property
    def missing(self) -> int:
        """Samples that are still to be run."""
        return sum(len(samples.missing) for samples in self.samples)

    def finish(self, index: int) -> None:
        """Publish a data set whose samples are all there."""
        facts = self.job.benchmark.facts(self.job.data[index], self.job.options)
        self.run.finish(self.samples[index], self.measure.summarize, **facts)

    def report(self, index: int) -> str:
        """A line or two on what a data set has come to."""
        samples = self.samples[index]
        stats = [record["stats"] for record in samples.records]
        text = f"{printable(samples.published)}: {len(stats)} samples, {self.measure.describe(stats)}"
        summary = self.run.manifest["datasets"][samples.dataset]
        if "layers_per_class" in summary:
            text += "\n  layers in class 1, 2, 3: " + ", ".join(f"{n:g}" for n in summary["layers_per_class"])
        return text


@dataclass(frozen=True)
class LoadedModel:
    """A loaded model; `squeezed` is what all squeezed jobs run on, one configuration after the other."""

    model: Any
    tokenizer: Any
    squeezed: SqueezedModel | None


class Worked(NamedTuple):
    """What is known when jobs have all of a data set.

    Args:
        batch_size: at the end.
        attention: what the probe found out about the model; None where no job squeezes it.
    """

    batch_size: int
    attention: dict[str, Any] | None


#: Runs what jobs miss of one data set, given by its number.
Worker = Callable[[Sequence[OpenJob], int], Worked]


def execute(jobs: Sequence[OpenJob], worker: Worker) -> Iterator[tuple[OpenJob, int]]:
    """Run what is missing of jobs on one model and the same data.

    Yields:
        Each job with the number of the data set that it has just finished.
    Raises:
        InputError: a folder cannot be written, or a prompt does not fit into memory.
    """
    with ExitStack() as stack:
        for job in jobs:
            stack.enter_context(job.run)
        for index in range(len(jobs[0].job.data)):
            for job in jobs:
                job.run.start(job.samples[index])
            unfinished = [job for job in jobs if job.samples[index].missing]
            if unfinished:
                worked = worker(jobs, index)  # all of them: what is compared together stays together
                for job in unfinished:
                    facts: dict[str, Any] = {"batch_size": worked.batch_size}
                    if job.job.config is not None:
                        facts["attention"] = worked.attention
                    job.run.note(job.samples[index], **facts)
            for job in jobs:
                job.finish(index)
                yield job, index


@contextmanager
def local_worker(jobs: Sequence[OpenJob], process: Ranks, bar: tqdm | None = None) -> Iterator[Worker]:
    """A worker in this process, with the model that the jobs share; prompts that several miss are prefilled once.

    Args:
        process: this one among those of the run.
        bar: to move on; None: one for each data set.
    """
    with ExitStack() as stack:
        loaded = None
        if process.share(any(job.missing for job in jobs)):
            loaded = stack.enter_context(load([job.job for job in jobs]))

        def work(jobs: Sequence[OpenJob], index: int) -> Worked:
            assert loaded is not None, "nothing was missing when the folders were read"
            return work_on([(job.job, job.samples[index]) for job in jobs], index, loaded, process, bar)

        yield work


@contextmanager
def load(jobs: Sequence[Job]) -> Iterator[LoadedModel]:
    """Load the model of some jobs, squeezed where one of them wants it; afterwards it is let go."""
    import torch

    from squeeze import squeezed
    from squeeze.models import loading

    job, spec = jobs[0], jobs[0].spec
    torch.manual_seed(spec.seed)
    model, tokenizer = loading.load(
        job.model_folder, job.device, job.dtype, spec.attn, spec.allow_pickle, spec.device_map
    )
    job.benchmark.check_tokenizer(tokenizer, job.options)
    configs = [job.config for job in jobs if job.config is not None]
    with squeezed(model, configs[0]) if configs else nullcontext() as run:
        if run is not None:
            run.share_prefills = len(configs) > 1
        yield LoadedModel(model, tokenizer, run)


def work_on(
    jobs: Sequence[tuple[Job, Samples]], index: int, loaded: LoadedModel, process: Ranks, bar: tqdm | None = None
) -> Worked:
    """Run what jobs miss of one data set.

    Args:
        jobs: each with its samples of that data set.
        index: the data set's number.
        process: the share of the batches that is run.
        bar: to move on; None: one of its own.
    """
    from squeeze.runs.batching import progress_bar, run_batches

    jobs = sorted(jobs, key=lambda pair: _prefills_alike(pair[0]))
    first = jobs[0][0]
    data, options = first.data[index], first.options
    total = max(samples.total for _, samples in jobs)
    prompts = first.benchmark.encode(loaded.tokenizer, data, total, options, process)
    workload = Workload(loaded.model, loaded.tokenizer, data, prompts, loaded.squeezed, options)
    measures: dict[bool, Measure[Any]] = {}  # comparisons share what they can
    points = [
        _point(job, samples, measures.setdefault(job.spec.fidelity, measure_of(job)), workload)
        for job, samples in jobs
    ]
    with progress_bar(points, prompts, options.batch_size, process) if bar is None else nullcontext(bar) as own:
        batch_size = run_batches(points, prompts, options.batch_size, process, own)
    return Worked(batch_size, None if loaded.squeezed is None else loaded.squeezed.findings.described())


def _prefills_alike(job: Job) -> tuple[str, int]:
    """A key by which jobs that prefill alike stand one after the other, since only one prefill is kept: those first
    whose allocation looks at attention, which the others need not."""
    if job.config is None:
        return "", 0
    return str(job.config.evictor.observed), -job.config.allocator.observed


def _point(job: Job, samples: Samples, measure: Measure[Any], workload: Workload) -> Point:
    """A job's part of the work, with the squeezed model in the job's configuration while a batch is run."""
    from squeeze.runs.batching import Point

    config, squeezed = job.config, workload.squeezed
    own = workload if config is not None else replace(workload, squeezed=None)

    def configure() -> None:
        if squeezed is not None:
            squeezed.use(config) if config is not None else squeezed.forget_prefill()

    configure()
    work = measure.work(own)

    def run_batch(batch: list[int]) -> list[dict[str, Any]]:
        configure()
        return work(batch)

    return Point(samples, run_batch, measure.describe)
