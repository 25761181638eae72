"""A sweep gives what its runs give one by one, prefills once what they share, and survives being killed."""

import json
import multiprocessing
import random
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import random_model
from tiny import save_rows, save_tiny

import pred
from squeeze import InputError, SqueezeConfig, squeezed
from squeeze.benchmarks import fidelity
from squeeze.benchmarks.longbench.data import generation_lengths
from squeeze.cli.run import run_command
from squeeze.engine import patch, prefill_attention
from squeeze.models import loading
from squeeze.sweep import command as sweep

GRID = """
model: tiny
datasets: [samsum, qasper]
data_dir: data
device: cpu
dtype: float32
batch_size: 2
algorithm: [streaming, h2o]
ini_size: 0.3
KV_class3: [0.4x]
fidelity: [false, true]
"""
SMALL = """
{model: tiny, datasets: qasper, data_dir: data, device: cpu, dtype: float32, ini_size: 0.3, KV_class3: [0.4x]}
"""
COMMON = ["--model", "tiny", "--data_dir", "data", "--device", "cpu"]
POINTS = {"full", "0.3/30", "0.3/12", "h2o/0.3/30", "h2o/0.3/12"}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A tiny model, five rows of one data set and three of another; 16 tokens are generated for each."""
    for dataset in ("samsum", "qasper"):
        monkeypatch.setitem(generation_lengths(), dataset, 16)
    save_tiny(tmp_path / "tiny")
    save_rows(tmp_path / "data", count=5)
    save_rows(tmp_path / "data", dataset="qasper", count=3)
    (tmp_path / "grid.yaml").write_text(GRID, encoding="utf-8")
    (tmp_path / "small.yaml").write_text(SMALL, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def published(root="pred_Long"):
    """The bytes of all files of predictions."""
    found = {path.relative_to(root): path.read_bytes() for path in Path(root).rglob("*.jsonl")}
    return {str(path): content for path, content in found.items() if path.parent.name != "samples"}


def samples(path):
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]


def test_a_sweep_gives_what_its_runs_give_one_by_one(place, capsys):
    sweep.sweep(["grid.yaml", "--together", "1"])
    said = capsys.readouterr().out
    assert "python -m squeeze.report pred_Long --out report" in said
    together = published()
    folders = {f"tiny/{point}" for point in POINTS} | {f"tiny/{point}/fidelity" for point in POINTS - {"full"}}
    assert set(together) == {f"{folder}/{dataset}.jsonl" for folder in folders for dataset in ("samsum", "qasper")}
    assert said.count("samples, ") == 18
    commands = []
    for folder in sorted(folders):
        manifest = json.loads(Path("pred_Long", folder, "run.json").read_text("utf-8"))
        commands.append(manifest["datasets"]["samsum"]["starts"][0]["command"])
    Path("pred_Long").rename("swept")
    for command in commands:
        assert command.startswith("python pred.py --model tiny")
        pred.main(command.split()[2:])
    assert published() == together
    measured = "samples/qasper.jsonl"
    for folder in sorted(folders):  # also what was measured is the same, but for time
        for ours, alone in zip(
            samples(Path("swept", folder, measured)), samples(Path("pred_Long", folder, measured)), strict=True
        ):
            timed = {key for key in alone["stats"] if "seconds" in key or key == "peak_memory_bytes"}
            assert {key: ours["stats"][key] for key in ours["stats"].keys() - timed} == {
                key: alone["stats"][key] for key in alone["stats"].keys() - timed
            }


def test_prompts_are_prefilled_once_for_all_that_share_them(place, monkeypatch):
    """Two ways of prefilling, with scores for H2O and without, however many runs there are."""
    monkeypatch.setattr(patch, "self_check", lambda *_: None)  # which would do the same on a few tokens
    calls, original = [], prefill_attention.prefill
    monkeypatch.setattr(
        prefill_attention, "prefill", lambda *a, **k: calls.append(k["observed"] is None) or original(*a, **k)
    )
    sweep.sweep(["grid.yaml"])
    layers, batches = 5, 3 + 2
    assert calls.count(True) == calls.count(False) == layers * batches
    stats = [samples(f"pred_Long/tiny/{point}/samples/samsum.jsonl")[0]["stats"] for point in ("0.3/30", "0.3/12")]
    assert all(one["prefill_seconds"] > 0 for one in stats), "a run that took a prefill over says what it cost"


def test_comparisons_that_go_on_give_what_they_would_have_given(place, monkeypatch):
    """Prompts one at a time: what shares a prefill and an evictor is compared together, also where most is there."""
    calls, original = [], fidelity.compare
    monkeypatch.setattr(fidelity, "compare", lambda *args: calls.append(len(args[1])) or original(*args))
    grid = ["grid.yaml", "batch_size=1", "datasets=qasper", "fidelity=true"]
    sweep.sweep(grid)
    assert calls == [2] * 3 * 2, "uniform and squeezed, for each prompt and evictor"
    whole = published()
    shutil.rmtree("pred_Long/tiny/h2o/0.3/12")
    half = Path("pred_Long/tiny/0.3/30/fidelity")
    lines = (half / "samples/qasper.jsonl").read_text().splitlines(keepends=True)
    shutil.rmtree(half / "samples")
    (half / "qasper.jsonl").unlink()
    (half / "qasper.partial.jsonl").write_text(lines[1])
    calls.clear()
    sweep.sweep(grid)
    assert calls == [2] * (3 + 2)
    assert published() == whole


@pytest.mark.parametrize(("batch_size", "most"), [(1, 8), (2, 4)])
def test_predictions_of_runs_in_one_batch_are_those_of_runs_alone(place, batch_size, most):
    """With budgets of their own, sampled or greedy, on the whole prompt or on its context."""
    grid = [
        "grid.yaml",
        f"batch_size={batch_size}",
        "ini_size=[0.3, 0.5]",
        "allocation=[squeeze, pyramid, cake]",
        "fidelity=false",
    ]
    lone = "datasets=qasper", "--together", "1"
    for number, more in enumerate(([], ["compress=context"], ["temperature=1"])):
        found = []
        for flags in ((), ("--together", "3"), lone[1:]):
            sweep.sweep([*grid, "datasets=qasper", *more, *flags])
            found.append(published())
            manifests = list(Path("pred_Long").rglob("run.json"))
            starts = [json.loads(path.read_text("utf-8"))["datasets"]["qasper"]["starts"][0] for path in manifests]
            together = sorted(start["together"] for start in starts)
            sizes = {(): [most] * 16, lone[1:]: [1] * 16}.get(flags, [2] * 4 + [3] * 12)
            assert together == [1, *sizes]
            Path("pred_Long").rename(f"{number}-{len(found)}")
        assert found[0] == found[1] == found[2]
        assert len(set(found[0].values())) > 6, "budgets make a difference"


def test_what_cannot_go_into_one_batch_goes_alone(place):
    """Allocations that look at the attention of other queries; loss curves of a prompt, which take time."""
    grid = ["grid.yaml", "batch_size=1", "datasets=qasper", "fidelity=true", "algorithm=[h2o]", "KV_class3=[]"]
    grid += ["allocation=[cake, 'cake(window=8)', measured]"]
    found = []
    for flags, expected in (((), [1, 1, 2, 2]), (("--together", "1"), [1] * 4)):
        sweep.sweep([*grid, *flags])
        found.append(published())
        starts = [json.loads(path.read_text())["datasets"]["qasper"]["starts"] for path in Path().rglob("run.json")]
        assert sorted(start[0]["together"] for start in starts) == expected
        shutil.rmtree("pred_Long")
    assert len(set(found[0].values())) == 4, "budgets make a difference"
    for one, other in zip(found[0].values(), found[1].values(), strict=True):
        assert [row["kl"] for row in map(json.loads, one.splitlines())] == pytest.approx(
            [row["kl"] for row in map(json.loads, other.splitlines())], rel=1e-4
        )


def test_runs_of_other_seeds_sample_and_make_their_own(place):
    sweep.sweep(["grid.yaml", "datasets=qasper", "fidelity=false", "temperature=1", "seed=[1, 2]", "algorithm=[h2o]"])
    together = published()
    ruler = [
        "grid.yaml",
        "datasets=niah_single_1",
        "lengths=900",
        "sample_num=1",
        "fidelity=false",
        "seed=[1, 2]",
        "pred=ruler",
    ]
    sweep.sweep([*ruler, "algorithm=[h2o]", "data_dir="])
    made = published("pred_ruler")
    assert together["tiny/seed-1/full/qasper.jsonl"] != together["tiny/seed-2/full/qasper.jsonl"]
    alone = ["--temperature", "1", "--seed", "2", "--datasets", "qasper", "--dtype", "float32", "--batch_size", "2"]
    pred.main([*COMMON, *alone, "--overwrite"])
    assert published() == together
    assert made["tiny/seed-1/full/niah_single_1_900.jsonl"] != made["tiny/seed-2/full/niah_single_1_900.jsonl"]


def test_what_does_not_fit_into_memory_together_goes_in_parts(place, monkeypatch, capsys):
    tried, original = [], fidelity.compare

    def short(*args):
        tried.append(len(args[1]))
        if tried[-1] > 2:
            raise MemoryError
        return original(*args)

    grid = ["grid.yaml", "batch_size=1", "datasets=qasper", "fidelity=true", "algorithm=[h2o]"]
    grid += ["ini_size=[0.2, 0.3, 0.5]"]
    sweep.sweep(grid)
    whole = published()
    Path("pred_Long").rename("whole")
    monkeypatch.setattr(fidelity, "compare", short)
    sweep.sweep(grid)
    prompts, rest = 3, [1] * 5
    assert tried == [6, 3, 1, *rest] + [1, *rest] * (prompts - 1)
    assert "out of memory with several runs at a time; going on with 3" in capsys.readouterr().out
    assert published().keys() == whole.keys()


def test_runs_that_are_there_are_not_run_again(place, monkeypatch, capsys):
    flags = ["--dtype", "float32", "--batch_size", "2", "--datasets", "samsum", "--enable_squeeze"]
    pred.main([*COMMON, *flags, "--ini_size", "0.3", "--KV_class3", "0.12"])
    by_hand = Path("pred_Long/tiny/0.3/12/samples/samsum.jsonl").read_bytes()
    sweep.sweep(["grid.yaml"])
    assert Path("pred_Long/tiny/0.3/12/samples/samsum.jsonl").read_bytes() == by_hand
    monkeypatch.setattr(loading, "load", lambda *_: pytest.fail("there is nothing to do"))
    before = published()
    capsys.readouterr()
    sweep.sweep(["grid.yaml"])
    assert published() == before
    Path("pred_Long/tiny/h2o/0.3/12/fidelity/qasper.jsonl").unlink()  # published again from what is known
    sweep.sweep(["grid.yaml"])
    assert published() == before


def test_what_is_changed_may_stand_anywhere(place, capsys):
    (place / "other.yaml").write_text(SMALL.replace("tiny", "nowhere"), encoding="utf-8")
    plans = []
    for argv in (
        "other.yaml model=tiny --dry_run",
        "other.yaml --dry_run model=tiny",
        "--dry_run other.yaml model=tiny",
    ):
        sweep.sweep(argv.split())
        plans.append(capsys.readouterr().out)
    assert len(set(plans)) == 1 and "3 points" in plans[0]


def test_many_problems_are_counted(place, capsys):
    sizes = ", ".join(f"1.{number}" for number in range(1, 60))
    (place / "wrong.yaml").write_text(SMALL.replace("0.3,", f"[0.3, {sizes}],"), encoding="utf-8")
    with pytest.raises(InputError) as error:
        sweep.sweep(["wrong.yaml", "--dry_run"])
    assert str(error.value).endswith("; and 34 more") and len(str(error.value)) < 2000
    assert capsys.readouterr().out.count("left out: ") == 21


def test_the_plan_counts_what_is_missing_and_writes_nothing(place, capsys):
    sweep.sweep(["grid.yaml", "--dry_run"])
    said = capsys.readouterr().out
    assert not Path("pred_Long").exists()
    rows = {line.split("|")[1].strip() + ":" + line.split("|")[2].strip(): line for line in said.splitlines()[2:-2]}
    assert len(rows) == 18
    tokenizer = loading.load_tokenizer(place / "tiny")
    tokens = {}
    for dataset in ("samsum", "qasper"):
        from squeeze.benchmarks.longbench.data import build_prompt
        from squeeze.benchmarks.longbench.prompts import encode_prompt

        found = [json.loads(line) for line in Path(f"data/{dataset}.jsonl").read_text("utf-8").splitlines()]
        tokens[dataset] = [
            len(encode_prompt(tokenizer, dataset, build_prompt(dataset, row), 3584, "tiny")) for row in found
        ]
    cells = [cell.strip() for cell in rows["pred_Long/tiny/0.3/12:samsum"].split("|")]
    longest = max(tokens["samsum"])
    token = 2 * 5 * 2 * 8 * 4
    kept = 2 * token * -(-3 * longest // 10) / 1e6
    expected = ["5", "5", f"{sum(tokens['samsum']):,}", "80", f"{kept:.1f}", f"{2 * longest * token / 1e6:.1f}"]
    assert cells[3:9] == expected
    once = sum(map(sum, tokens.values()))
    points, each = 18, 16 * 8
    # The full cache prefills alone, for its run and for the answers to compare with, and the others in two ways.
    assert f"18 points with 72 samples to do: {(5 + 2 * 4) * once:,} prompt tokens" in said
    assert f"of which {(1 + 1 + 2) * once:,} are prefilled" in said and f"{points // 2 * each:,} new tokens" in said
    sweep.sweep(["grid.yaml"])
    capsys.readouterr()
    sweep.sweep(["grid.yaml", "--dry_run"])
    assert "18 points with 0 samples to do: 0 prompt tokens, of which 0 are prefilled" in capsys.readouterr().out


def test_the_plan_counts_the_tokens_that_measure_loss_curves(place, capsys):
    """Of 5 layers, or of their 2 KV heads each: four cuts of each one, and one of none."""
    plans = {}
    for per in ("layer", "head"):
        argv = [
            "grid.yaml",
            "allocation=[measured]",
            "KV_class3=[]",
            "datasets=[qasper]",
            f"per={per}",
            "fidelity=false",
        ]
        sweep.sweep([*argv, "algorithm=[streaming]", "ini_size=[0.3]", "--dry_run"])
        plans[per] = capsys.readouterr().out
    counted = {per: re.search(r"loss curves on the prompts, ([\d,]+) more", plan) for per, plan in plans.items()}
    layer, head = (int(counted[per][1].replace(",", "")) for per in ("layer", "head"))
    samples = 3
    assert head - layer == samples * 48 * 4 * (10 - 5)


def test_what_cannot_be_is_named_and_the_rest_is_done(place, capsys):
    Path("small.yaml").write_text(SMALL.replace("[0.4x]", "[0.4x, 0.35]"), encoding="utf-8")
    pred.main([*COMMON, "--dtype", "bfloat16", "--datasets", "qasper"])
    capsys.readouterr()
    assert run_command(lambda _: sweep.sweep(["small.yaml"])) == 2
    said = capsys.readouterr()
    assert said.out.startswith(
        "left out: KV_class3 0.35 is more than ini_size 0.3\nleft out: pred_Long/tiny/full holds a"
    )
    assert "error: not all runs of small.yaml are possible: pred_Long/tiny/full holds a run with dtype" in said.err
    assert "--overwrite replaces it" in said.err and "Traceback" not in said.err
    assert len(published()) == 2 + 1


def test_another_process_in_a_folder_is_named(place, capsys):
    import fcntl

    folder = Path("pred_Long/tiny/full")
    folder.mkdir(parents=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="full is being written by another process: wait for it, or end it"):
            sweep.sweep(["small.yaml"])
    sweep.sweep(["small.yaml"])
    assert len(published()) == 3


@pytest.mark.parametrize(
    "flags, said",
    [
        (["none.yaml"], r"none\.yaml"),
        (["grid.yaml", "--engine", "spark"], "--engine must be local or ray, got spark"),
        (["grid.yaml", "--address", "auto"], "--address is for --engine ray"),
        (["grid.yaml", "--num_gpus", "1"], "--num_gpus is for --engine ray"),
        ([], "the following arguments are required: FILE"),
    ],
)
def test_bad_flags_are_a_sentence(place, flags, said):
    with pytest.raises(InputError, match=said):
        sweep.sweep(flags)


def test_a_grid_of_which_nothing_is_possible_is_one_sentence(place):
    Path("small.yaml").write_text(SMALL.replace("model: tiny", "model: none"), encoding="utf-8")
    with pytest.raises(InputError, match="no run of the grid is possible: ") as error:
        sweep.sweep(["small.yaml"])
    assert str(error.value).count("none") < 4, "the same reason is given once"


def test_two_names_of_one_folder_are_named(place):
    text = SMALL.replace("model: tiny", f"model: [tiny, {place / 'tiny'}]")
    Path("small.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match="would be the folder of two runs"):
        sweep.sweep(["small.yaml"])
    assert len(published()) == 3


def test_a_squeezed_model_keeps_its_way_of_compiling(place):
    config = SqueezeConfig(ini_size=0.3, kv_class3=0.3)
    with (
        squeezed(random_model("llama"), config) as run,
        pytest.raises(ValueError, match="compiling is decided on when the model is squeezed"),
    ):
        run.use(replace(config, compile=True))


def sweep_in(folder):
    """A whole sweep, for a process of its own; longer answers, so that there is time to be killed."""
    import os

    import torch

    torch.set_num_threads(1)
    os.chdir(folder)
    for dataset in ("samsum", "qasper"):
        generation_lengths()[dataset] = 24
    sweep.sweep(["grid.yaml"])


@pytest.fixture(scope="module")
def forks():
    """Processes that start with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["squeeze.benchmarks.completions", "squeeze.benchmarks.fidelity", "test_sweep"])
    first = context.Process(target=time.sleep, args=(0,))  # starts the server, here: the model `tiny` is also a module
    first.start()
    first.join()
    return context


