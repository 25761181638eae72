"""Text files that are read with errors naming the line, and written whole or not at all."""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from squeeze.config import InputError
from squeeze.decoding import NEWLINE, Kind, NotJson, decode

#: A list of numbers in indented JSON; inside a string a newline is written as two characters.
NUMBERS = re.compile(r"\[\n\s*([-+.\deE,\s]+?)\n\s*\]")


def read_bytes(path: Path) -> bytes:
    """A file's bytes; InputError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:  # a name with a byte that is zero
        raise InputError(f"cannot read {path!r}: {error}") from None


def read_json(path: Path, kind: type[Kind]) -> Kind:
    """A file's JSON document, see `decode`; InputError if it cannot be read or is not of that kind."""
    return decode(read_bytes(path), kind, path)


def read_object(path: Path) -> dict[str, Any]:
    """A file's JSON object; InputError, naming the line, if it is none."""
    return read_json(path, dict[str, Any])


def parse_jsonl(data: bytes, source: str | Path, kind: type[Kind]) -> list[tuple[int, Kind]]:
    """Read JSON Lines.

    Lines end at a newline only: text may hold other characters that `str.splitlines` would split at. Blank lines
    are passed over, and so is a byte-order mark.

    Args:
        data: the file's bytes.
        source: what the file is called in an error.
        kind: of every line, see `decode`.
    Returns:
        (line number counted from 1, what it says) for each line.
    Raises:
        InputError: a line is not of that kind; there is no line at all.
    """
    lines = data.removeprefix(codecs.BOM_UTF8).split(NEWLINE)
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append((number, decode(line, kind, source, number)))
        except NotJson as error:
            cut = ": the file ends in the middle of a line" if number == len(lines) else ""
            raise InputError(f"{error}{cut}") from None
    if not rows:
        raise InputError(f"{source} has no rows")
    return rows


def read_jsonl(path: Path, kind: type[Kind]) -> list[tuple[int, Kind]]:
    """A file of JSON Lines, see `parse_jsonl`; InputError if it cannot be read."""
    return parse_jsonl(read_bytes(path), path, kind)


def to_jsonl(rows: Sequence[dict[str, Any]]) -> str:
    """Write JSON Lines as LongBench does: one object a line, characters as they are."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_whole(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader, or a crash, finds the old file or the new one and nothing between."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write one JSON document with `write_whole`, each list of numbers on one line."""
    text = json.dumps(content, ensure_ascii=False, indent=2)
    write_whole(path, NUMBERS.sub(lambda match: f"[{' '.join(match[1].split())}]", text) + "\n")
