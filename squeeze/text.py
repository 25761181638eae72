"""Text from outside - names, paths, what other programs said - as one line that every output can hold.

A name may have line breaks, escape sequences for the terminal, characters that turn the reading direction, or such as
XML and UTF-8 have no place for. They are shown as Python would write them: `\\x1b`, `\\n`, `\\u202e`, `\\ud800`.
"""

from __future__ import annotations

import hashlib
import re
from typing import TextIO

#: Not printable to Python, but part of words: they join and part letters (Persian, emoji), or are kinds of space.
KEPT = frozenset("\u200c\u200d\u00a0\u3000")


def printable(text: object) -> str:
    """Text without control characters, line breaks and halves of characters, which are written out in ASCII."""
    line = str(text)
    if line.isprintable():
        return line
    return "".join(
        char if char.isprintable() or char in KEPT else char.encode("unicode_escape").decode("ascii") for char in line
    )


def fitted(text: object, most: int) -> str:
    """`printable` text of at most `most` characters: of longer text the middle is left out."""
    line = printable(text)
    if len(line) <= most:
        return line
    head = (most - 1) // 2
    return f"{line[:head]}…{line[len(line) - (most - 1 - head) :]}"


def shortened(text: str, most: int = 80) -> str:
    """Text for an error: of what is too long, the start, and how long it is."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"


def file_name(text: str) -> str:
    """A name for a file or a folder: `text` as it is where it has nothing but letters, digits and `._=+-`."""
    name = re.sub(r"[^A-Za-z0-9._=+-]+", "_", text).strip("._") or "_"
    return name if len(name) <= 100 else f"{name[:80]}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def message_of(error: BaseException) -> str:
    """A library's error message in one line, after the error's kind where it is only a name or a number."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    while len(lines) > 1 and lines[0].endswith(":"):
        lines[:2] = [" ".join(lines[:2])]
    kind = "" if lines and " " in lines[0] else f"{type(error).__name__} "
    return (kind + (lines[0] if lines else "")).strip()


def say(text: object, file: TextIO | None = None) -> None:
    """Print one line."""
    print(printable(text), file=file)
