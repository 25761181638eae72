"""Several processes on one run, as `torchrun` and `accelerate launch` start them: who is who, and waiting.

Nothing is exchanged while samples run. Each process takes its own batches and writes its own partial file; the first
one holds the folder's lock, tells the others what is missing, and puts everything together at the end.
"""

from __future__ import annotations

import atexit
import os
import re
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from squeeze.errors import InputError
from squeeze.text import shortened

Shared = TypeVar("Shared")


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run.

    Args:
        rank: from 0.
        world: how many there are.
        local: this process among those of its machine, by which it chooses its GPU.
    """

    rank: int = 0
    world: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """True for the process that reads and writes what is the run's."""
        return self.rank == 0

    def share(self, value: Shared) -> Shared:
        """The first process's `value`, in every process; all wait until it is there.

        Raises:
            InputError: another process has ended.
        """
        if self.world == 1:
            return value
        import torch.distributed as dist

        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=timedelta(days=30))  # one may have hours more to do than another
            atexit.register(dist.destroy_process_group)
        values = [value]
        try:
            dist.broadcast_object_list(values, src=0)
            dist.barrier()
        except RuntimeError:
            raise InputError(f"process {self.rank} stops: another process of the run has ended") from None
        return values[0]


ALONE = Ranks()


def ranks() -> Ranks:
    """This process, from the environment that the launcher has set.

    Raises:
        InputError: a variable is no number, or this process is none of so many.
    """
    variables = {name: os.environ.get(name, "0") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    for name, value in variables.items():
        if not re.fullmatch("[0-9]{1,6}", value):
            raise InputError(f"{name} in the environment must be a whole number, got {shortened(value)}")
    rank, world, local = map(int, variables.values())
    if rank >= max(world, 1):
        raise InputError(f"RANK is {rank} in the environment, and WORLD_SIZE {world}: ranks are counted from 0")
    return Ranks(rank, max(world, 1), local)
