"""A kill before every call that changes a file or folder, for every command that writes: a restart ends in the same
bytes as an uninterrupted run, computes nothing twice, leaves nothing behind, and `run.json` says what was."""

import importlib
import json
from contextlib import contextmanager
from pathlib import Path

import crash_points
import pytest
import torch
from crash_points import contents, copy, points, run, run_pair, tell
from made_runs import make_run, measured
from tiny import save_rows, save_tiny

from squeeze import calibrate, ranks
from squeeze.benchmarks.base import Measure
from squeeze.benchmarks.longbench.benchmark import LongBench
from squeeze.benchmarks.records import NoStats, PredictedSample
from squeeze.commands import pred
from squeeze.generation import generate
from squeeze.helm import environment as helm_env
from squeeze.helm import requests as helm_requests
from squeeze.models import embedded
from squeeze.report import command as report
from squeeze.report import page
from squeeze.runs import execute, jobs
from squeeze.runs.flags import read_flags
from squeeze.storage import paths
from squeeze.storage.files import write_json, write_whole
from squeeze.sweep import command as sweep
from squeeze.sweep.grid import read_grid

evaluate = importlib.import_module("eval")
# Once, and not in every fork.
for module in (
    "benchmarks.completions",
    "benchmarks.fidelity",
    "models.loading",
    "engine.loss_curves",
    "report.sections",
):
    importlib.import_module(f"squeeze.{module}")
COMMON = ["--model", "tiny", "--data_dir", "data", "--device", "cpu", "--dtype", "float32"]
RUN = Path("pred_Long/tiny/full")


class Prepared:
    """`jobs.prepare`, whose answers are kept: what a process asks that was asked here before costs nothing there."""

    def __init__(self):
        self.known = {}

    def __call__(self, spec, process=ranks.ALONE):
        key = (spec, process.world)
        if key not in self.known:
            self.known[key] = jobs.prepare(spec, process)
        return self.known[key]

    def all(self, runs):
        return [self(spec) for spec in runs]


@contextmanager
def no_model(_):
    yield execute.LoadedModel(None, None, None)


class Answers(Measure):
    """Does nothing, but for telling that it was done."""

    sample = PredictedSample

    def run_batch(self, workload, batch):
        def answer(index):
            tell(done=(workload.data.dataset, index))
            row = {"pred": f"é {index} " * 40, "answers": ["a"], "all_classes": None, "length": index}
            return {"index": index, **row, "stats": measured(index)}

        return [answer(index) for index in batch]

    def summarize(self, stats):
        return {"samples": len(stats)}

    def describe(self, stats):
        return ""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny model and four rows each of two data sets."""
    folder = tmp_path_factory.mktemp("files")
    save_tiny(folder / "tiny")
    for dataset in ("samsum", "qasper"):
        save_rows(folder / "data", dataset, count=4)
    return folder


@pytest.fixture
def place(files, tmp_path, monkeypatch):
    """Where commands are run, which compute nothing; one folder for what is there before, one that is worked in."""
    prompts = [generate.Prompt(torch.zeros(20 - index, dtype=torch.long), {}) for index in range(4)]
    monkeypatch.setattr(execute, "load", no_model)
    monkeypatch.setattr(execute, "measure_of", lambda job: Answers())
    monkeypatch.setattr(LongBench, "encode", lambda self, tokenizer, data, total, *_: prompts[:total])
    monkeypatch.setattr(jobs, "versions", dict)
    monkeypatch.setattr(calibrate, "versions", dict)
    monkeypatch.setattr(paths, "home", lambda: tmp_path / "now")
    prepared = Prepared()
    monkeypatch.setattr(pred, "prepare", prepared)
    monkeypatch.setattr(calibrate, "prepare", prepared)
    monkeypatch.setattr(sweep, "prepare_all", prepared.all)
    monkeypatch.chdir(files)
    before = tmp_path / "before"
    before.mkdir()
    for name in ("tiny", "data"):
        (before / name).symlink_to(files / name)
    copy(before, tmp_path / "now")
    return tmp_path


def predicting(*flags, process=ranks.ALONE):
    """`pred.py`, for a process."""
    pred.prepare(read_flags([*COMMON, *flags]), process)

    def act():
        pred.ranks = lambda: process
        pred.main([*COMMON, *flags])

    return act


def on_disk(folder, dataset="samsum"):
    """Samples that a run's folder holds, in whole lines of any file."""
    files = [*folder.glob(f"{dataset}.partial*.jsonl"), folder / "samples" / f"{dataset}.jsonl"]
    lines = [line for path in files if path.exists() for line in path.read_bytes().split(b"\n")[:-1]]
    return {json.loads(line)["index"] for line in lines}


