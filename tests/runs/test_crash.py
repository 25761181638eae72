"""Processes that are really killed, at any moment: nothing finished is lost, and the bytes are the same."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import save_rows, save_tiny

ROOT = Path(__file__).parents[2]

#: A predictor that does nothing, in batches of 3, with a pause after each; the pauses are where most kills land.
STUB = """
import sys, time
from pathlib import Path
from squeeze.generation.stats import SampleStats
from squeeze.runs.folder import Run
folder, total, pause = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
row = {"answers": ["a"], "all_classes": None, "length": 1, "stats": SampleStats(9, 2, 0.5, 0.5, 10.0, 0.0, 10, 9)}
record = lambda i: {"index": i, "pred": f"é {i} " * 2000, **row}
with Run(folder, {"model": "M"}, {}) as run:
    samples = run.open("samsum", {}, total)
    run.start(samples)
    for first in range(0, total, 3):
        batch = range(first, min(first + 3, total))
        if set(batch) & set(samples.missing):
            samples.append([record(i) for i in batch])
            time.sleep(pause)
    run.finish(samples, lambda stats: {"samples": len(stats)})
"""


def start(*command, **environment):
    return subprocess.Popen(
        [sys.executable, *command],
        env=os.environ | {"PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*command, **environment):
    process = start(*command, **environment)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_a_killed_stub_ends_in_the_same_bytes(tmp_path):
    rng = random.Random(11)
    total, killed, torn, folders = 10, 0, 0, 0
    finish("-c", STUB, str(tmp_path / "whole"), str(total), "0")
    expected = (tmp_path / "whole/samsum.jsonl").read_bytes()
    startup = time.perf_counter()
    finish("-c", STUB, str(tmp_path / "timed"), str(total), "0")
    startup = time.perf_counter() - startup
    while killed < 20:
        folder = tmp_path / f"run-{folders}"
        folders += 1
        for _ in range(20):
            process = start("-c", STUB, str(folder), str(total), "0.03")
            if rng.random() < 0.5:  # at any moment; or while samples are written, however slow the machine is
                time.sleep(startup * rng.uniform(0.6, 1.4))
            else:
                while not list(folder.glob("samsum*")) and process.poll() is None:
                    time.sleep(0.002)
                time.sleep(rng.uniform(0, 0.12))
            killed += process.poll() is None
            kill(process)
            partial = folder / "samsum.partial.jsonl"
            if partial.exists() and rng.random() < 0.3:  # as if the kill had come in the middle of a line
                content = partial.read_bytes()
                partial.write_bytes(content[: len(content) - rng.randrange(min(len(content), 3000) + 1)])
                torn += 1
            if (folder / "samsum.jsonl").exists() and not partial.exists():
                break
        finish("-c", STUB, str(folder), str(total), "0")
        assert (folder / "samsum.jsonl").read_bytes() == expected
        assert not [path for path in folder.rglob("*") if "partial" in path.name or path.suffix.isdigit()]
        lines = (folder / "samples/samsum.jsonl").read_text("utf-8").splitlines()
        assert [json.loads(line)["index"] for line in lines] == list(range(total))
    assert folders > 1 and torn > 0


def test_a_disk_that_is_full_is_a_sentence_and_loses_nothing(tmp_path):
    """The system refuses to let any file grow beyond a size, in the middle of a line."""
    finish("-c", STUB, str(tmp_path / "whole"), "10", "0")
    folder = tmp_path / "run"
    small = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n{STUB}"
    process = start("-c", small, str(folder), "10", "0")
    output, _ = process.communicate()
    assert process.returncode == 1
    assert "InputError: cannot write" in output and "File too large; earlier samples are kept" in output
    content = (folder / "samsum.partial.jsonl").read_bytes()
    assert len(content) == 100_000 and not content.endswith(b"\n")
    finish("-c", STUB, str(folder), "10", "0")
    assert (folder / "samsum.jsonl").read_bytes() == (tmp_path / "whole/samsum.jsonl").read_bytes()
    starts = json.loads((folder / "run.json").read_text())["datasets"]["samsum"]["starts"]
    assert starts[1]["samples_done"] > 3


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A tiny model and eight rows; 128 tokens are generated for each, unless the model stops before."""
    save_tiny(tmp_path / "tiny")
    save_rows(tmp_path / "data", count=8)
    monkeypatch.chdir(tmp_path)
    return tmp_path


FLAGS = ["--model", "tiny", "--pred", "Long", "--device", "cpu", "--dtype", "float32", "--data_dir", "data"]
FLAGS += ["--enable_squeeze", "--ini_size", "0.3", "--KV_class3", "0.126", "--temperature", "0.9", "--top_p", "0.95"]
FOLDER = Path("pred_Long/tiny/0.3/12.6")


def whole_run():
    """The bytes of an uninterrupted run in batches of 2; its folder is put away."""
    finish(str(ROOT / "pred.py"), *FLAGS, "--batch_size", "2")
    content = (FOLDER / "samsum.jsonl").read_bytes()
    FOLDER.rename("whole")
    return content


def wait_for(process, condition):
    while not condition():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.005)


def lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.slow
def test_pred_that_is_killed_three_times_goes_on_with_sampling(place):
    expected = whole_run()
    partial = FOLDER / "samsum.partial.jsonl"
    for done in (2, 4, 6):
        process = start(str(ROOT / "pred.py"), *FLAGS, "--batch_size", "2")
        wait_for(process, lambda done=done: lines(partial) >= done)
        kill(process)
        assert lines(partial) < 8, "killed before it was through"
    with partial.open("ab") as file:
        file.write(b'{"index": 0, "pred": "torn')
    finish(str(ROOT / "pred.py"), *FLAGS, "--batch_size", "2")
    assert (FOLDER / "samsum.jsonl").read_bytes() == expected
    starts = json.loads((FOLDER / "run.json").read_text())["datasets"]["samsum"]["starts"]
    assert [one["samples_done"] for one in starts] == [0, 2, 4, 6]


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(ROOT / "pred.py")]


@pytest.mark.slow
def test_two_processes_give_the_bytes_of_one_also_when_one_is_killed(place):
    expected = whole_run()
    output = finish(*TORCHRUN, *FLAGS, "--batch_size", "2", OMP_NUM_THREADS="1")
    assert (FOLDER / "samsum.jsonl").read_bytes() == expected
    assert output.count("8 samples") == 1, "the first process speaks for all"
    [begin] = json.loads((FOLDER / "run.json").read_text())["datasets"]["samsum"]["starts"]
    assert begin["processes"] == 2
    assert not list(FOLDER.glob("*partial*"))
    FOLDER.rename("together")

    process = start(*TORCHRUN, *FLAGS, "--batch_size", "2", OMP_NUM_THREADS="1")
    second = FOLDER / "samsum.partial.1.jsonl"
    wait_for(process, lambda: lines(second) >= 2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = {int(child): Path(f"/proc/{child}/environ").read_bytes().split(b"\0") for child in children}
    os.kill(next(child for child, variables in ranks.items() if b"RANK=1" in variables), signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0
    there = lines(second) + lines(FOLDER / "samsum.partial.jsonl")
    assert 2 <= there < 8
    finish(str(ROOT / "pred.py"), *FLAGS, "--batch_size", "2")
    assert (FOLDER / "samsum.jsonl").read_bytes() == expected
    starts = json.loads((FOLDER / "run.json").read_text())["datasets"]["samsum"]["starts"]
    assert [one["samples_done"] for one in starts] == [0, there], "what both had done counts"
