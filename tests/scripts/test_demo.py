"""What `script/demo.sh` runs: one sweep, the scores of its runs, and their table. Nothing is computed here."""

import shutil
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "script/demo.sh"
PYTHON = """#!/usr/bin/env bash
printf '%s\\n' "${*//$'\\n'/ }" >> calls
case "$*" in *squeeze.sweep*)
    [ ! -e broken ] || exit 2
    echo "note: a sentence"
    for run in full sliding_window/0.2/12 calibrated/0.2 calibrated/0.2/fidelity; do
        echo "pred_Long/SmolLM2-135M/$run/samsum.jsonl: 6 samples, 9.9 tokens/s, KV 20.0%"
        echo "  layers in class 1, 2, 3: 1, 2, 27"
    done ;;
esac
"""


def start(folder, **settings):
    """The finished script in a folder without a model, and the command lines that it gave to Python."""
    for name, text in (("script/setup.sh", "true"), (".venv/bin/python", PYTHON)):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    shutil.copy(SCRIPT, folder / "script")
    environment = {"PATH": "/usr/bin:/bin", **settings}
    done = subprocess.run(["bash", folder / "script/demo.sh"], capture_output=True, text=True, env=environment)
    return done, (folder / "calls").read_text().splitlines()


def test_the_runs_of_the_sweep_are_scored_and_shown_in_their_order(tmp_path):
    done, calls = start(tmp_path)
    assert done.returncode == 0 and "note: a sentence" in done.stderr
    runs = [f"pred_Long/SmolLM2-135M/{run}" for run in ("full", "sliding_window/0.2/12", "calibrated/0.2")]
    runs.append(f"{runs[-1]}/fidelity")
    sweep, scores, table = calls
    assert sweep == "-m squeeze.sweep config/demo.yaml"
    assert scores.startswith("-c ") and scores.endswith(" ".join(runs))
    assert table == f"-m squeeze.report {' '.join(runs)}"


def test_settings_take_the_place_of_the_files(tmp_path):
    _, calls = start(tmp_path, sample_num="28", KV_class3="0.24")
    assert calls[0] == "-m squeeze.sweep config/demo.yaml sample_num=28 KV_class3=0.24"


def test_a_sweep_that_fails_ends_the_demo(tmp_path):
    (tmp_path / "broken").touch()
    done, calls = start(tmp_path)
    assert done.returncode == 2 and len(calls) == 1
