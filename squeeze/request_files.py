"""Files of requests in HELM's published layout: a `{"request": {...}}` a line, with the prompt and its settings."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from squeeze.config import InputError
from squeeze.files import parse_jsonl, read_bytes, read_object

#: A line of the published prediction file.
PUBLISHED = ("request", "result")

#: What `--pred` calls them: the prompts of HELM's two summarization scenarios.
HELM_TASKS = {"xsum": "HELM's XSum", "cnndm": "HELM's CNN/DailyMail"}

#: How many requests a run takes if it does not say, as published.
SAMPLE_NUM = 300


@dataclass(frozen=True)
class Decoding:
    """How a request wants its prompt to be completed.

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
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"{name} must be a whole number, {least} or more, got {value}")
        for name in ("temperature", "top_p"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise InputError(f"{name} must be a number, got {value}")
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature must be 0 or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be in (0, 1], got {self.top_p}")
        if not all(isinstance(word, str) and word for word in self.stop):
            raise InputError(f"stop must be texts that are not empty, got {list(self.stop)}")
        if self.random is not None and not isinstance(self.random, str):
            raise InputError(f"random must be a text, got {self.random}")

    @property
    def key(self) -> dict[str, Any]:
        """The settings that decide on a completion's text, as JSON would give them back."""
        found = asdict(self) | {"stop": list(self.stop)}
        found |= {"temperature": float(self.temperature), "top_p": float(self.top_p)}
        del found["logprobs"]
        return found


@dataclass(frozen=True)
class Request:
    """A prompt and how it is to be completed; `raw` is the request as the file has it."""

    prompt: str
    decoding: Decoding
    raw: dict[str, Any]


@dataclass(frozen=True)
class Requests:
    """A file of requests.

    Args:
        dataset: `xsum` or `cnndm`.
        source: the file.
        sha256: of the file.
        made_by: what `squeeze.helm_requests` noted beside the file; None for one that it did not make.
    """

    dataset: str
    rows: list[Request]
    source: str
    sha256: str
    made_by: dict[str, Any] | None

    def count(self, sample_num: int | None) -> int:
        """How many requests a run takes that asked for `sample_num` of them, or for the published number."""
        return min(sample_num or SAMPLE_NUM, len(self.rows))

    @property
    def settings(self) -> dict[str, Any]:
        """What changes the results, for `Run.open`."""
        return {"requests_sha256": self.sha256}

    @property
    def origin(self) -> dict[str, Any]:
        """What `run.json` says about the requests."""
        return {"source": self.source, "sha256": self.sha256, "rows": len(self.rows), "made_by": self.made_by}


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
    rows = [
        parse(row["request"], f"{source} line {number}") for number, row in parse_jsonl(content, source, PUBLISHED[:1])
    ]
    digest = hashlib.sha256(content).hexdigest()
    return Requests(task, rows, str(source), digest, _note(source, digest))


def parse(raw: Any, where: str) -> Request:
    """Read one request.

    Raises:
        InputError: it has no prompt, or asks for what cannot be done.
    """
    if not isinstance(raw, dict):
        raise InputError(f"{where}: request is not a JSON object")
    if not isinstance(raw.get("prompt"), str) or not raw["prompt"].strip():
        raise InputError(f"{where} has no prompt")
    for name in ("max_tokens", "temperature"):
        if name not in raw:
            raise InputError(f"{where} has no {name}")
    stop = raw.get("stop") or []
    if not isinstance(stop, str | list):
        raise InputError(f"{where}: stop is neither a text nor a list of texts, got {stop}")
    try:
        decoding = Decoding(
            max_tokens=raw["max_tokens"],
            temperature=raw["temperature"],
            top_p=raw.get("top_p", 1.0),
            n=raw.get("n", 1),
            stop=tuple([stop] if isinstance(stop, str) else stop),
            logprobs=raw.get("logprobs") or 0,
            random=raw.get("random"),
        )
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    if raw.get("echo"):
        raise InputError(f"{where} asks for echo, which a file of completions cannot have")
    if raw.get("best_of", 1) not in range(decoding.n + 1):
        raise InputError(f"{where} asks for the best of {raw['best_of']} completions: only n is supported")
    known = {"model", "request_type", "prompt", "echo", "best_of", *asdict(decoding)}
    for name in raw.keys() - known:
        if raw[name]:
            raise InputError(f"{where} asks for {name}, which is not supported")
    return Request(raw["prompt"], decoding, raw)


def note_path(path: Path) -> Path:
    """Where `squeeze.helm_requests` notes how it made a file of requests."""
    return path.with_suffix(".made_by.json")


def _note(path: Path, digest: str) -> dict[str, Any] | None:
    """How the file was made, if that note is about this very file."""
    note = note_path(path)
    found = read_object(note) if note.is_file() else {}
    return found if found.get("requests_sha256") == digest else None


def key(prompt: str, decoding: Decoding) -> str:
    """What tells a request from others: its prompt and the settings that decide on the text."""
    return json.dumps([prompt, decoding.key], ensure_ascii=False, sort_keys=True)
