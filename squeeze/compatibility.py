"""Which transformers the patch works with; asked before anything of it is imported, since its names move."""

from importlib.metadata import version

TESTED_TRANSFORMERS = ("5.23.0",)


def check_transformers() -> str:
    """The installed version of transformers; ImportError if it is not one that the patch was tested with."""
    installed = version("transformers")
    if installed not in TESTED_TRANSFORMERS:
        tested = " or ".join(TESTED_TRANSFORMERS)
        raise ImportError(
            f"transformers {installed} is installed, and the patch was tested with {tested}: "
            f"pip install transformers=={TESTED_TRANSFORMERS[-1]}"
        )
    return installed
