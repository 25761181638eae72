"""Paths of the project's own files, in a checkout and where the package is installed without one."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path

#: The folder that holds this package: a checkout's top, or an environment's `site-packages`.
ROOT = Path(__file__).resolve().parents[2]


def in_checkout() -> bool:
    """Whether this package is run from a checkout."""
    return (ROOT / "script/setup.sh").is_file()


def home() -> Path:
    """The folder whose `models/` and `config/` the commands write into: the checkout, else the working directory."""
    return ROOT if in_checkout() else Path.cwd()


def shipped(name: str) -> Path:
    """A file or folder of a checkout that the wheel holds as well (setup.py): of `config/` or `data/longbench`."""
    return ROOT / name if in_checkout() else Path(str(files("squeeze") / "shipped" / name))


def config_file(name: str, to_write: bool = False) -> Path:
    """A file of `config/`: the working directory's, else the checkout's, else the installed one.

    Args:
        name: such as `model2path.json`.
        to_write: leave the installed one alone.
    Returns:
        The first that is there; where there is none, the path of one to make.
    """
    own = [folder / "config" / name for folder in (Path.cwd(), home())]
    for path in own if to_write else [*own, shipped(f"config/{name}")]:
        if os.path.lexists(path):
            return path
    return own[-1]
