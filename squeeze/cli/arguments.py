"""Parser and types of arguments: text that can be printed, paths that can be, numbers that can be computed with."""

from __future__ import annotations

import argparse
import math
import re
import sys
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from squeeze.errors import InputError
from squeeze.numbers import DECIMAL, MOST
from squeeze.text import shortened

#: Bytes of a file's name, and of a whole path, on the systems that this runs on.
NAME_BYTES, PATH_BYTES = 255, 4095

#: Numbers nearer to zero, or further from it, are lost in the float32 that they are used in.
LEAST_REAL, MOST_REAL = 1e-30, 1e30


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence, and which takes flags before, between and after the rest.

    Flags are not abbreviated, and an `epilog` of several lines, such as examples, is shown as it is written.
    """

    def __init__(self, *, epilog: str | None = None, **more: Any) -> None:
        written = "\n" in (epilog or "")
        layout = argparse.RawDescriptionHelpFormatter if written else argparse.HelpFormatter
        super().__init__(epilog=epilog, formatter_class=layout, allow_abbrev=False, **more)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Read a command line.

        Raises:
            InputError: it is not one that the parser knows, or holds what is no text.
        """
        given = sys.argv[1:] if args is None else list(args)
        for argument in given:
            check_text("an argument", argument)
            if argument.startswith("-") and argument.endswith("=--"):
                self.error(f"argument {argument[:-3]}: -- is no value")
        if not self._get_positional_actions():
            return super().parse_args(given, namespace)
        return self.parse_intermixed_args(given, namespace)

    def error(self, message: str) -> NoReturn:
        flag, colon, problem = message.removeprefix("argument ").partition(": ")
        if colon and problem.startswith("must "):
            raise InputError(f"{flag} {problem}")
        raise InputError(f"{shortened(message, 500)} ({self.prog} --help explains every flag)")


def check_text(name: str, text: str) -> None:
    """Check text that becomes part of sentences, files and names of folders.

    Raises:
        InputError: it has control characters such as line breaks, or bytes that are no UTF-8.
    """
    for character in text:
        kind = unicodedata.category(character)
        if kind == "Cs":
            raise InputError(f"{name} is no UTF-8 text: {shortened(ascii(text))}")
        if kind in ("Cc", "Zl", "Zp"):
            raise InputError(f"{name} has a line break or another control character: {shortened(ascii(text))}")


def user_path(text: str) -> Path:
    """A path as a user writes it, `~` being the home folder.

    Raises:
        InputError: no file can be called that.
    """
    if not text.strip():
        raise InputError("must be a path, and is blank")
    parts = text.encode("utf-8", "surrogateescape").split(b"/")
    if max(map(len, parts)) > NAME_BYTES or len(b"/".join(parts)) > PATH_BYTES:
        raise InputError(f"must be a path that a file can have, and is too long: {shortened(text)}")
    if "\0" in text:
        raise InputError(f"must be a path that a file can have, and has a zero byte: {shortened(ascii(text))}")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise InputError(f"must be a path, and there is no home folder of {text.split('/')[0]}") from None


def as_path(text: str) -> Path:
    """A type of arguments: a path."""
    return Path(path_text(text))


def path_text(text: str) -> str:
    """A type of arguments: a path, which stays as it is written."""
    try:
        user_path(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def whole(least: int, most: int = MOST) -> Callable[[str], int]:
    """A type of arguments: a whole number from `least` to `most`."""

    def read(text: str) -> int:
        if not re.fullmatch(r"[+-]?[0-9]+", text.strip()):
            raise argparse.ArgumentTypeError(f"must be a whole number, got {shortened(text)}")
        # Python refuses to read a number of some thousand digits, and such a one is out of range anyway.
        number = int(text) if len(text) < 100 else most + 1 if "-" not in text else least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"must be {least} or more, got {shortened(text)}")
        if number > most:
            raise argparse.ArgumentTypeError(f"must be at most {most}, got {shortened(text)}")
        return number

    return read


def real(
    words: str, least: float = 0.0, most: float = MOST_REAL, without_least: bool = False
) -> Callable[[str], float]:
    """A type of arguments: a number from `least` to `most`.

    Args:
        words: the numbers allowed, as the error says it.
        without_least: `least` itself is not allowed.
    """

    def read(text: str) -> float:
        number = float(text) if DECIMAL.fullmatch(text.strip()) else math.nan
        if not least <= number <= most or (without_least and number == least):
            raise argparse.ArgumentTypeError(f"must be {words}, got {shortened(text)}")
        if abs(number) < LEAST_REAL and re.search("[1-9]", text.lower().partition("e")[0]):
            raise argparse.ArgumentTypeError(f"must be {words}, and {shortened(text)} is too near to 0")
        return number

    return read
