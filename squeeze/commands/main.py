"""The console script: `squeeze COMMAND …` is `python -m squeeze.COMMAND …`, or a checkout's `python COMMAND.py …`."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module

from squeeze.cli.run import run_command
from squeeze.errors import InputError
from squeeze.text import shortened

#: Command → the module whose `main` it is, and its purpose.
COMMANDS = {
    "pred": ("squeeze.commands.pred", "write a model's predictions on LongBench or for HELM"),
    "eval": ("squeeze.commands.eval", "score predictions, or compare runs sample by sample"),
    "sweep": ("squeeze.sweep.command", "run a grid of configurations"),
    "report": ("squeeze.report.command", "tables and figures of all runs"),
    "calibrate": ("squeeze.calibrate", "measure a model's loss curves, for --allocation calibrated"),
    "models_table": ("squeeze.models_table.command", "which models can be squeezed by which methods; is yours?"),
    "bench": ("squeeze.bench.command", "measure speed and memory of caches"),
    "longbench": ("squeeze.benchmarks.longbench.download", "fetch and check LongBench's data"),
    "helm_requests": ("squeeze.helm.requests", "write HELM's requests of a scenario to a file"),
    "helm_env": ("squeeze.helm.environment", "let HELM run any of its scenarios on a squeezed model"),
    "helm_score": ("squeeze.helm.score", "score predictions of HELM's requests with HELM"),
    "check": ("squeeze.commands.check", "check that this environment can run models with a budget per layer"),
}


def usage() -> str:
    """Every command in a line."""
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:{width}}  {words}" for name, (_, words) in COMMANDS.items())
    return f"usage: squeeze COMMAND ...\n\n{lines}\n\nsqueeze COMMAND --help explains every flag."


def main(argv: Sequence[str] | None = None) -> int | None:
    """Run the command that the first argument names.

    Returns:
        Its exit code, where it has one.
    Raises:
        InputError: there is no such command, or what it is given is wrong.
    """
    name, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return None
    if name not in COMMANDS:
        near = difflib.get_close_matches(name[:80], COMMANDS, cutoff=0.6)
        hint = f"did you mean {' or '.join(near)}?" if near else f"squeeze has {', '.join(COMMANDS)}"
        raise InputError(f"there is no command {shortened(name)}: {hint}")
    sys.argv[0] = f"squeeze {name}"  # what the command calls itself in its own --help
    return import_module(COMMANDS[name][0]).main(arguments)


def run() -> int:
    """Run the console script; its exit code."""
    return run_command(main)


if __name__ == "__main__":  # for launchers that want a module, such as torchrun
    sys.exit(run())
