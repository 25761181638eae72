"""OpenMP's threads are chosen before torch is there, in every command; what the user has set stays."""

import os
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from squeeze import InputError, threads
from squeeze.ranks import ranks

COMMANDS = (
    "sweep",
    "report",
    "bench",
    "calibrate",
    "longbench",
    "helm_requests",
    "helm_env",
    "helm_score",
    "models.embedded",
)
VARIABLES = (*threads.COUNTS, *threads.POLICIES, "LOCAL_WORLD_SIZE")


@pytest.fixture
def bare(monkeypatch):
    """An environment in which nobody has chosen."""
    monkeypatch.setattr(threads, "_given", {})
    monkeypatch.setattr(threads, "is_calm", lambda count: False)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def python(*arguments, prepare=None, **environment):
    """What a process of its own printed, which inherits no choice of this one's."""
    inherited = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=inherited | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        preexec_fn=prepare,
    )
    return done.stdout + done.stderr


def test_passive_waiting_and_a_thread_for_each_core(bare):
    assert threads.settings() == {"OMP_NUM_THREADS": str(threads.cores()), "OMP_WAIT_POLICY": "PASSIVE"}
    assert threads.settings(threads=0)["OMP_NUM_THREADS"] == "1"


def test_threads_spin_for_a_moment_where_nothing_else_runs(bare):
    bare.setattr(threads, "is_calm", lambda count: count == threads.cores())
    assert threads.settings()["GOMP_SPINCOUNT"] == str(threads.SPINS)
    assert "GOMP_SPINCOUNT" not in threads.settings(1), "of another machine's calm nothing is known"


@pytest.mark.skipif(sys.platform != "linux", reason="no /proc here")
def test_a_busy_machine_is_not_calm():
    cores = os.cpu_count() or 1
    assert not threads.is_calm(cores + 1)
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(cores)]
    try:
        time.sleep(0.3)
        assert not threads.is_calm(1)
    finally:
        for one in busy:
            one.kill()
            one.wait()


@pytest.mark.parametrize("name", threads.COUNTS)
def test_the_users_count_stays(bare, name):
    bare.setenv(name, "7")
    assert threads.settings() == {"OMP_WAIT_POLICY": "PASSIVE"}


@pytest.mark.parametrize("name", threads.POLICIES)
def test_the_users_policy_stays(bare, name):
    bare.setenv(name, "5")
    assert set(threads.settings()) == {"OMP_NUM_THREADS"}


def test_a_choice_of_its_own_is_no_wish_of_the_users(bare):
    """A Ray task has its own CPUs, whatever the driver, or the cluster that it started, was given."""
    for name, value in threads.settings().items():
        bare.setenv(name, value)
    assert threads.settings(1) == {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    bare.setenv("OMP_NUM_THREADS", "9")
    assert threads.settings(1) == {"OMP_WAIT_POLICY": "PASSIVE"}


def test_processes_of_a_launcher_share_the_cores(bare):
    bare.setattr(threads, "cores", lambda: 16)
    for world, expected in (("4", "4"), ("32", "1"), ("0", "16"), ("many", "16"), ("9" * 5000, "16")):
        bare.setenv("LOCAL_WORLD_SIZE", world)
        assert threads.settings()["OMP_NUM_THREADS"] == expected


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
def test_cores_are_those_of_the_affinity():
    one = min(os.sched_getaffinity(0))
    said = python("-c", "from squeeze import threads; print(threads.cores())", prepare=lambda: bind(one))
    assert said.strip() == "1"


def bind(core):
    os.sched_setaffinity(0, {core})


def test_no_command_imports_torch_before_it_can_choose():
    names = [f"squeeze.{name}" for name in COMMANDS]
    code = f"import sys, pred, eval, modify_transformers, {', '.join(names)}; print('torch' in sys.modules)"
    assert python("-c", code).strip() == "False"


@pytest.mark.skipif(sys.platform != "linux", reason="libgomp's own words")
@pytest.mark.parametrize(
    "command",
    [
        ("pred.py", "--model", "SmolLM2-135M", "--data_dir", "nowhere"),
        pytest.param(("script/allocation_study.py", "-h"), marks=pytest.mark.slow),
    ],
)
def test_the_openmp_that_torch_loads_waits_passively(command):
    said = python(*command, OMP_DISPLAY_ENV="TRUE")
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in said
    assert f"OMP_NUM_THREADS = '{threads.cores()}'" in said
    said = python(*command, OMP_DISPLAY_ENV="TRUE", OMP_WAIT_POLICY="ACTIVE", OMP_NUM_THREADS="3")
    assert "OMP_WAIT_POLICY = 'ACTIVE'" in said and "OMP_NUM_THREADS = '3'" in said


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "x"}, "RANK in the environment must be a whole number, got x"),
        ({"RANK": "0", "WORLD_SIZE": "-1"}, "WORLD_SIZE in the environment must be a whole number"),
        ({"RANK": "5", "WORLD_SIZE": "2"}, "RANK is 5 in the environment, and WORLD_SIZE 2"),
        ({"RANK": "1"}, "RANK is 1 in the environment, and WORLD_SIZE 0"),
    ],
)
def test_a_launchers_variables_that_are_none(monkeypatch, variables, words):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=words):
        ranks()


def test_a_variable_of_joblibs_that_is_none_costs_nothing(bare):
    bare.setenv("LOKY_MAX_CPU_COUNT", "x")
    assert threads.cores() >= 1
