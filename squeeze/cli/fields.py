"""Fields of a dataclass that are flags of a command line, and keys of a sweep."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from squeeze.errors import InputError


@dataclass(frozen=True)
class Flag:
    """A field as a flag and as a key of a sweep.

    Args:
        help: of `--help`.
        read: text → value, a type of `argparse`; None for a switch.
        also: other spellings of the flag.
        choices: the words allowed; empty for any.
        check: raises InputError for a text that is no value; its second argument names the flag in the sentence.
        axis: its rank, from 1, among the keys of a sweep that may have several values; 0 where one value is the most.
        squeezed: whether the full cache has no use for it, so that a sweep's full runs go without.
        in_sweeps: whether a sweep's file may have it.
    """

    name: str
    default: Any
    help: str
    read: Callable[[str], Any] | None
    also: tuple[str, ...] = ()
    choices: Sequence[str] = ()
    check: Callable[[str, str], object] | None = None
    axis: int = 0
    squeezed: bool = False
    in_sweeps: bool = True

    @property
    def options(self) -> tuple[str, ...]:
        """The flag's spellings on a command line."""
        return f"--{self.name}", *self.also

    def add_to(self, parser: argparse.ArgumentParser, **changes: Any) -> None:
        """Add the flag to a command's parser; `changes` replace arguments of `add_argument`."""
        kind: dict[str, Any] = {"action": "store_true"} if self.read is None else {"type": self.read}
        parser.add_argument(*self.options, **{"help": self.help, "default": self.default, **kind, **changes})

    def value(self, text: str) -> Any:
        """The value that a text stands for; of a switch, whether the text is `true`.

        Raises:
            InputError: the flag has no such value.
        """
        if self.read is None:
            return text == "true"
        if text == "--":
            raise InputError(f"--{self.name}: -- is no value")
        try:
            return self.read(text)
        except argparse.ArgumentTypeError as error:
            raise InputError(f"{'/'.join(self.options)} {error}") from None

    def words(self, text: str) -> list[str]:
        """The flag with that value on a command line."""
        if self.read is None:
            return [f"--{self.name}"] if text == "true" else []
        # What begins with a dash would be taken for a flag.
        return [f"--{self.name}={text}"] if text.startswith("-") else [f"--{self.name}", text]


def flag(default: Any, help: str, read: Callable[[str], Any] | None = str, **more: Any) -> Any:
    """A dataclass's field that is a flag; `Flag` explains the arguments."""
    return field(default=default, metadata={"help": help, "read": read, **more})


def switch(help: str, **more: Any) -> Any:
    """A dataclass's field that is off or, with the flag given, on."""
    return flag(False, help, None, **more)


def flags_of(described: type[Any]) -> dict[str, Flag]:
    """The flags of a dataclass by their names, in the fields' order."""
    return {item.name: Flag(item.name, item.default, **item.metadata) for item in fields(described) if item.metadata}