def starts(folder, dataset="samsum"):
    """`samples_done` of every start that `run.json` tells of."""
    if not (folder / "run.json").exists():
        return []
    found = json.loads((folder / "run.json").read_text())["datasets"].get(dataset, {"starts": []})
    return [one["samples_done"] for one in found["starts"]]


def same(now, whole):
    """Check that a folder holds what an uninterrupted run left, but for what tells of the starts, and of the lock."""
    found, expected = contents(now), contents(whole)
    assert set(found) == set(expected)
    for name, content in expected.items():
        if name.endswith("run.json"):
            manifests = [json.loads(one) for one in (content, found[name])]
            for manifest in manifests:
                for dataset in manifest["datasets"].values():
                    del dataset["starts"]
            assert manifests[0] == manifests[1]
        elif not name.endswith(".lock"):
            assert found[name] == content, name


def finished(place, act):
    """Do `act` uninterrupted, from what was there before; what it changed, and where what it left is."""
    copy(place / "before", place / "now")
    found = run(act, place / "now")
    assert not found.said, found.said
    (place / "now").rename(place / "whole")
    return found, place / "whole"


def interrupt_everywhere(place, act, check=lambda now, done: None, step=1):
    """Kill `act` before each of its changes, in turn, and do it again to its end.

    Args:
        check: is called after each kill, with the folder and the samples that were computed, and gives what is called
            with those that the start that follows computes.
        step: only every so manieth point.
    """
    found, whole = finished(place, act)
    assert len(found.changes) > 3
    for point in list(points(found.changes))[::step]:
        copy(place / "before", place / "now")
        killed = run(act, place / "now", point)
        assert killed.killed
        then = check(place / "now", killed.done)
        last = run(act, place / "now")
        assert not last.said, last.said
        same(place / "now", whole)
        if then is not None:
            then(last.done)


def truth(run_folder=RUN, dataset="samsum", total=4, keeps=True, processes=1):
    """For `interrupt_everywhere`: nothing that was computed is lost, only what was missing is computed, and `run.json`
    says how much was there.

    Args:
        keeps: whether what was there counts.
    """

    def check(now, computed):
        folder = now / run_folder
        there = on_disk(folder, dataset)
        # Each process may lose the one that it was about to write.
        assert len({one[1] for one in computed} - there) <= processes
        there, before = there if keeps else set(), starts(folder, dataset)
        whole = (folder / f"{dataset}.jsonl").exists() and not list(folder.glob(f"{dataset}.partial*"))

        def then(done):
            again = keeps and whole and len(there) == total
            assert sorted(done) == [(dataset, index) for index in range(total) if index not in there]
            expected = [len(there)] if not keeps else [*before, *([] if again else [len(there)])]
            assert starts(folder, dataset) == expected

        return then

    return check


def test_pred(place):
    interrupt_everywhere(place, predicting("--batch_size", "1"), check=truth())


def test_pred_that_is_killed_once_more(place):
    """The second kill comes when half of the work is there, also in a torn line."""
    act = predicting("--batch_size", "1")
    first = run(act, place / "now")
    torn = [index + 0.5 for index, what in enumerate(first.changes) if what.startswith("write")]
    copy(place / "before", place / "now")
    assert run(act, place / "now", torn[-4]).killed
    assert 0 < len(on_disk(place / "now" / RUN)) < 4
    copy(place / "now", place / "before")
    interrupt_everywhere(place, act, check=truth())


def test_pred_that_extends_a_finished_run(place):
    assert not run(predicting("--sample_num", "2"), place / "before").said
    (place / "before" / RUN / "result.json").write_text("{}")
    interrupt_everywhere(place, predicting("--sample_num", "4"), check=truth())


def test_pred_that_overwrites_other_settings(place):
    """What the old run wrote is gone, and nothing else."""
    flags = ["--datasets", "samsum,qasper", "--temperature", "1"]
    assert not run(predicting(*flags), place / "before").said
    (place / "before" / RUN / "mine.jsonl").write_text("mine")
    interrupt_everywhere(place, predicting("--overwrite"), check=truth(keeps=False))
    names = {path.name for path in (place / "now" / RUN).iterdir()}
    assert names == {".lock", "mine.jsonl", "run.json", "samples", "samsum.jsonl"}


