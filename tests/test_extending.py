"""docs/extending.md: the very page's files and commands, on a tiny model."""

import json
import pickle
import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from conftest import ROOT, random_model
from tiny import save_rows, save_tiny

import eval
import pred
from squeeze import H2O, InputError, Squeeze, SqueezeConfig, calibrate, squeezed
from squeeze.benchmarks.longbench.data import generation_lengths
from squeeze.report import command as report
from squeeze.runs.flags import read_flags
from squeeze.runs.jobs import prepare_all
from squeeze.sweep import command as sweep

PAGE = (ROOT / "docs/extending.md").read_text("utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)
FILES = {text.split()[1]: text for _, text in BLOCKS if re.match(r"# \S+\.\w+\n", text)}
COMMANDS = [
    shlex.split(line)
    for language, text in BLOCKS
    if language == "bash"
    for line in text.replace("\\\n", " ").splitlines()
]
EVICTOR, ALLOCATION = "my_evictor:HeavyHitters(recent=16)", "my_allocation:FirstWhole(whole=2)"
EVICTOR_FOLDER, ALLOCATION_FOLDER = "my_evictor_HeavyHitters_recent=16", "my_allocation_FirstWhole_whole=2"
SETTINGS = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
PROMPT = torch.arange(3, 190)[None]
RUN = ["--model", "tiny", "--data_dir", "data", "--device", "cpu", "--dtype", "float32", "--enable_squeeze"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The page's files in a working directory that is not on the path, with a tiny model and two rows."""
    monkeypatch.setitem(generation_lengths(), "samsum", 6)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", ".")])
    for name in ("my_evictor", "my_allocation"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    save_tiny(tmp_path / "tiny")
    save_rows(tmp_path / "data", count=2, context="Ann: hey, did you get the tickets?\n" * 30)
    for name, text in FILES.items():
        (tmp_path / name).write_text(on_the_tiny_model(text))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("my_evictor", "my_allocation"):
        sys.modules.pop(name, None)


def on_the_tiny_model(text):
    return text.replace("SmolLM2-135M", "tiny").replace("data/longbench", "data")


def run_block(words):
    """Run a command of the page in this process."""
    words = [on_the_tiny_model(word) for word in words[1:]]
    if words[0] == "-m":
        mains = {
            "squeeze.sweep": sweep.sweep,
            "squeeze.report": report.report,
            "squeeze.calibrate": calibrate.calibrate,
        }
        more = ["--data_dir", "data", "--out", "curves.json"] if words[1] == "squeeze.calibrate" else []
        return mains[words[1]]([*words[2:], *more])
    return {"pred.py": pred.main, "eval.py": eval.main}[words[0]](words[1:])


def settings_of(folder):
    return json.loads(Path(folder, "run.json").read_text())["settings"]


def predictions(folder):
    return Path(folder, "samsum.jsonl").read_bytes()


def test_the_pages_commands(place, capsys):
    assert len(COMMANDS) == 6
    for words in COMMANDS:
        run_block(words)
    root = Path("pred_Long/tiny")
    runs = {str(path.parent.relative_to(root)) for path in root.rglob("samsum.jsonl") if path.parent.name != "samples"}
    own = {f"{EVICTOR_FOLDER}/0.2/20", f"h2o/{ALLOCATION_FOLDER}/0.2", f"{EVICTOR_FOLDER}/{ALLOCATION_FOLDER}/0.2"}
    assert runs == {"full", "0.2/20", f"{ALLOCATION_FOLDER}/0.2"} | own
    found = settings_of(root / EVICTOR_FOLDER / ALLOCATION_FOLDER / "0.2")
    assert found["algorithm"] == EVICTOR and found["algorithm_parameters"] == {"recent": 16}
    assert found["allocation"] == ALLOCATION and found["allocation_parameters"] == {"whole": 2}
    assert found["ini_size"] == 0.2 and "KV_class3" not in found and "start_size" not in found
    assert json.loads(Path(root / EVICTOR_FOLDER / "0.2/20/result.json").read_text()).keys() == {"samsum"}
    page = Path("report/index.html").read_text()
    assert EVICTOR in page and ALLOCATION in page
    assert all(re.fullmatch(r"[\w.-]+", path.name) for path in Path("report").iterdir())
    assert re.search(rf"\| {re.escape(EVICTOR)} +\| {re.escape(ALLOCATION)} ", capsys.readouterr().out)
    measured = json.loads(Path("curves.json").read_text())
    assert measured["algorithm"] == EVICTOR and measured["algorithm_parameters"] == {"recent": 16}


def test_the_evictor_is_h2o_where_its_window_is_half_of_the_budget(place, monkeypatch):
    monkeypatch.syspath_prepend(place)
    from my_evictor import HeavyHitters

    model = random_model("llama")
    budgets = [40] * 5
    with squeezed(model, SqueezeConfig("h2o", budgets=budgets)):
        expected = model.generate(PROMPT, **SETTINGS)
    for algorithm in (HeavyHitters(20), "my_evictor:HeavyHitters(recent=20)"):
        with squeezed(model, SqueezeConfig(algorithm, budgets=budgets)):
            assert torch.equal(model.generate(PROMPT, **SETTINGS), expected)
    with squeezed(model, SqueezeConfig(HeavyHitters(39), budgets=budgets)):
        assert not torch.equal(model.generate(PROMPT, **SETTINGS), expected)
    with (
        pytest.raises(InputError, match=r"at least 42 tokens for my_evictor:HeavyHitters\(recent=41\), got 40"),
        squeezed(model, SqueezeConfig(HeavyHitters(41), budgets=budgets)),
    ):
        pass


def test_the_pages_python(place, monkeypatch):
    monkeypatch.syspath_prepend(place)
    [block] = [text for language, text in BLOCKS if language == "python" and text not in FILES.values()]
    seen = {"model": random_model("llama"), "inputs": {"input_ids": PROMPT}}
    exec(block, seen)
    expected = [187, *[(2 * 187 - 187) / 4] * 4]
    budgets = seen["run"].budgets[0].tolist()
    assert sum(budgets) == 2 * 187
    assert all(abs(tokens - share) < 1 for tokens, share in zip(budgets, expected, strict=True))
    assert seen["tokens"].shape == (1, 187 + 8)


def test_a_package_that_registers_them(place, monkeypatch):
    [block] = [text for language, text in BLOCKS if language == "toml"]
    points = tomllib.loads(block)["project"]["entry-points"]
    installed = place / "installed"
    (installed / "mine-1.0.dist-info").mkdir(parents=True)
    (installed / "mine-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    lines = [
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in some.items())
        for group, some in points.items()
    ]
    (installed / "mine-1.0.dist-info/entry_points.txt").write_text("\n".join(lines))
    with pytest.raises(
        InputError, match=r"--algorithm must be one of sliding_window, streaming, .*, got heavy_hitters"
    ):
        pred.main([*RUN, "--ini_size", "0.3", "--KV_class3", "0.3", "--algorithm", "heavy_hitters"])
    monkeypatch.syspath_prepend(installed)
    for algorithm, allocation in (
        ("heavy_hitters( recent = 16 )", "first_whole"),
        (EVICTOR, "my_allocation:FirstWhole"),
    ):
        pred.main([*RUN, "--ini_size", "0.3", "--algorithm", algorithm, "--allocation", allocation])
    named, spelled = "heavy_hitters_recent=16/first_whole/0.3", f"{EVICTOR_FOLDER}/my_allocation_FirstWhole/0.3"
    assert predictions(f"pred_Long/tiny/{named}") == predictions(f"pred_Long/tiny/{spelled}")
    found = settings_of(f"pred_Long/tiny/{named}")
    assert found["algorithm"] == "heavy_hitters(recent=16)" and found["allocation_parameters"] == {"whole": 1}
    with pytest.raises(InputError, match="got heavy_hiters: did you mean heavy_hitters"):
        SqueezeConfig("heavy_hiters", 0.3, 0.3)
    Path("grid.yaml").write_text(
        "{model: tiny, data_dir: data, device: cpu, dtype: float32, ini_size: 0.3, "
        "algorithm: heavy_hitters(recent=16), allocation: first_whole}"
    )
    before = Path(f"pred_Long/tiny/{named}/run.json").read_bytes()
    sweep.sweep(["grid.yaml"])
    assert Path(f"pred_Long/tiny/{named}/run.json").read_bytes() == before, "done already"
    assert report.main(["pred_Long", "--out", "report"]) == 0
    assert "heavy_hitters(recent=16)" in Path("report/runs.csv").read_text()


def test_a_default_that_changes_is_another_run(place):
    flags = [*RUN, "--ini_size", "0.3", "--allocation", "my_allocation:FirstWhole"]
    pred.main(flags)
    source = Path("my_allocation.py").read_text()
    Path("my_allocation.py").write_text(source.replace("whole: int = 1", "whole: int = 2"))
    del sys.modules["my_allocation"]
    with pytest.raises(InputError, match=r'holds a run with allocation_parameters \{"whole": 1\}'):
        pred.main(flags)


def test_a_configuration_travels_by_its_names(place):
    """A Ray worker makes the strategies itself, and the process that asked need not import them to read its answer."""
    [job] = prepare_all([read_flags([*RUN, "--ini_size", "0.3", "--algorithm", EVICTOR, "--allocation", ALLOCATION])])
    assert job.config.evictor.recent == 16
    sent = pickle.dumps(job)
    for name in ("my_evictor", "my_allocation"):
        del sys.modules[name]
    back = pickle.loads(sent)
    assert back.config == job.config and not {"my_evictor", "my_allocation"} & set(sys.modules)
    assert str(back.config.evictor) == EVICTOR and back.config.allocator.whole == 2


def test_objects_are_what_names_are():
    model = random_model("llama")
    with squeezed(model, SqueezeConfig("h2o", "0.3", "0.1")) as run:
        expected, budgets = model.generate(PROMPT, **SETTINGS), run.budgets.tolist()
    with squeezed(model, H2O(), Squeeze(0.3, class3="0.1"), attn="eager") as run:
        assert torch.equal(model.generate(PROMPT, **SETTINGS), expected)
        assert run.budgets.tolist() == budgets and set(run.classes[0]) <= {1, 2, 3}
        assert run.config.attn == "eager"
    for given, said in (
        ((H2O(),), "the allocation is missing"),
        ((SqueezeConfig("h2o", 1, 1), Squeeze(0.3, 0.1)), "a SqueezeConfig says everything"),
        ((H2O, Squeeze(0.3, 0.1)), "algorithm must be a name or an Evictor"),
        ((H2O(), Squeeze), "allocation must be a name or an Allocation"),
    ):
        with pytest.raises(InputError, match=said), squeezed(model, *given):
            pass
