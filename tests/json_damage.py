"""JSON documents with one thing wrong: any value in any field, a field gone, bytes lost or garbled."""

import contextlib
import copy
import json
import time

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from squeeze import InputError


class Raw(str):
    """JSON text that `json` would not write as it is."""


ODD = [
    *(Raw(text) for text in ("NaN", "Infinity", "-Infinity", "1e400", "-1e400", "1e-400", "1e999999999", "-0", "1E5")),
    *(Raw("9" * digits) for digits in (16, 19, 20, 400, 4000, 5000)),
    *(Raw(f"-{'9' * digits}") for digits in (19, 5000)),
    Raw("[" * 900 + "]" * 900),
    Raw("[" * 100_000),
    Raw('{"a":' * 5000 + "1" + "}" * 5000),
    *(1e15, 1e300, -1e300, 5e-324, 0.0, 1.5, 2**53, 2**63, 2**64, 0, -1, 1, 2, 3, 10**9),
    *("", "\0", "\ud83d", "\udc00x", "a\nb", "1/0", "1e999999999", "../../etc/passwd", "full", "squeezed", "fidelity"),
    *([], {}, [[]], [1, "a"], [0], {"a": 1}, {"": None}, {"mean": 1}, {"\ud83d": 1}, None, True, False),
]
TEXT = st.text(st.characters(exclude_categories=()), max_size=6)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
LEAVES = st.one_of(st.sampled_from(ODD), st.none(), st.booleans(), st.integers(), FLOATS, TEXT)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=6
)


def dumps(value):
    """JSON text, `Raw` as it is."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)}: {dumps(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(dumps, value)) + "]"
    return json.dumps(value)


def places(document, path=()):
    """The way to every value in a document."""
    yield path
    if isinstance(document, list):
        document = dict(enumerate(document))
    for key, value in document.items() if isinstance(document, dict) else ():
        yield from places(value, (*path, key))


@st.composite
def damaged(draw, lines):
    """The bytes of a file of these documents, one a line, in which one thing is wrong, or two."""
    lines = copy.deepcopy(lines)
    for _ in range(draw(st.sampled_from([1, 1, 1, 2]))):
        number = draw(st.integers(0, len(lines) - 1))
        path = draw(st.sampled_from(sorted(places(lines[number]), key=str)))
        holder = lines
        for step in (number, *path)[:-1]:
            holder = holder[step]
        last = (number, *path)[-1]
        if draw(st.integers(0, 3)) or holder is lines:
            holder[last] = draw(VALUES)
        else:
            del holder[last]
        if draw(st.integers(0, 9)) == 0:
            lines.append(copy.deepcopy(lines[number]))
    data = "".join(dumps(line) + "\n" for line in lines).encode()
    how = draw(st.sampled_from(["whole"] * 8 + ["cut", "garbled", "utf-16", "mark", "latin-1"]))
    at = draw(st.integers(0, len(data)))
    if how == "cut":
        return data[:at]
    if how == "garbled":
        return data[:at] + draw(st.binary(max_size=4)) + data[at + draw(st.integers(0, 4)) :]
    if how == "mark":
        return b"\xef\xbb\xbf" + data
    return data if how == "whole" else data.decode().encode(how, "replace")


def withstand(path, lines, use):
    """Check that a file can be read while it is whole, and that what is damaged gives a value, or an InputError.

    Args:
        path: where the file lies.
        lines: its documents, one a line.
        use: reads it, and does what is done with what it says.
    """
    whole = "".join(json.dumps(line) + "\n" for line in lines).encode()
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(whole)
    use(path)
    refused = []

    def attempt(data):
        path.write_bytes(data)
        start = time.process_time()  # other processes have no part in it
        try:
            use(path)
        except InputError as error:
            refused.append(str(error).encode())  # what it says can be printed
            assert b"\n" not in refused[-1]
        assert time.process_time() - start < 1

    settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))(
        given(damaged(lines))(attempt)
    )()
    assert refused
    for data in (b"", b"\n", b"\0", b"[" * 100_000, whole.decode().encode("utf-16"), b"\xff" + whole):
        attempt(data)
    path.unlink()
    path.mkdir()
    with contextlib.suppress(InputError):
        use(path)
