"""A sweep on a Ray cluster of two workers, one of them killed, gives the bytes of this process alone."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from test_sweep import published
from tiny import save_rows, save_tiny

from squeeze import InputError
from squeeze.ranks import Ranks
from squeeze.runs.jobs import prepare_all
from squeeze.runs.spec import RunSpec
from squeeze.sweep import command as sweep
from squeeze.sweep.ray_cluster import Cluster, run_share

ROOT = Path(__file__).parents[2]
GRID = """
model: tiny
datasets: [samsum, qasper]
data_dir: data
device: cpu
dtype: float32
batch_size: 2
algorithm: h2o
ini_size: 0.3
KV_class3: 0.126
temperature: 0.9
"""


@pytest.fixture(scope="module")
def workers():
    """A local Ray cluster with room for two tasks."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)}
    ray = pytest.importorskip("ray", reason="needs requirements-ray.txt")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A tiny model, eight rows of one data set and two of another."""
    save_tiny(tmp_path / "tiny")
    save_rows(tmp_path / "data", count=8)
    save_rows(tmp_path / "data", dataset="qasper", count=2)
    (tmp_path / "grid.yaml").write_text(GRID, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def kill_a_worker(seen, stop):
    """Kill the first task that has written some samples of samsum, and note all that ever wrote."""
    killed = False
    while not stop.is_set():
        for path in Path("pred_Long").rglob("samsum.partial.*-*.jsonl"):
            seen.add(path.name)
            if not killed and path.read_bytes().count(b"\n") >= 2:
                os.kill(int(path.name.split("-")[-1].removesuffix(".jsonl")), signal.SIGKILL)
                killed = True
                seen.add("killed")
        time.sleep(0.01)


def together(folder):
    """How many runs went into one batch with each, itself counted, by data set."""
    found = {}
    for path in Path(folder).rglob("run.json"):
        for name, dataset in json.loads(path.read_text(encoding="utf-8"))["datasets"].items():
            found[path.relative_to(folder), name] = dataset["starts"][-1]["together"]
    assert sorted(found.values()) == [1, 1, 2, 2, 2, 2]
    return found


def test_a_cluster_of_which_a_worker_is_killed_gives_the_bytes_of_one_process(place, workers, capsys):
    sweep.sweep(["grid.yaml"])
    expected = published()
    assert len(expected) == 6
    Path("pred_Long").rename("alone")
    seen, stop = set(), threading.Event()
    watcher = threading.Thread(target=kill_a_worker, args=(seen, stop))
    watcher.start()
    capsys.readouterr()
    try:
        sweep.sweep(["grid.yaml", "--engine", "ray"])
    finally:
        stop.set()
        watcher.join()
    assert published() == expected
    assert together("pred_Long") == together("alone"), "runs of one batch stay together, whoever does them"
    assert not list(Path("pred_Long").rglob("*partial*"))
    assert "killed" in seen
    shards = [name.split(".")[2].split("-")[0] for name in seen - {"killed"}]
    assert set(shards) == {"1", "2"}, "both workers took part"
    assert len(shards) > 2, "another process went on with what the killed one left"
    assert capsys.readouterr().out.count("samples, ") == 6
    before = published()
    sweep.sweep(["grid.yaml", "--engine", "ray"])  # nothing to do
    assert published() == before


def test_a_task_that_always_dies_or_wants_too_much_is_a_sentence(workers):
    cluster = Cluster(None, num_cpus=1, num_gpus=None, max_retries=0)
    assert cluster.workers == 2
    with pytest.raises(InputError, match="a Ray task was given up, and no sample is lost"):
        cluster._results([cluster._submit(lambda: os._exit(1))])
    with pytest.raises(InputError, match="a task wants 1 GPUs and the Ray cluster has 0"):
        Cluster(None, num_cpus=1, num_gpus=1, max_retries=0)
    with pytest.raises(InputError, match="a task wants 3 CPUs and the Ray cluster has 2"):
        Cluster(None, num_cpus=3, num_gpus=None, max_retries=0)


def test_bad_input_on_a_worker_is_its_sentence(place, workers):
    cluster = Cluster(None, num_cpus=1, num_gpus=None, max_retries=0)
    [wrong] = cluster.prepare([RunSpec(model="nowhere")])
    assert isinstance(wrong, InputError) and "nowhere" in str(wrong)
    task = cluster._submit(run_share, str(place), [(RunSpec(model="nowhere"), {})], 0, Ranks())
    with pytest.raises(InputError, match="nowhere") as error:
        cluster._results([task])
    assert "Traceback" not in str(error.value)


def test_a_machine_that_sees_other_folders_or_computes_otherwise_is_named(place):
    spec = RunSpec(model="tiny", data_dir="data", device="cpu", dtype="float32")
    [job] = prepare_all([spec])
    with pytest.raises(InputError, match=r"does not see .*pred_Long/tiny/full: a cluster's machines must share it"):
        run_share(str(place), [(spec, job.settings)], 0, Ranks())
    with pytest.raises(InputError, match="would run with another dtype: name it"):
        run_share(str(place), [(spec, job.settings | {"dtype": "bfloat16"})], 0, Ranks())


def test_an_address_that_does_not_answer_is_a_sentence(place):
    pytest.importorskip("ray", reason="needs requirements-ray.txt")
    command = [sys.executable, "-m", "squeeze.sweep", "grid.yaml", "--engine", "ray", "--address", "127.0.0.1:9"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_py_gcs_connect_timeout_s": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    [sentence] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "the Ray cluster at 127.0.0.1:9 does not answer" in sentence and "ray start --head" in sentence
    assert "Traceback" not in done.stderr
