"""Benchmarks by the name that `--pred` gives them."""

from __future__ import annotations

from pathlib import Path

from squeeze.benchmarks.base import Benchmark
from squeeze.benchmarks.helm import HELM
from squeeze.benchmarks.longbench.benchmark import LONGBENCH, LongBenchE

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark for benchmark in (LONGBENCH, LongBenchE("e", "LongBench-E"), *HELM)
}


def owner(folder: Path, dataset: str | None = None) -> Benchmark:
    """The benchmark of a run's folder, or of a data set in it: LongBench where nothing says that it is another's."""
    others = (one for one in BENCHMARKS.values() if one is not LONGBENCH)
    return next((one for one in others if one.owns(folder, dataset)), LONGBENCH)


def titled(title: str) -> Benchmark:
    """The benchmark that tables call `title`."""
    return next(one for one in BENCHMARKS.values() if one.title == title)
