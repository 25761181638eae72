"""What `script/reproduce.sh` says before it sets anything up, and the sweeps that it runs."""

import subprocess
from pathlib import Path

import pytest

from squeeze.sweep.grid import read_grid

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "script/reproduce.sh"


@pytest.mark.parametrize(
    "flags, said",
    [
        ([], "--model is missing; --demo takes the embedded one"),
        (["--demo", "--model", "M"], "--demo takes the embedded model: leave --model out"),
        (["--only", "samsum", "--demo"], "--only takes longbench, xsum and speed, not samsum"),
        (["--fast"], "--fast is no option of this script"),
        (["--model"], "--model needs a name"),
    ],
)
def test_bad_options_are_a_sentence(flags, said):
    done = subprocess.run(["bash", SCRIPT, *flags], capture_output=True, text=True)
    assert done.returncode != 0 and said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_help_teaches():
    done = subprocess.run(["bash", SCRIPT, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--demo" in done.stdout and "KEY=VALUE" in done.stdout


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_sweep_of_the_project_is_whole(path):
    found = read_grid(path)
    assert not found.left_out and len(found.runs) > 3
    for run in found.runs:
        run.check()
        run.config()
