"""Ctrl-C in a command, at moments that are chosen: one word and exit code 130, never a traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from made_runs import make_run

from squeeze.cli.run import run_command

ROOT = Path(__file__).parents[2]

#: Python runs this before a command: Ctrl-C comes when a module is imported, or when Python ends.
CUSTOM = """
import atexit, os, signal, sys
when = os.environ["WHEN"]
strike = lambda: os.kill(os.getpid(), signal.SIGINT)
def hook(event, args, struck=[]):
    if event == "import" and args[0] == when and not struck:
        struck.append(1)
        strike()
sys.addaudithook(hook)
if when == "the end":
    atexit.register(strike)
"""


@pytest.fixture
def command(tmp_path):
    """Runs a command with Ctrl-C at a moment, in a folder with a finished run; everything that it printed."""
    (tmp_path / "custom").mkdir()
    (tmp_path / "custom/sitecustomize.py").write_text(CUSTOM)
    make_run(tmp_path / "run", samples=1)

    def run(when, *arguments, **more):
        path = os.pathsep.join([str(tmp_path / "custom"), str(ROOT)])
        environment = os.environ | {"PYTHONPATH": path, "WHEN": when}
        return subprocess.run(
            [sys.executable, *arguments], env=environment, cwd=tmp_path, capture_output=True, text=True, **more
        )

    return run


@pytest.mark.parametrize(
    ("when", "arguments"),
    [
        ("squeeze.config", [str(ROOT / "eval.py"), "run"]),  # the first that is imported
        ("rouge", [str(ROOT / "eval.py"), "run"]),
        ("the end", [str(ROOT / "eval.py"), "run"]),
        ("squeeze.runs.jobs", [str(ROOT / "pred.py"), "--help"]),
        ("torch", [str(ROOT / "pred.py"), "--model", str(ROOT), "--pred", "Long"]),  # which the command does itself
        ("squeeze.runs.inventory", ["-m", "squeeze.report", "run"]),
        ("the end", ["-m", "squeeze.report", "run"]),
        ("tqdm", ["-m", "squeeze.sweep", "--help"]),
        ("numpy", ["-m", "squeeze.calibrate", "--help"]),
    ],
)
def test_one_word(command, when, arguments):
    done = command(when, *arguments)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")
    if when == "the end":
        assert "samsum" in done.stdout, "what was printed is not lost"


def test_what_ignores_it_goes_on_ignoring_it(command):
    """As commands in the background of a shell's script do."""
    import signal

    done = command("squeeze.runs.inventory", "-m", "squeeze.report", "run", preexec_fn=_ignore)
    assert done.returncode == 0 and not done.stderr
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def _ignore():
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)


def test_a_program_that_uses_the_library_keeps_its_own_way(command):
    done = command("never", "-c", "import signal, squeeze, squeeze.runs.flags; print(signal.getsignal(signal.SIGINT))")
    assert "default_int_handler" in done.stdout


@pytest.mark.parametrize("error", [RuntimeError, ImportError, SystemExit])
def test_what_a_package_makes_of_it_is_still_an_interruption(command, error):
    code = "import os, signal; from squeeze.cli import interrupt, run; interrupt.ends()\n"
    code += "def main(_):\n    try: os.kill(os.getpid(), signal.SIGINT)\n    finally: "
    code += f"raise {error.__name__}('numpy failed to import')\n"
    done = command("never", "-c", code + "raise SystemExit(run.run_command(main))")
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_other_errors_are_what_they_were(capsys):
    def broken(_):
        raise RuntimeError("a fault of the program's own")

    with pytest.raises(RuntimeError, match="a fault"):
        run_command(broken)
