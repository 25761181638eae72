"""JSON that came from outside → values of the form that they must have, or a sentence that names the field.

The form, or *kind*, is a type that msgspec understands: a `TypedDict`, `dict[str, float]`, a `msgspec.Struct`. What
has passed is never looked at again: it can be computed with, and written again as JSON and as UTF-8.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar, is_typeddict

import msgspec
from msgspec import Meta

from squeeze.errors import InputError

Kind = TypeVar("Kind")

#: Of anything that is counted, timed or weighed: sums, means and quotients of them stay finite.
Count = Annotated[int, Meta(ge=0, le=2**53)]
Positive = Annotated[int, Meta(ge=1, le=2**53)]
Amount = Annotated[float, Meta(ge=0, le=1e15)]
PositiveAmount = Annotated[float, Meta(ge=1e-9, le=1e15)]
#: KL divergence in nats a token; rounding can take it a little below 0.
Nats = Annotated[float, Meta(ge=-1, le=1e6)]
Share = Annotated[float, Meta(ge=0, le=1)]
Percent = Annotated[float, Meta(ge=0, le=100)]
Cosine = Annotated[float, Meta(ge=-1.01, le=1.01)]

#: How deep lists and objects may lie in each other: far below the limit at which Python's own writer of JSON gives up.
DEPTH = 100

NEWLINE = b"\n"
TEXT = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
BRACKET = re.compile(rb"[\[\]{}]")
#: Half of a character beyond the first 65,536, as JSON can write it and UTF-8 cannot.
SURROGATE = re.compile("[\ud800-\udfff]")
STEP = re.compile(r"\.([^.\[]+)|\[(\d+)\]|\[(\.\.\.)\]")

OUT_OF_RANGE = "which is out of the range of numbers"

#: msgspec's names of JSON's types, in words.
WORDS = {
    "object": "a JSON object",
    "array": "a list",
    "str": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "null": "null",
}


class NotJson(InputError):
    """The bytes are no JSON document, whatever it should say."""


class _Outside(str):
    """A number as it was written, which no number of the machine holds."""


def decode(data: bytes, kind: type[Kind], where: str | Path, line: int | None = None) -> Kind:
    """Read one JSON document that came from outside, in the form that it must have.

    Numbers that no machine number holds, text that is no UTF-8, and nesting without an end are errors as well.

    Args:
        kind: the form wanted. Of a `TypedDict` the fields that it does not name are kept, too.
        where: the file's name in an error.
        line: which of its lines this is, in JSON Lines; None for a file that is one document.
    Raises:
        InputError: it is not that; the message names the file, the line and the field.
    """
    data = data.removeprefix(codecs.BOM_UTF8)
    location = f"{where} line {line}" if line is not None else str(where)
    if not data.strip():
        raise NotJson(f"{location} is empty")
    if _depth(data) > DEPTH:
        raise InputError(f"{location} has lists or objects more than {DEPTH} deep in each other")
    try:
        document = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _not_decoded(data, location, line, error) from None
    return check(document, kind, location)


def check(document: Any, kind: type[Kind], where: str) -> Kind:
    """The document, or a part of one, if it is of the kind; InputError, naming the field, if it is not."""
    try:
        made = msgspec.convert(document, kind)
    except msgspec.ValidationError as error:
        raise InputError(f"{where}{_in_words(document, kind, str(error))}") from None
    return document if is_typeddict(kind) else made


def _depth(data: bytes) -> int:
    """The depth of lists and objects in each other; 0 where there are too few to be too deep."""
    if data.count(b"[") + data.count(b"{") <= DEPTH:
        return 0
    depth = deepest = 0
    for bracket in BRACKET.findall(TEXT.sub(b"", data)):
        depth += 1 if bracket in b"[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _not_decoded(data: bytes, location: str, line: int | None, error: Exception) -> InputError:
    """The error for bytes that are no JSON, or none that can be computed with."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return NotJson(f"{location} is not UTF-8 text")
    if b"\0" in data:
        return NotJson(f"{location} is not UTF-8 text: it has bytes that are zero")
    try:
        document = json.loads(data, parse_int=_whole, parse_float=_number, parse_constant=_Outside)
    except (ValueError, RecursionError):
        if line is None:
            reached = re.search(r"byte (\d+)", str(error))
            location += f" line {data[: int(reached[1]) if reached else len(data)].rstrip().count(NEWLINE) + 1}"
        return NotJson(f"{location} is not JSON")
    for path, value in _texts(document, []):
        if isinstance(value, _Outside):
            why = OUT_OF_RANGE if value[-1].isdigit() else "which is no number that JSON has"
            return InputError(f"{location}{_field(path)} is {shown(value)}, {why}")
        half = SURROGATE.search(value)
        if half:
            written = ascii(half[0])[1:-1]
            return InputError(f"{location}{_field(path)} has half of a character, {written}, which is no text")
    return NotJson(f"{location} is not JSON")


