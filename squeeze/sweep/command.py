"""A grid of runs of `pred.py`, done together: `python -m squeeze.sweep --help`."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, TypeVar

from tqdm import tqdm

from squeeze.cli.arguments import Parser, real, user_path, whole
from squeeze.cli.run import run_command
from squeeze.errors import InputError
from squeeze.ranks import ALONE
from squeeze.runs.execute import OpenJob, Worker, execute, local_worker
from squeeze.runs.jobs import Job, prepare_all
from squeeze.runs.spec import RunSpec
from squeeze.sweep.grid import read_grid
from squeeze.text import printable, say, shortened

Item = TypeVar("Item")

#: Problems that are named one by one; of more, how many there are.
MOST_NAMED = 20

EXAMPLES = """examples
  what would be run, and what it costs in tokens and KV memory:
    python -m squeeze.sweep config/sweep_demo.yaml --dry_run
  the same grid for another model:
    python -m squeeze.sweep config/sweep_demo.yaml model=Mistral device=cuda:0
  run it; an interrupted sweep goes on when it is started again, and runs that are there already count:
    python -m squeeze.sweep config/sweep_demo.yaml
  on all GPUs of a Ray cluster (pip install -r requirements-ray.txt) that share this directory:
    python -m squeeze.sweep config/sweep_demo.yaml --engine ray --address auto
  what came out:
    python -m squeeze.report pred_Long --out report

the file
  Keys are the flags of pred.py, without the dashes. A list of values makes an axis of the grid: model, seed, fidelity,
  algorithm, allocation, per, ini_size and KV_class3 may have several; all data sets go into each run.

    model: [Mistral, llama2-7b-32k]
    datasets: [samsum, qasper]
    algorithm: [streaming, h2o]
    ini_size: [0.1, 0.2, 0.4]
    KV_class3: [0.6x, 0.05]        # a multiple of ini_size, or a fraction of the prompt
    allocation: [squeeze, squeeze-log]
    fidelity: [false, true]        # predictions, and the KL divergence from the full cache
    batch_size: 8

  The full cache and a uniform budget of every ini_size are added by themselves. Every point is a run of pred.py in its
  own folder. Runs on one model and seed load it once, and prompts are prefilled once for all that keep the same of it.
"""


class Engine(Protocol):
    """Where runs are done."""

    def prepare(self, runs: Sequence[RunSpec | InputError]) -> list[Job | InputError]:
        """Check runs and find their models and data, as they are where they will be run."""

    def worker(self, group: Sequence[OpenJob], bar: tqdm) -> AbstractContextManager[Worker]:
        """A worker that does runs on one model and the same data, and moves the bar on."""


class Local:
    """This process.

    Args:
        together: runs that go into one batch at most; None: as many as its device is good for.
    """

    def __init__(self, together: int | None):
        self.together = together

    def prepare(self, runs: Sequence[RunSpec | InputError]) -> list[Job | InputError]:
        return prepare_all(checking(runs, "reading the grid"))

    def worker(self, group: Sequence[OpenJob], bar: tqdm) -> AbstractContextManager[Worker]:
        return local_worker(group, ALONE, bar, self.together)


def checking(items: Sequence[Item], doing: str) -> Iterable[Item]:
    """The items, with a bar where going through them takes more than a moment."""
    return tqdm(items, desc=doing, unit="run", delay=2, leave=False)


def parser() -> Parser:
    """The flags of `python -m squeeze.sweep`."""
    made = Parser(
        prog="python -m squeeze.sweep",
        description="Run a grid of models, data sets, algorithms, sizes and seeds; every point is a run of pred.py.",
        epilog=EXAMPLES,
    )
    made.add_argument(
        "arguments",
        nargs="+",
        metavar="FILE KEY=VALUE",
        help="the grid, in YAML (see below); and values in place of those in it: model=Mistral 'seed=[1, 2]'",
    )
    made.add_argument("--dry_run", action="store_true", help="print the plan and what it costs, and run nothing")
    made.add_argument(
        "--together",
        type=whole(1),
        metavar="N",
        help="runs with one eviction method that decode as one batch, up to so many, each of them batch_size prompts; "
        "fewer where memory is short (default: as many as make 8 sequences on a CPU, 64 on a GPU; 1: each by itself)",
    )
    made.add_argument("--engine", default="local", help="local (default: this process) or ray")
    made.add_argument(
        "--address", help="of the Ray cluster: auto (the one of this machine) or host:port (default: one of its own)"
    )
    made.add_argument(
        "--num_gpus",
        type=real("a number, 0 or more"),
        help="GPUs of a Ray task (default: 1 if the cluster has any, else 0)",
    )
    made.add_argument(
        "--num_cpus", type=real("a number, 0 or more"), default=1, help="CPUs of a Ray task (default: 1)"
    )
    made.add_argument("--max_retries", type=whole(-1), default=3, help="of a Ray task whose worker dies (default: 3)")
    return made


def read_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, `grid` and `changes` among its parts, in whatever order they came.

    Raises:
        InputError: there is no file, or more than one, or flags do not go together.
    """
    args = parser().parse_args(argv)
    files = [argument for argument in args.arguments if "=" not in argument or Path(argument).is_file()]
    if len(files) != 1:
        raise InputError(f"a sweep has one file, got {shortened(' '.join(files)) or 'none'} (changes are KEY=VALUE)")
    try:
        args.grid = user_path(files[0])
    except InputError as error:
        raise InputError(f"a sweep's file {error}") from None
    args.changes = [argument for argument in args.arguments if argument != files[0]]
    if args.engine not in ("local", "ray"):
        raise InputError(f"--engine must be local or ray, got {shortened(args.engine)}")
    if args.engine == "local":
        defaults = parser().parse_args([str(args.grid)])
        for flag in ("address", "num_gpus", "num_cpus", "max_retries"):
            if getattr(args, flag) != getattr(defaults, flag):
                raise InputError(f"--{flag} is for --engine ray")
    return args


