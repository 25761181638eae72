"""Benchmarks by the name that `--pred` gives them."""

from __future__ import annotations

from pathlib import Path

from squeeze.benchmarks.base import Benchmark
from squeeze.benchmarks.helm import HELM
from squeeze.benchmarks.longbench.benchmark import LONGBENCH, LongBenchE
from squeeze.benchmarks.ruler.benchmark import RULER
from squeeze.benchmarks.ruler.needle_map import NEEDLE_MAP

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark for benchmark in (LONGBENCH, LongBenchE("e", "LongBench-E"), RULER, NEEDLE_MAP, *HELM)
}


def owner(folder: Path, dataset: str | None = None) -> Benchmark:
    """The benchmark of a run's folder, or of a data set in it: LongBench where nothing says that it is another's."""
    candidates = (benchmark for benchmark in BENCHMARKS.values() if benchmark is not LONGBENCH)
    return next((benchmark for benchmark in candidates if benchmark.owns(folder, dataset)), LONGBENCH)


def titled(title: str) -> Benchmark:
    """The benchmark that tables call `title`."""
    return next(benchmark for benchmark in BENCHMARKS.values() if benchmark.title == title)
