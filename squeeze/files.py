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

#: A list of numbers in indented JSON; inside a string a newline is written as two characters.
NUMBERS = re.compile(r"\[\n\s*([-+.\deE,\s]+?)\n\s*\]")


def read_bytes(path: Path) -> bytes:
    """A file's bytes; InputError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None


def read_object(path: Path) -> dict[str, Any]:
    """A file's JSON object; InputError, naming the line, if it is none."""
    try:
        content = json.loads(read_bytes(path).decode("utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path} line {error.lineno} is not JSON: {error.msg}") from None
    except (UnicodeDecodeError, RecursionError):
        raise InputError(f"{path} is not JSON") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a JSON object")
    return content


def parse_jsonl(data: bytes, source: str | Path, fields: Sequence[str]) -> list[tuple[int, dict[str, Any]]]:
    """Read JSON Lines.

    Lines end at a newline only: text may hold other characters that `str.splitlines` would split at. Blank lines
    are passed over, and so is a byte-order mark.

    Args:
        data: the file's bytes.
        source: what the file is called in an error.
        fields: what every line must have.
    Returns:
        (line number counted from 1, its object) for each line.
    Raises:
        InputError: a line is no UTF-8, no JSON object, or lacks a field; there is no line at all.
    """
    rows = []
    for number, line in enumerate(data.removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            raise InputError(f"{source} line {number} is not UTF-8 text") from None
        except (json.JSONDecodeError, RecursionError):
            cut = ": the file ends in the middle of a line" if number == data.count(b"\n") + 1 else ""
            raise InputError(f"{source} line {number} is not JSON{cut}") from None
        if not isinstance(row, dict):
            raise InputError(f"{source} line {number} is not a JSON object")
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
