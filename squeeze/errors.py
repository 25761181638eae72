"""The exception that means: the user can mend it."""

from __future__ import annotations


class InputError(ValueError):
    """Something the user gave is wrong; the message is one sentence. Commands print it and exit with code 2."""
