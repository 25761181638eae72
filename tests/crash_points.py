"""Processes that are killed before a chosen one of their calls that change the file system.

A process is a fork of the tests' own, so that nothing has to be imported again. Its calls are counted where Python
announces them, and where bytes are written; the kill is a real one, so that nothing is put away, and locks are gone.
"""

import gc
import os
import pickle
import shutil
import signal
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path

from squeeze import InputError
from squeeze.ranks import Ranks

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CALLS = {"os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink"}


@dataclass
class Outcome:
    """What a process has told: `changes`, the calls that it made; `done`, the samples that it computed."""

    killed: bool = False
    changes: list = field(default_factory=list)
    done: list = field(default_factory=list)
    said: str = ""


class Process:
    """A fork that does `act()` in a folder.

    Args:
        kill: before which of its changes it is killed, from 0; one that is half more is a write of which half is done.
    """

    def __init__(self, act, folder, kill=None):
        self.ours, theirs = os.pipe()
        self.number = os.fork()
        if self.number:
            os.close(theirs)
            return
        try:
            gc.disable()  # it would touch, and so copy, all of the tests' memory
            os.close(self.ours)
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
            os.chdir(folder)
            Counted(theirs, str(folder), kill)
            try:
                act()
            except InputError as error:
                tell(said=f"InputError: {error}")
            except BaseException:
                tell(said=traceback.format_exc())
        finally:
            os._exit(0)

    def wait(self):
        """What has become of it."""
        found = Outcome()
        with open(self.ours, "rb") as pipe:
            while True:
                try:
                    kind, value = pickle.load(pipe)
                except EOFError:
                    break
                if kind == "said":
                    found.said += value
                else:
                    getattr(found, kind).append(value)
        found.killed = os.WIFSIGNALED(os.waitpid(self.number, 0)[1])
        return found


class Counted:
    """Tells what this process changes, and kills it."""

    here = None

    def __init__(self, pipe, folder, kill):
        self.pipe, self.folder, self.kill = pipe, folder, kill
        self.count = -1
        self.write = os.write
        Counted.here = self
        os.write = self.counted_write
        sys.addaudithook(self.hook)

    def tell(self, **what):
        for item in what.items():
            data = pickle.dumps(item)
            self.write(self.pipe, data)

    def change(self, what):
        self.count += 1
        self.tell(changes=what)
        if self.kill == self.count:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(self, event, args):
        if event == "open" and isinstance(args[2], int) and args[2] & WRITES and self.inside(args[0]):
            assert args[1] is None, f"{args[0]} is written past squeeze.storage.files"
            self.change(f"open {Path(os.fsdecode(args[0])).name}")
        elif event in CALLS and (isinstance(args[0], int) or self.inside(args[0])):
            self.change(f"{event} {args[0] if isinstance(args[0], int) else Path(os.fsdecode(args[0])).name}")

    def inside(self, path):
        return not isinstance(path, int) and os.path.abspath(os.fsdecode(path)).startswith(self.folder + "/")

    def counted_write(self, number, data):
        if self.inside(os.readlink(f"/proc/self/fd/{number}")):
            self.change(f"write {len(data)}")
            if self.kill == self.count + 0.5:
                self.write(number, data[: len(data) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
        return self.write(number, data)


def tell(**what):
    """From within a process: what its `Outcome` is to say."""
    Counted.here.tell(**what)


def run(act, folder, kill=None):
    """Do `act` in one process."""
    return Process(act, folder, kill).wait()


@dataclass(frozen=True)
class Pair(Ranks):
    """One of two processes; they share over a pair of pipes as they would over a network."""

    pipes: tuple = ()

    def share(self, value):
        try:
            if self.rank == 0:
                os.write(self.pipes[1], pickle.dumps(value).ljust(4096, b" "))
                if not os.read(self.pipes[0], 1):
                    raise BrokenPipeError
                return value
            data = os.read(self.pipes[0], 4096)
            if not data:
                raise BrokenPipeError
            os.write(self.pipes[1], b"!")
            return pickle.loads(data)
        except BrokenPipeError:
            raise InputError(f"process {self.rank} stops: another process of the run has ended") from None


def run_pair(act, folder, rank=None, kill=None, both=False):
    """Do `act(ranks)` in two processes.

    Args:
        rank, kill: which of them is killed, and when.
        both: whether the other one is killed with it, or finds out by itself.
    """
    down, up = os.pipe(), os.pipe()
    ends = [(up[0], down[1]), (down[0], up[1])]

    def start(index):
        def alone():
            for end in ends[1 - index]:
                os.close(end)
            act(Pair(index, 2, index, ends[index]))

        return Process(alone, folder, kill if index == rank else None)

    processes = [start(0), start(1)]
    for end in (*down, *up):
        os.close(end)
    order = [0, 1] if rank is None else [rank, 1 - rank]
    first = processes[order[0]].wait()
    if both and first.killed:
        os.kill(processes[order[1]].number, signal.SIGKILL)
    second = processes[order[1]].wait()
    return [first, second] if order[0] == 0 else [second, first]


def points(changes):
    """Where a process that makes these changes can be killed, see `Process`."""
    for index, what in enumerate(changes):
        yield index
        if what.startswith("write"):
            yield index + 0.5


def copy(source, target):
    """Make `target` what `source` is."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, symlinks=True)


def contents(folder):
    """Every file below a folder, with its bytes, and everything else, with None."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }
