"""JSON from outside: what is right is what `json` reads, and what is wrong is named by file, line and field."""

import json
from typing import Any, NotRequired, TypedDict

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from squeeze import InputError
from squeeze.storage.files import parse_jsonl, read_json
from squeeze.storage.schema import DEPTH, Amount, Count, check, decode


class Inner(TypedDict):
    size: Amount
    counts: NotRequired[list[Count]]


class Outer(TypedDict):
    name: str
    inner: NotRequired[Inner]
    words: NotRequired[str | list[str] | None]
    sets: NotRequired[dict[str, dict[str, Inner]]]


class Made(msgspec.Struct):
    name: str
    more: dict[str, Any] = {}


TEXT = st.text(max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
)


@given(VALUES, st.booleans())
def test_what_is_right_is_what_json_reads(value, ascii_only):
    data = json.dumps(value, ensure_ascii=ascii_only).encode()
    assert decode(data, Any, "f") == value
    assert decode(b"\xef\xbb\xbf" + data, Any, "f") == value


def test_other_fields_are_kept_and_a_struct_is_made():
    document = {"name": "n", "inner": {"size": 1, "other": [2]}, "more": {"a": None}}
    found = decode(json.dumps(document).encode(), Outer, "f")
    assert found == document and isinstance(found["inner"]["size"], int)
    assert decode(json.dumps(document).encode(), Made, "f") == Made("n", {"a": None})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "f is empty"),
        (" \n", "f is empty"),
        ("[]", "f is not a JSON object"),
        ('"text"', "f is not a JSON object"),
        ("{}", "f has no field name"),
        ('{"name": 5}', "f: name is not text, got 5"),
        ('{"name": null}', "f: name is not text, got null"),
        ('{"name": {}}', "f: name is not text, got {}"),
        ('{"name": "n", "words": [1]}', "f: words[0] is not text, got 1"),
        ('{"name": "n", "words": 1}', "f: words is not text or a list or null, got 1"),
        ('{"name": "n", "inner": []}', "f: inner is not a JSON object, got []"),
        ('{"name": "n", "inner": {}}', "f: inner has no field size"),
        ('{"name": "n", "inner": {"size": true}}', "f: inner.size is not a number, got true"),
        ('{"name": "n", "inner": {"size": -0.5}}', "f: inner.size is not a number >= 0.0, got -0.5"),
        (
            '{"name": "n", "inner": {"size": 1, "counts": [1, "2"]}}',
            'f: inner.counts[1] is not a whole number, got "2"',
        ),
        ('{"name": "n", "inner": {"size": 1, "counts": [1.0]}}', "f: inner.counts[0] is not a whole number, got 1.0"),
        # msgspec does not say which of an object's keys it is.
        (
            '{"name": "n", "sets": {"a": {"x": {"size": 1}, "y": {"size": 1}}, "b": {"z": {"size": "1"}}}}',
            'f: sets.b.z.size is not a number, got "1"',
        ),
        ('{"name": "n", "sets": {"a": {}, "b\\n": 5}}', r"f: sets.'b\n' is not a JSON object, got 5"),
        # Fields that the kind does not name count as well: they are kept.
        ('{"name": "n", "x": [1, {"y": 1e400}]}', "f: x[1].y is 1e400, which is out of the range of numbers"),
        ('{"name": "n", "x": NaN}', "f: x is NaN, which is no number that JSON has"),
        ('{"name": "n", "x": -Infinity}', "f: x is -Infinity, which is no number that JSON has"),
        ('{"name": "n\\ud83d\\ude00 \\\\ud83d", "x": "a\\ud83d"}', r"f: x has half of a character, \ud83d, which"),
        ('{"name": "n", "x": {"\\ude00": 1}}', r"f: x has half of a character, \ude00, which is no text"),
        ('{"name": "n",\n\n"x": }', "f line 3 is not JSON"),
        ('{"name": "n",\n"x": [', "f line 2 is not JSON"),
        ('{"name": "n"}\n{"name": "n"}', "f line 2 is not JSON"),
        ('{"name": "n"}\0', "f is not UTF-8 text: it has bytes that are zero"),
        ("[" * 100_000, "f has lists or objects more than 100 deep in each other"),
    ],
)
def test_what_is_wrong_is_named(text, said):
    with pytest.raises(InputError) as error:
        decode(text.encode(), Outer, "f")
    assert str(error.value).startswith(said)


@pytest.mark.parametrize("digits", [17, 400, 4300, 4301, 5000, 100_000])
def test_whole_numbers_of_any_length(digits):
    with pytest.raises(InputError, match=r"f: sets\.a\.b\.counts\[0\] is .*9999"):
        decode(b'{"name": "n", "sets": {"a": {"b": {"size": 1, "counts": [%s]}}}}' % (b"9" * digits), Outer, "f")


def test_brackets_in_texts_are_not_depth():
    many = '[{"\\' * 1000
    text = json.dumps({"name": many, "x": 0}).replace("0}", "[" * (DEPTH - 1) + "]" * (DEPTH - 1) + "}")
    assert decode(text.encode(), Outer, "f")["name"] == many
    with pytest.raises(InputError, match="more than 100 deep"):
        decode(text.replace("[]", "[[]]").encode(), Outer, "f")


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1", "utf-32"])
def test_other_encodings(encoding):
    with pytest.raises(InputError, match="f line 4 is not UTF-8 text"):
        decode('{"name": "é"}'.encode(encoding), Outer, "f", 4)


def test_parts_of_documents():
    assert check({"size": 1}, Inner, "f: a") == {"size": 1}
    with pytest.raises(InputError, match="f: a: size is not a number, got null"):
        check({"size": None}, Inner, "f: a")


def test_lines():
    data = '\ufeff{"name": "a\u2028b"}\r\n\n{"name": "c"}'.encode()
    assert parse_jsonl(data, "f", Outer) == [(1, {"name": "a\u2028b"}), (3, {"name": "c"})]
    with pytest.raises(InputError, match="f has no rows"):
        parse_jsonl(b"\n \n", "f", Outer)
    with pytest.raises(InputError, match=r"^f line 2 is not JSON$"):
        parse_jsonl(b'{"name": "a"}\n{"na\n', "f", Outer)
    with pytest.raises(InputError, match=r"^f line 2 is not JSON: the file ends in the middle of a line$"):
        parse_jsonl(b'{"name": "a"}\n{"na', "f", Outer)
    with pytest.raises(InputError, match=r"^f line 1 has no field name$"):
        parse_jsonl(b"{}", "f", Outer)


def test_what_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*: Is a directory"):
        read_json(tmp_path, Outer)
    with pytest.raises(InputError, match=r"cannot read .*: embedded null byte"):
        read_json(tmp_path / "a\0b", Outer)