def _whole(text: str) -> int | str:
    try:
        return int(text)
    except ValueError:
        return _Outside(text)


def _number(text: str) -> float | str:
    return float(text) if abs(float(text)) < float("inf") else _Outside(text)


def _texts(value: Any, path: list[Any]) -> Iterator[tuple[list[Any], str]]:
    """Every text in a document, keys included, with the path to it."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _texts(item, [*path, index])
    elif isinstance(value, dict):
        for key, item in value.items():
            yield path, key
            yield from _texts(item, [*path, key])


def _in_words(document: Any, kind: Any, error: str) -> str:
    """msgspec's sentence in words that name the field and what is there, such as `: y is not text, got 5`."""
    words, _, pattern = error.partition(" - at `$")
    path = _path(document, kind, error, pattern.removesuffix("`"))
    field = _field(path)
    missing = re.fullmatch(r"Object missing required field `(.*)`", words)
    if missing:
        return f"{field} has no field {missing[1]}"
    one_of = re.fullmatch(r"Expected `str` matching regex '\^\((.*)\)\\\\Z'", words)
    if one_of:
        return f"{field} is none of {one_of[1].replace('|', ', ')}, got {shown(_at(document, path))}"
    wanted = re.fullmatch(r"Expected `([a-z |]+)`(?: (.*?))?(?:, got .*)?", words)
    value = _at(document, path)
    if wanted:
        names = " or ".join(WORDS.get(name, name) for name in wanted[1].split(" | "))
        limit = f" {wanted[2].replace('9007199254740992', '2**53')}" if wanted[2] else ""
        got = f", got {shown(value)}" if field else ""
        return f"{field} is not {names}{limit}{got}"
    if words.startswith("Invalid enum value"):
        return f"{field} is {shown(value)}, which is not known here"
    if words.endswith("out of range"):
        return f"{field} is {shown(value)}, {OUT_OF_RANGE}"
    return f"{field} is {shown(value)}: {words[:1].lower() + words[1:].replace('`', '')}"


def _path(document: Any, kind: Any, error: str, pattern: str) -> list[Any]:
    """The path to the value that `error` is about; msgspec says `[...]` where an object's key should stand."""
    path: list[Any] = []
    for name, index, key in STEP.findall(pattern):
        if key:
            parent = _at(document, path)
            for member in parent if isinstance(parent, dict) else ():
                alone = _with(document, path, {member: parent[member]})
                if _error(alone, kind) == error:
                    document = alone
                    path.append(member)
                    break
            else:
                return path
        else:
            path.append(name or int(index))
    return path


def _error(document: Any, kind: Any) -> str | None:
    try:
        msgspec.convert(document, kind)
    except msgspec.ValidationError as error:
        return str(error)
    return None


def _at(document: Any, path: list[Any]) -> Any:
    for step in path:
        document = document[step]
    return document


def _with(document: Any, path: list[Any], value: Any) -> Any:
    """A copy with another value at the end of the path."""
    if not path:
        return value
    copy = document.copy()
    copy[path[0]] = _with(copy[path[0]], path[1:], value)
    return copy


def _field(path: list[Any]) -> str:
    """A path as `: datasets.samsum.starts[0]`; nothing for the document itself."""
    words = "".join(f"[{step}]" if isinstance(step, int) else f".{_plain(step)}" for step in path)
    return f": {words.removeprefix('.')}" if words else ""


def _plain(text: str) -> str:
    """A key or a number as it is, if it is short and can be printed on a line."""
    text = text if len(text) <= 40 else text[:40] + "…"
    return text if text.isprintable() else ascii(text)


def shown(value: Any) -> str:
    """A value of a document in a few words, to be named in an error."""
    if isinstance(value, list):
        return "a list" if value else "[]"
    if isinstance(value, dict):
        return "a JSON object" if value else "{}"
    if isinstance(value, _Outside):
        return _plain(value)
    return _plain(json.dumps(value, ensure_ascii=False))
