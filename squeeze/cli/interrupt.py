"""Ctrl-C in the project's commands: one word and exit code 130, at any moment.

While a command works it is an exception, as everywhere, so that folders are let go and processes are ended. Before,
while packages are imported, and afterwards, while Python ends, there is nothing to put away, and the exception would
come up in the middle of foreign code: there it ends the process at once.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import FrameType

WORD = "interrupted"
CODE = 130

#: Commands that lie beside this package, and the one that an installation puts among programs; the others are
#: `python -m squeeze.X`.
SCRIPTS, PROGRAM = ("pred.py", "eval.py"), "squeeze"

_came = False


def is_command() -> bool:
    """Whether this process was started as a command of this project, and does not use it as a library."""
    if getattr(sys, "argv", [])[:1] == ["-m"]:  # until Python has found the module
        return any("squeeze." in argument for argument in sys.orig_argv)
    file = Path(getattr(sys.modules.get("__main__"), "__file__", None) or "")
    if file.name == PROGRAM:
        return file.parent.name in ("bin", "Scripts")
    return file.name in SCRIPTS and file.resolve().parent == Path(__file__).resolve().parents[2]


def came() -> bool:
    """Whether Ctrl-C has come: packages make other exceptions of it."""
    return _came


def ends() -> None:
    """From now on Ctrl-C ends the process at once, unless it is ignored, as in the background of a shell's script."""
    if signal.getsignal(signal.SIGINT) in (signal.default_int_handler, _raise):
        signal.signal(signal.SIGINT, _end)


def raises() -> bool:
    """From now on Ctrl-C is a KeyboardInterrupt; True if it ended the process until now."""
    ended = signal.getsignal(signal.SIGINT) is _end
    if ended:
        signal.signal(signal.SIGINT, _raise)
    return ended


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, f"{WORD}\n".encode())
    os._exit(CODE)


def _raise(number: int, frame: FrameType | None) -> None:
    global _came
    _came = True
    raise KeyboardInterrupt