def some(problems: Sequence[str]) -> list[str]:
    """The first problems, and how many more there are."""
    more = len(problems) - MOST_NAMED
    return [*problems[:MOST_NAMED], f"and {more:,} more"] if more > 0 else list(problems)


def open_runs(prepared: Sequence[Job | InputError]) -> tuple[list[list[OpenJob]], list[str]]:
    """Look into the folder of every run.

    Returns:
        Runs that share a model and data, together; and what is wrong with the others.
    Raises:
        InputError: no run is possible.
    """
    opened: dict[Path, OpenJob] = {}
    wrong: dict[str, None] = {}
    for job in checking(prepared, "looking into folders"):
        try:
            if isinstance(job, InputError):
                raise job
            if job.folder in opened:
                first = opened[job.folder].job.info["command"]
                raise InputError(f"{job.folder} would be the folder of two runs, {first} and {job.info['command']}")
            opened[job.folder] = OpenJob(job, ALONE)
        except InputError as error:
            wrong[str(error)] = None
    if not opened:
        raise InputError("no run of the grid is possible: " + "; ".join(some(list(wrong))))
    groups: dict[object, list[OpenJob]] = {}
    for open_job in opened.values():
        groups.setdefault(open_job.job.model_key, []).append(open_job)
    return list(groups.values()), list(wrong)


def run(groups: Sequence[Sequence[OpenJob]], engine: Engine) -> list[str]:
    """Do all runs, with a bar over their samples; a sentence for each group that cannot go on."""
    wrong = []
    points = [point for group in groups for job in group for point in job.samples]
    total, missing = sum(point.total for point in points), sum(len(point.missing) for point in points)
    done = 0
    with tqdm(total=total, initial=total - missing, unit="sample", desc=f"0/{len(points)} points") as bar:
        for group in groups:
            try:
                with engine.worker(group, bar) as worker:
                    for job, index in execute(group, worker):
                        bar.write(job.report(index))
                        done += 1
                        bar.set_description(f"{done}/{len(points)} points")
            except InputError as error:
                bar.write(printable(f"error: {error}"))
                wrong.append(str(error))
    return wrong


def sweep(argv: Sequence[str] | None = None) -> None:
    """Run a grid.

    Raises:
        InputError: the file, or a run of the grid, is wrong; the other runs were done before.
    """
    args = read_arguments(argv)
    grid = read_grid(args.grid, args.changes)
    for reason in some(grid.left_out):
        say(f"left out: {reason}")
    engine: Engine = Local(args.together)
    if args.engine == "ray":
        from squeeze.sweep.ray_cluster import Cluster

        engine = Cluster(args.address, args.num_cpus, args.num_gpus, args.max_retries, args.together)
    groups, wrong = open_runs(engine.prepare(grid.runs))
    for problem in some(wrong):
        say(f"left out: {problem}")
    if args.dry_run:
        from squeeze.sweep import cost

        print(cost.describe(groups))
    else:
        for note in dict.fromkeys(note for group in groups for open_job in group for note in open_job.job.notes):
            say(f"note: {note}")
        wrong += run(groups, engine)
        tasks = sorted({open_job.job.folder.parts[0] for group in groups for open_job in group})
        say("What came out: python -m squeeze.report " + shlex.join([*tasks, "--out", "report"]))
    if wrong:
        raise InputError(f"not all runs of {args.grid} are possible: " + "; ".join(some(list(dict.fromkeys(wrong)))))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 2 and a sentence where something is wrong."""
    return run_command(lambda _: sweep(argv))
