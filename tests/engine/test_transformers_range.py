"""The oldest and the newest transformers that are supported: the probe's and the engine's tests, with each of them."""

import os
import subprocess
import sys
import sysconfig

import pytest
from conftest import ROOT

from squeeze.compatibility import TESTED_TRANSFORMERS, UntestedVersion, cache_argument, check_transformers

#: What runs with each: every method on some families, whole; and what the engine promises beside numbers.
FAMILIES = (
    "llama",
    "mistral (window)",
    "gemma3_text",
    "gpt_oss",
    "gpt2",
    "deepseek_v3",
    "falcon",
    "stablelm",
    "jamba",
)
TESTS = (
    *(f"tests/models_table/test_families.py::test_a_family_computes_what_it_should[{name}]" for name in FAMILIES),
    *("tests/models_table/test_reference.py", "tests/engine/test_attention.py", "tests/engine/test_rotation.py"),
    "tests/engine/test_patch.py",
)


@pytest.fixture
def python_with(tmp_path):
    """Makes an environment with one release, and with what that needs in other versions than are here; its Python."""

    def make(release):
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
        python = tmp_path / "venv/bin/python"
        # All else is this environment's, whose packages come after its own: to install torch again takes minutes.
        [packages] = (tmp_path / "venv/lib").glob("python*/site-packages")
        (packages / "shared.pth").write_text(sysconfig.get_path("purelib"))
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--disable-pip-version-check"]
        subprocess.run([*pip, f"transformers=={release}"], check=True, stderr=subprocess.PIPE)
        return python

    return make


@pytest.mark.slow
@pytest.mark.parametrize("release", TESTED_TRANSFORMERS)
def test_the_probe_and_the_engine_with(release, python_with):
    python = python_with(release)
    shown = subprocess.run(
        [python, "-c", "from squeeze.compatibility import check_transformers; print(check_transformers())"],
        **{"cwd": ROOT, "capture_output": True, "text": True, "check": True},
    )
    assert shown.stdout.strip() == release
    done = subprocess.run(
        [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS],
        **{"cwd": ROOT, "capture_output": True, "text": True, "env": os.environ | {"HF_HUB_OFFLINE": "1"}},
    )
    assert done.returncode == 0, done.stdout[-5000:]


@pytest.mark.parametrize(
    ("installed", "name"),
    [("5.0.0", "past_key_values"), ("5.23.4.dev0", "past_key_values"), ("5.24.0rc1", "cache"), ("5.30", "cache")],
)
def test_releases_of_5_are_taken(installed, name, monkeypatch):
    monkeypatch.setattr("squeeze.compatibility.version", lambda package: installed)
    assert check_transformers() == installed
    assert cache_argument.__wrapped__() == name


@pytest.mark.parametrize("installed", ["4.57.6", "6.0.0", "6.0.0.dev0"])
def test_others_are_refused_in_a_sentence(installed, monkeypatch):
    monkeypatch.setattr("squeeze.compatibility.version", lambda package: installed)
    with pytest.raises(UntestedVersion, match=f"^transformers {installed} is installed, .* 5.0.0 to 5.24.0: pip "):
        check_transformers()
