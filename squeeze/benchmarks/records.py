"""What a line of a run's files says about a sample: what was predicted, and what was measured on the way.

A kind names what is read of a line; what stands beside it is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

from msgspec import Meta

from squeeze.errors import InputError
from squeeze.storage.files import parse_jsonl
from squeeze.storage.schema import Amount, Cosine, Count, Kind, Nats, Positive, PositiveAmount, Share


class Prediction(TypedDict):
    """A prediction in LongBench's layout, whoever made it."""

    pred: str
    answers: Annotated[list[str], Meta(min_length=1)]
    all_classes: list[str] | None


class PredictionByLength(Prediction):
    """A prediction of LongBench-E, which is scored by length."""

    length: Amount


class Stats(TypedDict):
    """What `squeeze.generation` measures on a prompt; the last four on a squeezed cache, for each layer."""

    prompt_tokens: Positive
    new_tokens: Count
    prefill_seconds: Amount
    decode_seconds: Amount
    kv_bytes: Amount
    full_kv_bytes: PositiveAmount
    state_bytes: Amount
    peak_memory_bytes: Count
    classes: NotRequired[Annotated[list[Literal[1, 2, 3]], Meta(min_length=1)]]
    budgets: NotRequired[list[Count]]
    notes: NotRequired[list[str]]
    similarities: NotRequired[list[Cosine]]


class FidelityStats(TypedDict):
    """What `squeeze.benchmarks.fidelity` measures on a prompt; nothing was compared where `tokens` is 0."""

    kl: Nats | None
    agreement: Share | None
    tokens: Count
    kv_bytes: Amount
    full_kv_bytes: PositiveAmount
    notes: list[str]


class Times(TypedDict):
    batch_time: Amount
    batch_size: Positive


class LogProbs(TypedDict):
    tokens: list[str]
    token_logprobs: list[Annotated[float, Meta(ge=-1e6, le=1)]]


class Choice(TypedDict):
    text: str
    logprobs: LogProbs
    finish_reason: str


class Completions(TypedDict):
    """The answer to a request, as a completion API gives it."""

    choices: list[Choice]
    request_time: Times


class AnsweredRequest(TypedDict):
    """A line of the predictions of HELM's requests."""

    request: dict[str, Any]
    result: Completions


class Answered(TypedDict):
    """A line of the predictions of HELM's requests, of which only the number counts."""

    request: dict[str, Any]
    result: dict[str, Any]


class Compared(TypedDict):
    """A line of what `--fidelity` publishes."""

    kl: Nats | None


class Sample(TypedDict):
    """A finished sample of LongBench's, with whatever was measured on it."""

    index: Count
    pred: str
    answers: Annotated[list[str], Meta(min_length=1)]
    all_classes: list[str] | None
    length: Count
    stats: dict[str, Any]


class PredictedSample(TypedDict):
    """A sample of LongBench's."""

    index: Count
    pred: str
    answers: Annotated[list[str], Meta(min_length=1)]
    all_classes: list[str] | None
    length: Count
    stats: Stats


class AnsweredSample(TypedDict):
    """A sample of HELM's."""

    index: Count
    request: dict[str, Any]
    result: Completions
    stats: Stats


class ComparedSample(TypedDict):
    """A sample of `--fidelity`."""

    index: Count
    kl: Nats | None
    agreement: Share | None
    tokens: Count
    stats: FidelityStats


class LayerStats(TypedDict):
    """What is drawn of a prompt's layers; early versions did not keep the similarities."""

    prompt_tokens: Positive
    classes: Annotated[list[Literal[1, 2, 3]], Meta(min_length=1)]
    budgets: list[Count]
    similarities: NotRequired[list[Cosine]]


class LayeredSample(TypedDict):
    """A sample of a squeezed run, of which only the layers count."""

    index: Count
    stats: LayerStats


def published(kind: Any) -> tuple[str, ...]:
    """The fields of a kind of sample that its published file has, in their order."""
    return tuple(name for name in kind.__annotations__ if name not in ("index", "stats"))


#: Samples that may have been measured layer by layer.
LAYERED = (PredictedSample, AnsweredSample, LayeredSample)


def read_samples(data: bytes, source: Path, kind: type[Kind]) -> list[Kind]:
    """A file's samples; InputError, naming the line, where one is not of that kind, or is there twice."""
    found: dict[int, Any] = {}
    for number, row in parse_jsonl(data, source, kind):
        sample: Any = row
        if sample["index"] in found:
            raise InputError(f"{source} line {number} has a sample twice, {sample['index']}: --overwrite starts anew")
        found[sample["index"]] = row
    return list(found.values())


def check_layers(samples: Sequence[Any], kind: type[Any], source: Path) -> None:
    """Raises InputError unless all samples were measured on as many layers, or none of them on any."""
    if kind in LAYERED:
        layers = {len(one["stats"].get(name, ())) for one in samples for name in ("classes", "budgets")}
        layers |= {len(one["stats"]["similarities"]) for one in samples if "similarities" in one["stats"]}
        if len(layers) > 1:
            several = " and ".join(map(str, sorted(layers)[:2]))
            raise InputError(f"{source} has samples of {several} layers: --overwrite starts anew")
