"""OpenMP's threads, for the commands: how many, and what they do while they wait.

PyTorch's threads on a CPU are OpenMP's. By default they spin while they wait for one another, which is fast on cores
that nothing else wants; where one of them is not running, the others burn what it needs, and a step takes ten times as
long. Where they wait passively from the start, a decode step of a small model takes half as long again, since its
operations are short. So they wait passively, but for a moment of spinning where the machine is calm (docs/library.md).
OpenMP reads the environment when torch is imported, so a command says this before that.
"""

from __future__ import annotations

import os
import re
import statistics
import time
from pathlib import Path

#: Any of these in the environment: the user has chosen, and nothing is changed.
COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
POLICIES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")

#: Rounds that libgomp's threads spin on a calm machine before they give up their core: some 300 microseconds, which is
#: longer than the pause between two operations of a model, and short where another program comes.
SPINS = 20_000

#: What `settings` gave for this process, which is no choice of the user's.
_given: dict[str, str] = {}


def cores() -> int:
    """CPU cores that this process may use, by its affinity and the quota of its control group."""
    from joblib import cpu_count  # which takes a sixth of a second to import

    try:
        return cpu_count(only_physical_cores=True)
    except ValueError:  # a variable of joblib's own that is no number
        return os.cpu_count() or 1


def is_calm(threads: int) -> bool:
    """True if this machine has cores for so many threads now, beside what else is running on it.

    Programs that end or begin just now are there for a moment: looked at for a tenth of a second, half a core counts
    as none.
    """
    counts = []
    for _ in range(20):
        try:
            running = Path("/proc/loadavg").read_text().split()[3].split("/")[0]
        except (OSError, IndexError):
            return False
        counts.append(int(running) - 1)  # without this process
        time.sleep(0.005)
    return statistics.fmean(counts) + threads < (os.cpu_count() or 1) + 0.6


def settings(threads: int | None = None) -> dict[str, str]:
    """Variables to set before torch is imported, without those that the user has set.

    >>> os.environ |= settings()

    Args:
        threads: of one process; None: the cores, divided by the processes of this machine that a launcher such as
            torchrun started for one run.
    """
    asked = {name for name, value in os.environ.items() if _given.get(name) != value}
    variables: dict[str, str] = {}
    count = max(1, cores() // _processes() if threads is None else threads)
    if asked.isdisjoint(COUNTS):
        variables["OMP_NUM_THREADS"] = str(count)
    if asked.isdisjoint(POLICIES):
        variables["OMP_WAIT_POLICY"] = "PASSIVE"
        if threads is None and is_calm(count):
            variables["GOMP_SPINCOUNT"] = str(SPINS)
    if threads is None:
        _given.update(variables)
    return variables


def _processes() -> int:
    value = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, int(value)) if re.fullmatch("[0-9]{1,6}", value) else 1
