"""The script of all that needs a GPU: what it says without one, and its commands on tiny shapes."""

import json
import subprocess

import pytest
from conftest import ROOT

SCRIPT = ROOT / "script/gpu.sh"


def run(*flags, **more):
    return subprocess.run(["bash", SCRIPT, *flags], capture_output=True, text=True, check=False, **more)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--fast"], "--fast is no option of this script"),
        (["--only", "steps,speed"], "--only takes tests,kernels,steps,prefill,llama,throughput, not speed"),
        (["--only", "steps prefill"], "not steps prefill"),
        (["--out"], "--out needs a folder"),
        (["--python", "false"], "false lacks what requirements.txt names"),
    ],
)
def test_bad_options_are_a_sentence(flags, said):
    done = run(*flags)
    assert done.returncode != 0 and said in done.stderr and len(done.stderr.splitlines()) == 1


def test_help_teaches(tmp_path):
    done = run("--help", cwd=tmp_path)
    assert done.returncode == 0 and "--short" in done.stdout and "within 9 minutes" in done.stdout


@pytest.mark.slow
def test_its_commands_run(tmp_path):
    done = run("--device", "cpu", "--short", "--out", "out", cwd=tmp_path)
    tmp_path /= "out"
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 5 and "not finished" not in done.stdout
    for part in ("steps", "prefill-96", "throughput"):
        records = json.loads((tmp_path / part / "bench.json").read_text())["runs"]
        assert len(records) > 2 and not any("error" in record["result"] for record in records)
        assert "squeeze" in (tmp_path / f"{part}.md").read_text()
    assert "| SmolLM2-135M" in (tmp_path / "kernels.md").read_text()
