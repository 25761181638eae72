"""Files of requests: the published layout, and what bad lines get."""

import json

import pytest

from squeeze.benchmarks.helm import HELM
from squeeze.benchmarks.requests import key, parse, read_requests
from squeeze.errors import InputError

RAW = {"best_of": 1, "echo": False, "logprobs": 1, "max_tokens": 64, "model": "gpt-neox-20b", "n": 1, "prompt": "Hi"}
RAW |= {"request_type": "language-model-inference", "stop": ["###"], "temperature": 0.3, "top_p": 1}


def test_the_published_layout(tmp_path):
    (tmp_path / "r.jsonl").write_text(json.dumps({"request": RAW}) + "\n", "utf-8")
    data = read_requests("xsum", str(tmp_path / "r.jsonl"))
    [request] = data.rows
    assert (request.prompt, request.raw) == ("Hi", RAW)
    found = request.decoding
    assert (found.max_tokens, found.temperature, found.top_p, found.n, found.stop) == (64, 0.3, 1, 1, ("###",))
    assert data.made_by is None
    assert HELM[0].count(data, None) == HELM[0].count(data, 5) == 1


def test_requests_that_decode_alike_have_one_key():
    same = parse(RAW | {"top_p": 1.0, "logprobs": 5, "model": "other"}, "here")
    other = parse(RAW | {"temperature": 0.4}, "here")
    first = parse(RAW, "here")
    assert key(first.prompt, first.decoding) == key(same.prompt, same.decoding) != key(other.prompt, other.decoding)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompt": " "}, "here has no prompt"),
        ({"prompt": 5}, "here: prompt is not text, got 5"),
        ({"stop": 5}, "stop is not text or a list or null, got 5"),
        ({"stop": [5]}, r"stop\[0\] is not text, got 5"),
        ({"stop": [""]}, "stop must be texts"),
        ({"max_tokens": 0}, "here: max_tokens must be a whole number"),
        ({"echo": True}, "here asks for echo"),
        ({"best_of": 3}, "here asks for the best of 3 completions"),
        ({"presence_penalty": 0.5}, "here asks for presence_penalty, which is not supported"),
    ],
)
def test_what_cannot_be_answered_is_a_sentence(change, said):
    with pytest.raises(InputError, match=said):
        parse(RAW | change, "here")


@pytest.mark.parametrize("name", ["max_tokens", "temperature", "prompt"])
def test_a_request_without_a_setting(name):
    with pytest.raises(InputError, match=f"here has no field {name}"):
        parse({field: value for field, value in RAW.items() if field != name}, "here")
