"""The packages that the project works with; checked before anything of them is imported, since names in them move."""

from __future__ import annotations

import importlib.util
import traceback
from importlib.metadata import version

from squeeze.storage.paths import in_checkout

TESTED_TRANSFORMERS = ("5.23.0",)

#: Top-level modules → the extra of pyproject.toml that installs them; the others come with the package itself.
EXTRAS = {"helm": "helm", "ray": "ray"} | dict.fromkeys(("itables", "jinja2", "matplotlib", "pandas"), "report")


class UntestedVersion(ImportError):
    """A package is installed in a version that nobody tried; the message is one sentence."""


def check_transformers() -> str:
    """The installed version of transformers; UntestedVersion if it is not one that the patch was tested with."""
    installed = version("transformers")
    if installed not in TESTED_TRANSFORMERS:
        tested = " or ".join(TESTED_TRANSFORMERS)
        raise UntestedVersion(
            f"transformers {installed} is installed, and the patch was tested with {tested}: "
            f"pip install transformers=={TESTED_TRANSFORMERS[-1]}"
        )
    return installed


def install(module: str, requirements: str = "requirements.txt") -> str:
    """The command that installs a module: in a checkout from pinned requirements, elsewhere with the package."""
    extra = f"[{EXTRAS[module]}]" if module in EXTRAS else ""
    return f"pip install -r {requirements}" if in_checkout() else f"pip install 'squeeze-kv{extra}'"


def missing_package(error: ModuleNotFoundError) -> str | None:
    """A sentence about a package that is not installed, and what wants it; None if one is there and lacks a part."""
    name = (error.name or "").partition(".")[0]
    if not name or importlib.util.find_spec(name) is not None:
        return None
    wanted = traceback.extract_tb(error.__traceback__)[-1]
    return (
        f"the package {name} is not installed, which {wanted.filename} line {wanted.lineno} imports: {install(name)}"
    )
