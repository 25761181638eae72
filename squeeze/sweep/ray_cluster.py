"""Runs of a sweep as tasks of a Ray cluster whose machines share the working directory.

This process holds the folders' locks, writes `run.json` and publishes. A task does a share of the batches of runs on
one model and one data set, and appends to partial files of its own. Where a worker dies, Ray starts its task again,
which goes on from what all partial files hold.
"""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

from tqdm import tqdm

from squeeze import threads
from squeeze.compatibility import install
from squeeze.errors import InputError
from squeeze.ranks import Ranks
from squeeze.runs.execute import OpenJob, Worked, Worker, batch_groups, load, measure_of, work_on
from squeeze.runs.jobs import Job, prepare_all
from squeeze.runs.samples import Samples
from squeeze.runs.spec import RunSpec
from squeeze.storage.paths import ROOT

#: Ray's own take ten minutes to find that an address does not answer. They are read when it is imported.
PATIENCE = {"RAY_NUM_REDIS_GET_RETRIES": "1", "RAY_py_gcs_connect_timeout_s": "10"}

#: Seconds between looks at the tasks' files.
POLL_SECONDS = 0.5


class Cluster:
    """A Ray cluster.

    Args:
        address: `host:port`, `auto`, or None: one on this machine, started if there is none.
        num_cpus, num_gpus: of a task; None: a GPU if the cluster has any.
        max_retries: of a task whose worker dies.
        together: runs that go into one batch at most, see `squeeze.runs.execute.batch_groups`.
    Raises:
        InputError: Ray is not installed, the address does not answer, or a task would never get what it asks for.
    """

    def __init__(
        self,
        address: str | None,
        num_cpus: float,
        num_gpus: float | None,
        max_retries: int,
        together: int | None = None,
    ) -> None:
        self.together = together
        os.environ |= {name: value for name, value in PATIENCE.items() if name not in os.environ}
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError:
            raise InputError(f"Ray is not installed here: {install('ray', 'requirements-ray.txt')}") from None
        if not ray.is_initialized():
            try:
                ray.init(address=address, logging_level=logging.WARNING)
            except (ConnectionError, RuntimeError, TimeoutError, ValueError) as error:
                where, reason = address or "this machine", " ".join(str(error).split())
                raise InputError(
                    f"the Ray cluster at {where} does not answer ({reason}): start it with ray start --head, "
                    "or leave --address out for one on this machine alone"
                ) from None
        self.ray = ray
        resources = ray.cluster_resources()
        gpus = (1.0 if resources.get("GPU") else 0.0) if num_gpus is None else num_gpus
        self.workers = 1 << 30
        for name, wanted in (("CPU", num_cpus), ("GPU", gpus)):
            if wanted > resources.get(name, 0):
                raise InputError(f"a task wants {wanted:g} {name}s and the Ray cluster has {resources.get(name, 0):g}")
            if wanted:
                self.workers = min(self.workers, int(resources[name] // wanted))
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        self.options: dict[str, Any] = {
            "num_cpus": num_cpus,
            "num_gpus": gpus,
            "max_retries": max_retries,
            "runtime_env": {"env_vars": {"PYTHONPATH": path, **threads.settings(int(num_cpus))}},
        }

    def prepare(self, runs: Sequence[RunSpec | InputError]) -> list[Job | InputError]:
        """Check runs and find their models and data on a machine like those that will run them."""
        [jobs] = self._results([self._submit(prepare_in, os.getcwd(), runs)])
        return jobs

    @contextmanager
    def worker(self, group: Sequence[OpenJob], bar: tqdm) -> Iterator[Worker]:
        """Does runs on one model and the same data in as many tasks as fit on the cluster at once."""

        def work(jobs: Sequence[OpenJob], index: int) -> Worked:
            for open_job in jobs:  # before others write
                if open_job.samples[index].missing:
                    open_job.run.begin(open_job.samples[index])
            most = max(open_job.samples[index].total for open_job in jobs)
            shards = min(self.workers, -(-most // jobs[0].job.options.batch_size))
            # Where there are fewer batches than workers, the runs are divided as well, but not those of one batch.
            groups = batch_groups([open_job.job for open_job in jobs], self.together)
            wanted = min(len(groups), max(1, self.workers // shards))
            parts = [list(chain(*groups[part::wanted])) for part in range(wanted)]
            tasks = [
                self._submit(
                    run_share,
                    os.getcwd(),
                    [(jobs[number].job.spec, jobs[number].job.settings) for number in part],
                    index,
                    Ranks(shard, shards),
                    self.together,
                )
                for part in parts
                for shard in range(shards)
            ]
            results = self._results(tasks, [open_job.samples[index] for open_job in jobs], bar)
            attention = next((worked.attention for worked in results if worked.attention is not None), None)
            counts = [0] * len(jobs)
            for first, part in zip(range(0, len(results), shards), parts, strict=True):
                of_shards = [worked.together for worked in results[first : first + shards]]
                for number, *found in zip(part, *of_shards, strict=True):
                    counts[number] = min(found)
            return Worked(min(worked.batch_size for worked in results), counts, attention)

        yield work

    def _submit(self, function: Any, *given: Any) -> Any:
        return self.ray.remote(**self.options)(function).remote(*given)

    def _results(self, tasks: list[Any], watched: Sequence[Samples] = (), bar: tqdm | None = None) -> list[Any]:
        """Wait for tasks, and move the bar on with what they write; all are cancelled where one cannot go on."""
        pending, seen = tasks, _lines(watched)
        try:
            while pending:
                done, pending = self.ray.wait(pending, timeout=POLL_SECONDS)
                self.ray.get(done)
                now = _lines(watched)
                if bar is not None:
                    bar.update(now - seen)
                seen = now
            return self.ray.get(tasks)
        except self.ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, InputError):
                raise InputError(str(error.cause)) from None
            raise
        except self.ray.exceptions.RayError as error:
            reason = " ".join(str(error).split())
            raise InputError(f"a Ray task was given up, and no sample is lost ({reason})") from None
        finally:
            for task in pending:
                self.ray.cancel(task, force=True)


def prepare_in(folder: str, runs: Sequence[RunSpec | InputError]) -> list[Job | InputError]:
    """`prepare_all` in a task, in a working directory."""
    os.chdir(folder)
    return prepare_all(runs)


def run_share(
    folder: str, runs: Sequence[tuple[RunSpec, dict[str, Any]]], index: int, share: Ranks, together: int | None = None
) -> Worked:
    """Do a share of the batches of one data set for runs on one model, in a task.

    Args:
        folder: the working directory.
        runs: each with its settings as the first process found them.
        index: the data set's number.
        share: which of the batches.
        together: see `batch_groups`.
    Raises:
        InputError: this machine does not see the runs' folders, or would compute with other settings.
    """
    os.chdir(folder)
    jobs: list[tuple[Job, Samples]] = []
    for job, (_, settings) in zip(prepare_all([spec for spec, _ in runs]), runs, strict=True):
        if isinstance(job, InputError):
            raise InputError(f"{job} (on {platform.node()})")
        if job.settings != settings:
            changed = ", ".join(name for name in settings if job.settings.get(name) != settings[name])
            raise InputError(
                f"{platform.node()} would run with another {changed}: name it, or use machines that are alike"
            )
        if not (job.folder / "run.json").exists():
            raise InputError(
                f"{platform.node()} does not see {job.folder.absolute()}: a cluster's machines must share it"
            )
        data = job.data[index]
        # A name that no other attempt has: a line that was torn when a worker died is never added to.
        writer = f"{share.rank + 1}-{platform.node()}-{os.getpid()}"
        kind = measure_of(job).sample
        samples = Samples(job.folder, data.dataset, job.settings_of(data), job.count(data), kind, writer)
        samples.read()
        jobs.append((job, samples))
    return work_on(jobs, index, _loaded([job for job, _ in jobs]), share, tqdm(disable=True), together)


_kept: dict[Any, Any] = {}
_stack = ExitStack()


def _loaded(jobs: Sequence[Job]) -> Any:
    """The model of some jobs, which stays loaded for this process's next task."""
    squeezed = next((job.config for job in jobs if job.config is not None), None)
    key = jobs[0].model_key, squeezed and squeezed.compile
    if key not in _kept:
        _kept.clear()
        _stack.close()
        _kept[key] = _stack.enter_context(load(jobs))
    return _kept[key]


def _lines(watched: Sequence[Samples]) -> int:
    """Samples that are on disk."""
    return sum(path.read_bytes().count(b"\n") for samples in watched for path in samples.partials)
