"""Write a model's predictions on LongBench or for HELM with a full or a squeezed KV cache: `python pred.py --help`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from squeeze.ranks import ranks
from squeeze.runs.execute import OpenJob, execute, local_worker
from squeeze.runs.flags import read_flags
from squeeze.runs.jobs import prepare
from squeeze.text import say


def main(argv: Sequence[str] | None = None) -> None:
    process = ranks()
    job = prepare(read_flags(sys.argv[1:] if argv is None else argv), process)
    for note in job.notes if process.first else ():
        say(f"note: {note}")
    jobs = [OpenJob(job, process)]
    with local_worker(jobs, process) as worker:
        for done, index in execute(jobs, worker):
            if process.first:
                print(done.report(index))
