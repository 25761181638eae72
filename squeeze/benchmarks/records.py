"""Lines of a run's files, one a sample: what was predicted, and the statistics of it.

A kind names what is read of a line; fields beside those are kept, but for other statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypedDict, get_type_hints

from msgspec import Meta, convert

from squeeze.errors import InputError
from squeeze.generation.stats import Budgets, Classes, SampleStats
from squeeze.storage.files import parse_jsonl
from squeeze.storage.schema import Amount, Cosine, Count, Kind, Nats, Percent, Positive, Share


class Prediction(TypedDict):
    """A prediction in LongBench's layout, whoever made it."""

    pred: str
    answers: Annotated[list[str], Meta(min_length=1)]
    all_classes: list[str] | None


class PredictionByLength(Prediction):
    """A prediction of LongBench-E, which is scored by length."""

    length: Amount


@dataclass(frozen=True)
class FidelityStats:
    """Distance of a squeezed cache from the full one on a prompt, see `squeeze.benchmarks.fidelity`.

    Args:
        kl, agreement: means over the tokens that were compared; None where there were none.
        tokens: that were compared.
        kv_bytes, full_kv_bytes: held by the squeezed and by the full cache after the prefill.
        notes: sentences that the user should see.
    """

    kl: Nats | None
    agreement: Share | None
    tokens: Count
    kv_bytes: Amount
    full_kv_bytes: Positive
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """The statistics as a line of a run's file has them."""
        return dict(vars(self))


@dataclass(frozen=True)
class NoStats:
    """A sample on which nothing is measured beside what is published."""

    def to_json(self) -> dict[str, Any]:
        return {}


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


class PredictedSample(TypedDict):
    """A sample of LongBench's."""

    index: Count
    pred: str
    answers: Annotated[list[str], Meta(min_length=1)]
    all_classes: list[str] | None
    length: Count
    stats: SampleStats


class NeedleSample(PredictedSample):
    """A sample of the needle map's."""

    depth: Percent


class AnsweredSample(TypedDict):
    """A sample of HELM's."""

    index: Count
    request: dict[str, Any]
    result: Completions
    stats: SampleStats


class ComparedSample(TypedDict):
    """A sample of `--fidelity`."""

    index: Count
    kl: Nats | None
    agreement: Share | None
    tokens: Count
    stats: FidelityStats


@dataclass(frozen=True)
class LayerStats:
    """Statistics of a prompt's layers that are drawn; early versions did not keep the similarities."""

    prompt_tokens: Positive
    classes: Classes
    budgets: Budgets
    similarities: list[Cosine] = field(default_factory=list)


class LayeredSample(TypedDict):
    """A sample of a squeezed run, of which only the layers count."""

    index: Count
    stats: LayerStats


def published(kind: Any) -> tuple[str, ...]:
    """The fields of a kind of sample that its published file has, in their order."""
    return tuple(name for name in kind.__annotations__ if name not in ("index", "stats"))


def read_samples(data: bytes, source: Path, kind: type[Kind]) -> list[Kind]:
    """A file's samples, their statistics in the class that the kind names.

    Raises:
        InputError: a line is not of that kind, or a sample is there twice; the message names the line.
    """
    measured = get_type_hints(kind)["stats"]
    samples: dict[int, Any] = {}
    for number, row in parse_jsonl(data, source, kind):
        sample: Any = row
        if sample["index"] in samples:
            raise InputError(f"{source} line {number} has a sample twice, {sample['index']}: --overwrite starts anew")
        samples[sample["index"]] = sample | {"stats": convert(sample["stats"], measured)}
    return list(samples.values())


def check_layers(samples: Sequence[Any], source: Path) -> None:
    """Raises InputError unless all samples were measured on as many layers, or none of them on any."""
    layers: set[int] = set()
    for stats in (sample["stats"] for sample in samples):
        if isinstance(stats, SampleStats | LayerStats):
            layers |= {len(stats.classes), len(stats.budgets)}
            layers |= {len(stats.similarities)} if stats.similarities else set()
    if len(layers) > 1:
        several = " and ".join(map(str, sorted(layers)[:2]))
        raise InputError(f"{source} has samples of {several} layers: --overwrite starts anew")
