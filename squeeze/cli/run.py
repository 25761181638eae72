"""The frame of every command: threads, Ctrl-C, a closed output, and one sentence for an error."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Sequence

from squeeze import threads
from squeeze.cli import interrupt
from squeeze.compatibility import UntestedVersion, missing_package
from squeeze.errors import InputError
from squeeze.text import say


def run_command(main: Callable[[Sequence[str] | None], int | None]) -> int:
    """Run a command and return its exit code: what `main` returns, or 0.

    Bad input, a package that is missing, or one of a version that was not tested, is one sentence on stderr and code
    2, never a traceback; an error of another program has that program's code. Threads are chosen before anything
    imports torch.
    """
    code, command = 0, False
    try:
        command = interrupt.raises()
        try:
            os.environ |= threads.settings()
            for name in ("stdout", "stderr"):
                if getattr(sys, name) is None:  # closed by whoever started this
                    setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (as long as the process)
            if isinstance(sys.stdout, io.TextIOWrapper):  # what a terminal cannot show is no error, as on stderr
                sys.stdout.reconfigure(errors="backslashreplace")
            code = main(None) or 0
            sys.stdout.flush()
        except BrokenPipeError:  # whoever read the output has seen enough; what is still in the buffer has no reader
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 141
        except (InputError, ImportError, OSError) as error:
            sentence = _sentence(error)
            if sentence is None or interrupt.came():
                raise
            code = getattr(error, "code", 2)
            with contextlib.suppress(OSError):  # nobody reads it
                say(f"error: {sentence}", sys.stderr)
        with contextlib.suppress(OSError):  # nobody reads any more
            sys.stdout.flush()
    except BaseException as error:
        if not (interrupt.came() or isinstance(error, KeyboardInterrupt)):
            raise
        print(interrupt.WORD, file=sys.stderr)
        code = interrupt.CODE
    finally:
        if command:
            interrupt.ends()
    return code


def _sentence(error: Exception) -> str | None:
    """The sentence for a user about an error; None where it is a fault of the program and not of its input."""
    if isinstance(error, ModuleNotFoundError):
        return missing_package(error)
    if isinstance(error, OSError):  # without a name it is the output's
        where = f"{error.filename}: " if error.filename is not None else "cannot write the output: "
        return f"{where}{error.strerror or error}"
    return str(error) if isinstance(error, InputError | UntestedVersion) else None