@pytest.mark.slow
def test_a_sweep_that_is_killed_again_and_again_ends_in_the_same_bytes(forks, place):
    Path("grid.yaml").write_text(GRID.replace("datasets: [samsum, qasper]", "datasets: samsum"), encoding="utf-8")

    def start():
        process = forks.Process(target=sweep_in, args=(str(place),))
        process.start()
        return process

    start().join()
    expected = published()
    assert len(expected) == 9
    Path("pred_Long").rename("whole-0")
    began = time.perf_counter()
    start().join()
    whole = time.perf_counter() - began
    assert published() == expected
    Path("pred_Long").rename("whole-1")
    rng = random.Random(5)
    killed = rounds = 0
    while killed < 4:
        for _ in range(4):
            process = start()
            process.join(whole * rng.uniform(0.05, 0.6))
            if process.exitcode is not None:
                break
            killed += 1
            process.kill()
            process.join()
        process = start()
        process.join()
        assert process.exitcode == 0
        assert published() == expected
        assert not list(Path("pred_Long").rglob("*partial*"))
        rounds += 1
        Path("pred_Long").rename(f"killed-{rounds}")


@pytest.mark.parametrize(
    "arguments",
    [
        ["s.yaml", "model=tiny", "--dry_run"],
        ["--dry_run", "model=tiny", "s.yaml"],
        ["model=tiny", "s.yaml", "--dry_run", "ini_size=0.4"],
        ["s.yaml", "--dry_run", "model=tiny"],
    ],
)
def test_arguments_in_any_order(arguments):
    args = sweep.read_arguments(arguments)
    assert (args.grid, args.dry_run) == (Path("s.yaml"), True)
    assert args.changes == [one for one in arguments if "=" in one]


def test_a_sweep_has_one_file():
    for wrong in (["model=tiny"], ["a.yaml", "b.yaml"], ["x" * 5000]):
        with pytest.raises(InputError, match="a sweep"):
            sweep.read_arguments(wrong)
