"""Which packages the project works with; asked before anything of them is imported, since names in them move."""

import importlib.util
import traceback
from importlib.metadata import version

TESTED_TRANSFORMERS = ("5.23.0",)


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


def missing_package(error: ModuleNotFoundError) -> str | None:
    """A sentence about a package that is not installed, and what wants it; None if one is there and lacks a part."""
    name = (error.name or "").partition(".")[0]
    if not name or importlib.util.find_spec(name) is not None:
        return None
    wanted = traceback.extract_tb(error.__traceback__)[-1]
    return (
        f"the package {name} is not installed, which {wanted.filename} line {wanted.lineno} imports: "
        "pip install -r requirements.txt"
    )
