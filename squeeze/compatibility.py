"""The packages that the project works with; checked before anything of them is imported, since names in them move."""

from __future__ import annotations

import functools
import importlib.util
import re
import traceback
from importlib.metadata import version

from squeeze.storage.paths import in_checkout

#: The oldest and the newest release that the tests ran with (tests/engine/test_transformers_range.py). Whether those
#: between and after them do what is needed, each model is asked when it is loaded (squeeze/engine/self_check.py).
TESTED_TRANSFORMERS = ("5.0.0", "5.24.0")

#: Top-level modules → the extra of pyproject.toml that installs them; the others come with the package itself.
EXTRAS = {"helm": "helm", "ray": "ray"} | dict.fromkeys(("itables", "jinja2", "matplotlib", "pandas"), "report")


class UntestedVersion(ImportError):
    """A package is installed in a version that lacks what is needed of it; the message is one sentence."""


def check_transformers() -> str:
    """The installed version of transformers; UntestedVersion if it lacks the interfaces that squeezing goes by."""
    installed = version("transformers")
    if not _release(TESTED_TRANSFORMERS[0]) <= _release(installed) < (6, 0):
        raise UntestedVersion(
            f"transformers {installed} is installed, and models are squeezed by interfaces of transformers "
            f"{TESTED_TRANSFORMERS[0]} to {TESTED_TRANSFORMERS[1]}: pip install transformers=={TESTED_TRANSFORMERS[1]}"
        )
    return installed


@functools.cache
def cache_argument() -> str:
    """What models, `generate` and outputs call a cache: `cache` since transformers 5.24, before it `past_key_values`.

    A model still takes the old name, with a warning, and passes the cache on by the new one.
    """
    return "cache" if _release(version("transformers")) >= (5, 24) else "past_key_values"


def _release(text: str) -> tuple[int, int]:
    """The first two numbers of a version."""
    major, minor = re.findall(r"\d+", text)[:2]
    return int(major), int(minor)


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
