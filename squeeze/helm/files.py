"""Files of HELM's, and notes about them: kinds for `squeeze.storage.schema`."""

from __future__ import annotations

from typing import Annotated, Any, NotRequired, TypedDict

from msgspec import Meta

from squeeze.storage.schema import Amount, Count

Number = Annotated[float, Meta(ge=-1e15, le=1e15)]


class HelmRequest(TypedDict):
    """The parts of a request that HELM writes down."""

    model: str
    prompt: str
    temperature: Amount
    top_p: Amount
    max_tokens: Count
    num_completions: Count
    top_k_per_token: Count
    echo_prompt: bool
    stop_sequences: list[str]
    random: NotRequired[str | None]


class RequestState(TypedDict):
    request: HelmRequest
    num_train_instances: Count
    prompt_truncated: NotRequired[bool]


class ScenarioState(TypedDict):
    """HELM's `scenario_state.json`."""

    request_states: list[RequestState]


#: Columns of the table that say which run it is.
Columns = TypedDict(
    "Columns",
    {"model": str, "algorithm": str, "allocation": str, "ini_size": str, "KV_class3": str, "KV kept": str},
)


class Scored(TypedDict):
    """A run in a suite; `sha256` and `run` once HELM has scored it."""

    predictions: str
    scenario: str
    columns: Columns
    sha256: NotRequired[str]
    run: NotRequired[str]


class Suite(TypedDict):
    """`squeeze.json`, which `squeeze.helm_score` writes into a suite."""

    runs: dict[str, Scored]


class StatName(TypedDict):
    name: str
    split: NotRequired[str | None]
    perturbation: NotRequired[dict[str, Any] | None]


class Stat(TypedDict):
    """A line of HELM's `stats.json`; those with a perturbation are not of the articles as they are."""

    name: StatName
    mean: NotRequired[Number | None]
