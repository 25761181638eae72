"""The form of `bench.json`, which `squeeze.bench` writes, and the speeds that follow from it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from squeeze.storage.files import read_json
from squeeze.storage.schema import Amount, Positive, PositiveAmount, check


class Quartiles(TypedDict):
    median: PositiveAmount
    low: PositiveAmount
    high: PositiveAmount


class Median(TypedDict):
    median: Amount


class Spec(TypedDict):
    """A configuration that was measured; `budgets` are those of a cache that was cut."""

    engine: str
    cache: str
    dtype: str
    batch_size: Positive
    device: str
    prompt_length: Positive
    model: str


class Measured(TypedDict):
    """The measurements of a configuration; one that failed has only an `error`."""

    step_seconds: Quartiles
    prefill_seconds: Quartiles
    whole_seconds: NotRequired[Quartiles]
    importance_seconds: NotRequired[Median]
    late_over_early: NotRequired[Amount]
    kv_bytes: Amount
    peak_bytes: Amount
    weight_bytes: Amount
    copy_bandwidth: PositiveAmount


class Failed(TypedDict):
    error: str


class Record(TypedDict):
    spec: Spec
    result: dict[str, Any]


class Bench(TypedDict):
    machine: NotRequired[str]
    runs: list[Record]


def read_bench(path: Path) -> Bench:
    """Read a file of `squeeze.bench`; InputError, naming the field, if it is none."""
    bench = read_json(path, Bench)
    for number, record in enumerate(bench["runs"]):
        kind = Failed if "error" in record["result"] else Measured
        check(record["result"], kind, f"{path}: runs[{number}].result")
    return bench


def bandwidth(records: Sequence[Any]) -> float:
    """Bytes per second of a copy, the median over all processes of the run."""
    measured = [record["result"]["copy_bandwidth"] for record in records if "error" not in record["result"]]
    return statistics.median(measured) if measured else 1.0


def speed(record: Any) -> float:
    """Tokens decoded per second."""
    return record["spec"]["batch_size"] / record["result"]["step_seconds"]["median"]


def whole_speed(record: Any) -> float:
    """Tokens per second of whole generations, prefills included."""
    spec = record["spec"]
    return spec["batch_size"] * spec["new_tokens"] / record["result"]["whole_seconds"]["median"]


def full_speeds(records: Sequence[Any]) -> dict[int, float]:
    """Batch size → the best speed of a full DynamicCache."""
    speeds: dict[int, float] = {}
    for record in records:
        spec = record["spec"]
        if spec["engine"] == "transformers" and "budgets" not in spec and "error" not in record["result"]:
            speeds[spec["batch_size"]] = max(speed(record), speeds.get(spec["batch_size"], 0.0))
    return speeds
