"""Files of requests in HELM's published layout: a `{"request": {...}}` a line, with the prompt and its settings."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

from msgspec import Meta

from squeeze.benchmarks.base import DataSet
from squeeze.errors import InputError
from squeeze.storage.files import parse_jsonl, read_bytes, read_json
from squeeze.storage.schema import Amount, Count, Positive, check

#: How many requests a run takes if it does not say, as published.
SAMPLE_NUM = 300


@dataclass(frozen=True)
class Decoding:
    """A request's settings for the completion of its prompt.

    Args:
        max_tokens: the most tokens of a completion.
        temperature: 0 is greedy.
        top_p: sample from the likeliest tokens of this probability.
        n: completions of the prompt.
        stop: a completion ends before the first of these strings.
        logprobs: how many of the likeliest tokens are reported at each position.
        random: HELM's word that makes another request of the same prompt; None for none.
    Raises:
        InputError: a value is out of its range.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    n: int = 1
    stop: tuple[str, ...] = ()
    logprobs: int = 1
    random: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("max_tokens", 1), ("n", 1), ("logprobs", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be a whole number, {least} or more, got {getattr(self, name)}")
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature must be 0 or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be in (0, 1], got {self.top_p}")
        if not all(self.stop):
            raise InputError(f"stop must be texts that are not empty, got {list(self.stop)}")

    @property
    def key(self) -> dict[str, Any]:
        """The settings that decide on a completion's text, as JSON would give them back."""
        settings = asdict(self) | {"stop": list(self.stop)}
        settings |= {"temperature": float(self.temperature), "top_p": float(self.top_p)}
        del settings["logprobs"]
        return settings


class Asked(TypedDict):
    """Fields of a request that are read; `Decoding` knows the ranges."""

    prompt: str
    max_tokens: Count
    temperature: Amount
    top_p: NotRequired[Amount]
    n: NotRequired[Annotated[int, Meta(ge=0, le=10_000)]]
    stop: NotRequired[str | list[str] | None]
    logprobs: NotRequired[Annotated[int, Meta(ge=0, le=10_000)] | None]
    random: NotRequired[str | None]
    best_of: NotRequired[Count]


class Line(TypedDict):
    request: dict[str, Any]


class MadeBy(TypedDict):
    """Fields of `squeeze.helm_requests`' note that are read again when HELM scores."""

    requests_sha256: str
    scenario: str
    run_entry: str
    max_eval_instances: Positive


@dataclass(frozen=True)
class Request:
    """A prompt and how it is to be completed; `raw` is the request as the file has it."""

    prompt: str
    decoding: Decoding
    raw: dict[str, Any]


@dataclass(frozen=True)
class Requests(DataSet):
    """A file of requests, `Request`; `made_by` is what `squeeze.helm_requests` noted beside it, None for another's."""

    made_by: dict[str, Any] | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that change the results: the file."""
        return {"requests_sha256": self.sha256}

    @property
    def origin(self) -> dict[str, Any]:
        """Facts for `run.json` on the requests."""
        return super().origin | {"made_by": self.made_by}


def read_requests(task: str, path: str | None) -> Requests:
    """Read a file of requests.

    Args:
        task: `xsum` or `cnndm`.
        path: the file; None is `data/<task>.jsonl`.
    Raises:
        InputError: it is not there, or a line is no request that can be answered.
    """
    source = Path(path or f"data/{task}.jsonl")
    if not source.is_file():
        raise InputError(
            f"the requests {source} are not there: python -m squeeze.helm_requests --scenario {task} --model MODEL "
            f"--out {source} makes them (--scenario {task}_local --articles FILE from articles of your own)"
        )
    content = read_bytes(source)
    rows = [parse(row["request"], f"{source} line {number}") for number, row in parse_jsonl(content, source, Line)]
    digest = hashlib.sha256(content).hexdigest()
    return Requests(task, rows, str(source), digest, _note(source, digest))


def parse(raw: dict[str, Any], where: str) -> Request:
    """Read one request.

    Raises:
        InputError: it has no prompt, or asks for what cannot be done.
    """
    asked = check(raw, Asked, where)
    if not asked["prompt"].strip():
        raise InputError(f"{where} has no prompt")
    stop = asked.get("stop") or []
    try:
        decoding = Decoding(
            max_tokens=asked["max_tokens"],
            temperature=asked["temperature"],
            top_p=asked.get("top_p", 1.0),
            n=asked.get("n", 1),
            stop=tuple([stop] if isinstance(stop, str) else stop),
            logprobs=asked.get("logprobs") or 0,
            random=asked.get("random"),
        )
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    if raw.get("echo"):
        raise InputError(f"{where} asks for echo, which a file of completions cannot have")
    if asked.get("best_of", 1) > decoding.n:
        raise InputError(f"{where} asks for the best of {raw['best_of']} completions: only n is supported")
    known = {"model", "request_type", "prompt", "echo", "best_of", *asdict(decoding)}
    for name in raw.keys() - known:
        if raw[name]:
            raise InputError(f"{where} asks for {name}, which is not supported")
    return Request(asked["prompt"], decoding, raw)


def note_path(path: Path) -> Path:
    """Path of the note in which `squeeze.helm_requests` says how it made a file of requests."""
    return path.with_suffix(".made_by.json")


def _note(path: Path, digest: str) -> dict[str, Any] | None:
    """The note beside the file, if it is about this very file."""
    beside = note_path(path)
    note: Any = read_json(beside, MadeBy) if beside.is_file() else None
    return note if note and note["requests_sha256"] == digest else None


def key(prompt: str, decoding: Decoding) -> str:
    """Identity of a request: its prompt and the settings that decide on the text, as JSON."""
    return json.dumps([prompt, decoding.key], ensure_ascii=False, sort_keys=True)
