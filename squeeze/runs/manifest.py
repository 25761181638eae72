"""The fields of `run.json` that each reader needs, as kinds of JSON. Other fields may stand beside these."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

from msgspec import Meta

from squeeze.allocations import ALLOCATIONS
from squeeze.benchmarks.requests import MadeBy
from squeeze.evictors import EVICTORS
from squeeze.storage.schema import Amount, Count, Nats, Percent, Positive, Share, check

Size = Annotated[float, Meta(ge=1e-9, le=1)]
#: Fraction of the full cache: the least budget of a layer can be more than a short prompt.
Kept = Annotated[float, Meta(ge=0, le=1000)]


class Manifest(TypedDict):
    """A run; what it says about a data set is read one by one, so that one that is damaged is left out alone."""

    settings: dict[str, Any]
    datasets: dict[str, dict[str, Any]]


class CountedSamples(TypedDict):
    samples: NotRequired[Count]


class Counted(TypedDict):
    """A run of which only the numbers of samples count."""

    datasets: dict[str, CountedSamples]


class BegunDataset(TypedDict):
    settings: dict[str, Any]
    starts: list[dict[str, Any]]
    layers_per_class: NotRequired[list[Amount]]


class Begun(TypedDict):
    """A run that goes on."""

    settings: dict[str, Any]
    datasets: dict[str, BegunDataset]


class FullSettings(TypedDict):
    cache: Literal["full", "squeezed"]
    seed: NotRequired[Count]
    measure: NotRequired[str]
    calibration: NotRequired[str]
    per: NotRequired[Literal["layer", "head", "adakv"]]
    compress: NotRequired[Literal["context"]]


class Algorithm(TypedDict):
    algorithm: Annotated[str, Meta(pattern=f"^({'|'.join(EVICTORS.names)})\\Z")]


class OwnAlgorithm(TypedDict):
    """An algorithm that is not built in."""

    algorithm: str
    algorithm_parameters: dict[str, Any]


class Allocation(TypedDict):
    allocation: Annotated[str, Meta(pattern=f"^({'|'.join(ALLOCATIONS.names)})\\Z")]


class OwnAllocation(TypedDict):
    """An allocation that is not built in."""

    allocation: str
    allocation_parameters: dict[str, Any]


class Sizes(TypedDict):
    ini_size: Size
    KV_class3: NotRequired[Size]


class ClassSizes(TypedDict):
    """Sizes of allocations that cannot do without `KV_class3`."""

    ini_size: Size
    KV_class3: Size


class ModelName(TypedDict):
    name: str


class Start(TypedDict):
    """A start of a data set's run."""

    model: ModelName
    device: NotRequired[str]
    command: NotRequired[str]
    versions: NotRequired[dict[str, str | None]]


class AttentionKind(TypedDict):
    """Attention layers that are alike: their numbers, as in `0-2, 4`, and what their own attention sees."""

    layers: Annotated[str, Meta(pattern=r"^\d{1,6}(-\d{1,6})?(, \d{1,6}(-\d{1,6})?)*\Z")]
    window: NotRequired[Positive]
    chunk: NotRequired[Positive]


class Attention(TypedDict):
    layers: list[AttentionKind]


class Probed(TypedDict):
    """A start; runs of HELM's own, and old ones, do not say what attention is like."""

    attention: NotRequired[Attention | None]


class ProbedDataset(TypedDict):
    starts: list[Probed]


class ProbedRun(TypedDict):
    datasets: dict[str, ProbedDataset]


class Mapped(TypedDict):
    """A finished data set of the needle map."""

    depths: Annotated[list[Percent], Meta(min_length=1)]


class Origin(TypedDict):
    sha256: NotRequired[str]


class Summary(TypedDict):
    """The fields of both kinds of finished data sets."""

    samples: Positive
    kept: Kept
    starts: Annotated[list[Start], Meta(min_length=1)]
    layers_per_class: NotRequired[list[Amount]]
    data: NotRequired[Origin]


class PredictedSummary(Summary):
    kv_bytes: Amount
    tokens_per_second: Amount


class FidelitySummary(Summary):
    compared: NotRequired[Count]
    tokens: NotRequired[Count]


class NatsInterval(TypedDict):
    mean: Nats
    low: Nats
    high: Nats


class ShareInterval(TypedDict):
    mean: Share
    low: Share
    high: Share


class ComparedSummary(FidelitySummary):
    """A comparison of one token or more."""

    kl: NatsInterval
    agreement: ShareInterval


class Flags(TypedDict):
    model: str
    model_path: NotRequired[str | None]


class FlaggedStart(Start):
    flags: Flags


class AnsweredOrigin(TypedDict):
    """The requests that were answered."""

    source: str
    rows: Positive
    made_by: MadeBy | None


class RequestsSummary(TypedDict):
    """A finished data set of HELM's, as `squeeze.helm_score` reads it."""

    samples: Positive
    kept: Kept
    starts: Annotated[list[FlaggedStart], Meta(min_length=1)]
    layers_per_class: NotRequired[list[Amount]]
    data: AnsweredOrigin


def check_settings(settings: dict[str, Any], path: Path) -> None:
    """Raises InputError unless a run's settings say how its cache was made."""
    where = f"{path}: settings"
    check(settings, FullSettings, where)
    if settings["cache"] == "squeezed":
        check(settings, OwnAlgorithm if "algorithm_parameters" in settings else Algorithm, where)
        own = "allocation_parameters" in settings
        check(settings, OwnAllocation if own else Allocation, where)
        classes = not own and "class3" in ALLOCATIONS.find(settings["allocation"]).required
        check(settings, ClassSizes if classes else Sizes, where)


def check_summary(summary: dict[str, Any], fidelity: bool, path: Path, dataset: str) -> None:
    """Raises InputError unless what is said of a finished data set can be shown."""
    compared = ComparedSummary if "kl" in summary else FidelitySummary
    check(summary, compared if fidelity else PredictedSummary, f"{path}: {dataset}")
