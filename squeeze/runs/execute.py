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

    from squeeze.config import SqueezeConfig
    from squeeze.engine.squeezed_model import SqueezedModel

#: Sequences, of several runs, that go into one batch at most, by the kind of device.
TOGETHER = {"cpu": 8, "cuda": 64}


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
        together: of each job, how many went into one batch with it at the end, itself counted.
        attention: what the probe found out about the model; None where no job squeezes it.
    """

    batch_size: int
    together: Sequence[int]
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
                for job, together in zip(jobs, worked.together, strict=True):
                    facts: dict[str, Any] = {"batch_size": worked.batch_size, "together": together}
                    if job.job.config is not None:
                        facts["attention"] = worked.attention
                    if job in unfinished:
                        job.run.note(job.samples[index], **facts)
            for job in jobs:
                job.finish(index)
                yield job, index


@contextmanager
def local_worker(
    jobs: Sequence[OpenJob], process: Ranks, bar: tqdm | None = None, together: int | None = None
) -> Iterator[Worker]:
    """A worker in this process, with the model that the jobs share; prompts that several miss are prefilled once.

    Args:
        process: this one among those of the run.
        bar: to move on; None: one for each data set.
        together: see `batch_groups`.
    """
    with ExitStack() as stack:
        loaded = None
        if process.share(any(job.missing for job in jobs)):
            loaded = stack.enter_context(load([job.job for job in jobs]))

        def work(jobs: Sequence[OpenJob], index: int) -> Worked:
            assert loaded is not None, "nothing was missing when the folders were read"
            return work_on([(job.job, job.samples[index]) for job in jobs], index, loaded, process, bar, together)

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
        yield LoadedModel(model, tokenizer, run)


def work_on(
    jobs: Sequence[tuple[Job, Samples]],
    index: int,
    loaded: LoadedModel,
    process: Ranks,
    bar: tqdm | None = None,
    together: int | None = None,
) -> Worked:
    """Run what jobs miss of one data set.

    Args:
        jobs: each with its samples of that data set.
        index: the data set's number.
        process: the share of the batches that is run.
        bar: to move on; None: one of its own.
        together: see `batch_groups`.
    """
    from squeeze.runs.batching import Group, progress_bar, run_batches

    first = jobs[0][0]
    data, options = first.data[index], first.options
    total = max(samples.total for _, samples in jobs)
    prompts = first.benchmark.encode(loaded.tokenizer, data, total, options, process)
    workload = Workload(loaded.model, loaded.tokenizer, data, prompts, loaded.squeezed, options)
    measures: dict[bool, Measure[Any]] = {}  # comparisons share what they can
    groups = []
    members = batch_groups([job for job, _ in jobs], together)
    shared = sum(jobs[group[0]][0].config is not None for group in members) > 1
    for group in members:
        own = [jobs[number] for number in group]
        measure = measures.setdefault(own[0][0].spec.fidelity, measure_of(own[0][0]))
        run_batch = _run_batch([job.config for job, _ in own], measure, workload, shared)
        groups.append(Group([samples for _, samples in own], run_batch, measure.describe))
    runs = [samples for group in groups for samples in group.samples]
    with progress_bar(runs, prompts, options.batch_size, process) if bar is None else nullcontext(bar) as own_bar:
        batch_size = run_batches(groups, prompts, options.batch_size, process, own_bar)
    found = {}
    for numbers, done in zip(members, groups, strict=True):
        for place, number in enumerate(numbers):
            first_of_batch = place // done.together * done.together
            found[number] = min(done.together, len(numbers) - first_of_batch)
    attention = None if loaded.squeezed is None else loaded.squeezed.findings.described()
    return Worked(batch_size, [found[number] for number in range(len(jobs))], attention)


def batch_groups(jobs: Sequence[Job], together: int | None) -> list[list[int]]:
    """Numbers of jobs, those that go into one batch together; jobs that prefill alike follow one another, since only
    one prefill is kept: those first whose allocation looks at attention, which the others need not.

    Which go together follows from all jobs, and not from what they miss or who works on them: a run that goes on gives
    what it would have given.

    Args:
        together: jobs that go into one batch at most; None: as many as make `TOGETHER` sequences.
    """
    most = together or max(TOGETHER[jobs[0].device.type] // jobs[0].options.batch_size, 1)
    order = sorted(range(len(jobs)), key=lambda number: _prefills_alike(jobs[number]))
    alike: list[list[int]] = []
    for number in order:
        job = jobs[number]
        same = next((group for group in alike if _batches_with(jobs[group[0]], job) and len(group) < most), None)
        if same is None:
            alike.append([number])
        else:
            same.append(number)
    return alike


def _batches_with(job: Job, other: Job) -> bool:
    """Whether two jobs' configurations can be sequences of one batch.

    Compiled steps cannot: every prompt would have groups of rows, and so graphs, of its own.
    """
    one, two = job.config, other.config
    if one is None or two is None or job.spec.fidelity != other.spec.fidelity:
        return False
    if any(
        each.compile or each.prefill_chunk is not None or each.allocator.needs == "loss_curves" for each in (one, two)
    ):
        return False
    given = [(each.evictor, each.per, each.attn) for each in (one, two)]
    looking = {one.allocator.observed, two.allocator.observed} - {0}
    return given[0] == given[1] and len(looking) < 2


def _prefills_alike(job: Job) -> tuple[str, int]:
    """A key by which jobs that prefill alike stand one after the other."""
    if job.config is None:
        return "", 0
    return str(job.config.evictor.observed), -job.config.allocator.observed


def _run_batch(
    configs: Sequence[SqueezeConfig | None], measure: Measure[Any], workload: Workload, shared: bool
) -> Callable[[list[int], slice], list[list[dict[str, Any]]]]:
    """Jobs' part of the work, with the squeezed model in their configurations while a batch is run.

    Args:
        shared: whether the prefill is kept for others.
    """

    def run_batch(batch: list[int], runs: slice) -> list[list[dict[str, Any]]]:
        own, squeezed = [config for config in configs[runs] if config is not None], workload.squeezed
        if squeezed is not None:
            squeezed.share_prefills = shared or len(own) < len(configs)
            squeezed.use(*own) if own else squeezed.forget_prefill()
        samples = measure.run_batch(workload if own else replace(workload, squeezed=None), batch * max(len(own), 1))
        return [samples[start : start + len(batch)] for start in range(0, len(samples), len(batch))]

    return run_batch
