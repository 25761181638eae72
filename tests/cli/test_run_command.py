"""Exit codes and words of commands whose output goes nowhere."""

import subprocess
import sys

import pytest
from conftest import ROOT


def shell(command):
    done = subprocess.run(
        ["bash", "-c", command.replace("python", sys.executable)], cwd=ROOT, capture_output=True, text=True
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("command", ["eval.py nowhere", "-m squeeze.report nowhere"])
def test_closed_output(command):
    for closed in (">&-", "2>&-", ">&- 2>&-", "2>/dev/full", ">/dev/full 2>/dev/full"):
        code, out, said = shell(f"python {command} {closed}")
        assert (code, out) == (2, ""), closed
        assert "Traceback" not in said
