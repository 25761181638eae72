"""The oldest and the newest transformers that are supported: the probe's and the engine's tests, with each of them."""

import subprocess
import sys
import sysconfig

import pytest
from conftest import ROOT

from squeeze.compatibility import TESTED_TRANSFORMERS

#: What runs there, and how long at most, in seconds.
TESTS = ("tests/engine/test_engine.py", "tests/engine/test_patch.py", "tests/engine/test_families_everywhere.py")
LIMIT = 1200


@pytest.fixture
def environment(tmp_path):
    """Makes an environment with one release, and what it needs in other versions than this one has; its Python."""

    def make(release):
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
        python = tmp_path / "venv/bin/python"
        # All else is this environment's: packages of the new one come before it.
        [packages] = (tmp_path / "venv/lib").glob("python*/site-packages")
        (packages / "shared.pth").write_text(sysconfig.get_path("purelib"))
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--disable-pip-version-check"]
        subprocess.run([*pip, f"transformers=={release}"], check=True, timeout=LIMIT)
        return python

    return make
