"""Text files that are read with errors naming the line, and written whole or not at all."""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from squeeze.config import InputError

Kind = TypeVar("Kind")

NEWLINE = b"\n"

#: Half of a character beyond the first 65,536, as JSON can write it and UTF-8 cannot.
SURROGATE = re.compile(rb"(\\u[dD][89a-fA-F][0-9a-fA-F]{2})")

#: A list of numbers in indented JSON; inside a string a newline is written as two characters.
NUMBERS = re.compile(r"\[\n\s*([-+.\deE,\s]+?)\n\s*\]")


def read_bytes(path: Path) -> bytes:
    """A file's bytes; InputError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None


def decode(data: bytes, kind: type[Kind], where: str | Path, line: int | None = None) -> Kind:
    """Read one JSON document that came from outside, in the form that it must have.

    Numbers that no machine number holds, text that is no UTF-8, and nesting without an end are errors as well: what
    this returns can be computed with and written again.

    Args:
        kind: what is wanted, as msgspec describes it: a `msgspec.Struct`, `dict[str, int]`, ...
        where: what the file is called in an error.
        line: which of its lines this is, in JSON Lines; None for a file that is one document.
    Raises:
        InputError: it is not that; the message names the file, the line and the field.
    """
    place = f"{where} line {line}" if line is not None else str(where)
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        raise InputError(f"{place}: {_said(error)}") from None
    except UnicodeDecodeError:
        raise InputError(f"{place} is not UTF-8 text") from None
    except (msgspec.DecodeError, RecursionError) as error:
        surrogate = SURROGATE.search(data)
        if surrogate and _is_json(data):
            half = surrogate[1].decode()
            raise InputError(f"{place} has half of a character, {half}, which is no text") from None
        reached = re.search(r"byte (\d+)", str(error))
        if line is None and reached:
            place += f" line {data[: int(reached[1])].count(NEWLINE) + 1}"
        raise InputError(f"{place} is not JSON") from None


def _said(error: msgspec.ValidationError) -> str:
    """What msgspec found, the field first: `stats.notes[...]: expected array, got int`."""
    said, _, field = str(error).replace("`", "").partition(" - at $")
    words = said[:1].lower() + said[1:]
    return f"{field.lstrip('.')}: {words}" if field else words


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return False
    return True


def read_json(path: Path, kind: type[Kind]) -> Kind:
    """A file's JSON document, see `decode`; InputError if it cannot be read or is not of that kind."""
    return decode(read_bytes(path).removeprefix(codecs.BOM_UTF8), kind, path)


def read_object(path: Path) -> dict[str, Any]:
    """A file's JSON object; InputError, naming the line, if it is none."""
    return read_json(path, dict[str, Any])


def parse_jsonl(
    data: bytes, source: str | Path, fields: Sequence[str], kind: type[Kind] = dict[str, Any]
) -> list[tuple[int, Kind]]:
    """Read JSON Lines.

    Lines end at a newline only: text may hold other characters that `str.splitlines` would split at. Blank lines
    are passed over, and so is a byte-order mark.

    Args:
        data: the file's bytes.
        source: what the file is called in an error.
        fields: what every line must have.
        kind: of every line, see `decode`.
    Returns:
        (line number counted from 1, its object) for each line.
    Raises:
        InputError: a line is not of that kind, or lacks a field; there is no line at all.
    """
    rows = []
    for number, line in enumerate(data.removeprefix(codecs.BOM_UTF8).split(NEWLINE), start=1):
        if not line.strip():
            continue
        try:
            row = decode(line, kind, source, number)
        except InputError as error:
            cut = ": the file ends in the middle of a line" if number == data.count(NEWLINE) + 1 else ""
            raise InputError(f"{error}{cut if str(error).endswith('is not JSON') else ''}") from None
        missing = [field for field in fields if field not in row]
        if missing:
            raise InputError(f"{source} line {number} has no field {missing[0]}")
        rows.append((number, row))
    if not rows:
        raise InputError(f"{source} has no rows")
    return rows


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