@pytest.mark.parametrize(
    ("both", "again", "step"),
    [
        (False, 1, 1),
        (True, 2, 4),
        *(pytest.param(both, again, 1, marks=pytest.mark.slow) for both in (False, True) for again in (1, 2)),
    ],
)
def test_two_processes(place, both, again, step):
    """One of them is killed, and the other one with it or not; a start with one process or with two follows."""

    for processes in (1, 2):
        predicting("--batch_size", "1", process=ranks.Ranks(0, processes))

    def act(process):
        predicting("--batch_size", "1", process=process)()

    whole = run_pair(act, place / "now")
    assert not any(one.said for one in whole), whole
    (place / "now").rename(place / "whole")
    for rank, one in enumerate(whole):
        for point in list(points(one.changes))[::step]:
            copy(place / "before", place / "now")
            killed = run_pair(act, place / "now", rank, point, both)
            assert killed[rank].killed
            if not both and killed[1 - rank].said:
                assert killed[1 - rank].said.endswith("stops: another process of the run has ended")
            done = [index for found in killed for index in found.done]
            then = truth(processes=2)(place / "now", done)
            last = run_pair(act, place / "now") if again == 2 else [run(lambda: act(ranks.ALONE), place / "now")]
            assert not any(found.said for found in last), (point, last)
            then([index for found in last for index in found.done])
            found = contents(place / "now")
            for name in (RUN / "samsum.jsonl", RUN / "samples/samsum.jsonl"):
                assert found[str(name)] == (place / "whole" / name).read_bytes()
            assert set(found) == set(contents(place / "whole"))


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_sweep(place, step):
    (place / "before/grid.yaml").write_text(
        "{model: tiny, datasets: [samsum, qasper], data_dir: data, device: cpu, dtype: float32, batch_size: 4, "
        "ini_size: 0.3, KV_class3: 0.3}"
    )
    sweep.prepare_all(read_grid(place / "before/grid.yaml", []).runs)
    interrupt_everywhere(place, lambda: sweep.sweep(["grid.yaml"]), step=step)


def test_eval(place):
    make_run(place / "before/run", samples=2)
    (place / "before/run/result.json").write_text('{"samsum": 3.0}')
    interrupt_everywhere(place, lambda: evaluate.main(["run"]))


def test_report(place, monkeypatch):
    """The first report into a folder, and one that has fewer figures than the one before."""
    make_run(place / "before/run")
    made = {"index.html": b"page" * 9, "a.svg": b"figure", "b.csv": b""}
    monkeypatch.setattr(page, "files", lambda *_: made)
    act = lambda: report.report(["run", "--out", "some/report"])  # noqa: E731
    interrupt_everywhere(place, act)
    assert not run(act, place / "before").said
    made["index.html"] = b"other"
    del made["b.csv"]
    copy(place / "whole", place / "older")
    crash_points.shutil.rmtree(place / "whole")
    interrupt_everywhere(place, act)
    assert not (place / "now/some/report/b.csv").exists()


def test_calibrate(place, monkeypatch):
    def measure(job, samples, rows, shares, per_head):
        for index in samples.missing:
            tell(done=("curves", index))
            losses = [[[0.5] * 5] * 7] * len(shares)
            made = {"dataset": rows[index][0].dataset, "row": rows[index][1], "prompt_tokens": 9}
            samples.append([{"index": index, **made, "loss": losses, "stats": NoStats()}])

    monkeypatch.setattr(calibrate, "measure", measure)
    flags = [*COMMON, "--algorithm", "h2o", "--datasets", "samsum", "--sample_num", "3"]
    folder = Path("calibration/tiny/h2o")
    calibrate.prepare(calibrate.spec_of(calibrate.parser().parse_args(flags)))
    interrupt_everywhere(place, lambda: calibrate.calibrate(flags), check=truth(folder, "curves", total=3))


def test_helm_requests(place, monkeypatch):
    """What HELM's dry run needs and writes is gone afterwards, also that of a dry run that was killed."""

    def helm(_, *arguments):
        folder = helm_env.OUTPUT / "runs" / arguments[arguments.index("--suite") + 1] / "some"
        folder.mkdir(parents=True)
        request = {"model": "squeeze/requests", "prompt": "a", "temperature": 0.0, "top_p": 1.0, "max_tokens": 5}
        request |= {"num_completions": 1, "top_k_per_token": 1, "echo_prompt": False, "stop_sequences": []}
        states = [{"request": request, "num_train_instances": 5}]
        write_json(folder / "scenario_state.json", {"request_states": states})

    monkeypatch.setattr(helm_requests, "helm", helm)
    interrupt_everywhere(place, lambda: helm_requests.dry_run("xsum_local", Path("tiny"), 100, 2), step=2)
    assert not [name for name in contents(place / "now/helm") if "requests" in name]


def test_a_model_that_is_converted(place):
    """A folder of an older conversion is replaced by a whole one."""
    folder = Path("models/M")
    (place / "before" / folder).mkdir(parents=True)
    (place / "before" / folder / "old").write_text("old")

    def act():
        with embedded._replacing(folder) as work:
            for name in ("config.json", embedded.STAMP):
                write_whole(work / name, "{}")

    interrupt_everywhere(place, act)
    assert set(contents(place / "now/models")) == {"M", "M/config.json", f"M/{embedded.STAMP}"}
