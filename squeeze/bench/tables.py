"""What was measured, as a table and a plot."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from squeeze.bench.files import speed
from squeeze.bench.throughput import named

COLUMNS = (
    *("engine", "cache", "dtype", "batch", "prompt", "prefill s", "importance", "step ms", "late/early", "tokens/s"),
    *("vs full", "KV MB", "peak MB", "limit ms", "of limit"),
)

LEGEND = """prefill s, step ms: median (quartiles) over all rounds
importance: share of the prefill that similarities, classes and budgets took
late/early: the last 32 steps over the first 32, where there are 64 or more
vs full: tokens/s over those of the full DynamicCache, in its best dtype and attention, at this batch size
peak MB: most memory held after loading"""


def row(record: dict[str, Any], copy_bandwidth: float, baseline: float | None = None) -> dict[str, str]:
    """A line of the table; the limit is the time to read the weights and the KV kept once.

    Args:
        baseline: tokens per second to compare with.
    """
    spec, result = record["spec"], record["result"]
    line = {
        **{"engine": spec["engine"], "cache": spec["cache"], "dtype": spec["dtype"]},
        **{"batch": str(spec["batch_size"]), "prompt": str(spec["prompt_length"])},
    }
    if "error" in result:
        return dict.fromkeys(COLUMNS, "-") | line | {"prefill s": "failed"}
    step = result["step_seconds"]["median"]
    limit = (result["weight_bytes"] + result["kv_bytes"]) / copy_bandwidth
    importance = result.get("importance_seconds", {"median": 0.0})["median"] / result["prefill_seconds"]["median"]
    return line | {
        "prefill s": with_quartiles(result["prefill_seconds"], 2),
        "importance": f"{100 * importance:.1f}%" if importance else "-",
        "step ms": with_quartiles(result["step_seconds"], 1, 0.001),
        "late/early": f"{result['late_over_early']:.2f}" if "late_over_early" in result else "-",
        "tokens/s": f"{speed(record):.1f}",
        "vs full": f"{speed(record) / baseline:.2f}" if baseline else "-",
        "KV MB": f"{result['kv_bytes'] / 1e6:.1f}",
        "peak MB": f"{result['peak_bytes'] / 1e6:.0f}",
        "limit ms": f"{1000 * limit:.1f}",
        "of limit": f"{100 * limit / step:.0f}%",
    }


def with_quartiles(quartiles: dict[str, float], digits: int, unit: float = 1.0) -> str:
    """A median and its quartiles, as `12.3 (12.1–12.9)`."""
    median, low, high = (f"{quartiles[key] / unit:.{digits}f}" for key in ("median", "low", "high"))
    return f"{median} ({low}–{high})"


def fitting(records: Sequence[dict[str, Any]], memory: float) -> dict[str, int]:
    """The largest batch whose peak fits into `memory` bytes, by a line through the peaks of two batch sizes."""
    peaks: dict[str, dict[int, int]] = {}
    for record in records:
        if "peak_bytes" in record["result"]:
            spec = record["spec"]
            name = f"{spec['engine']} {spec['cache']} {spec['dtype']}"
            peaks.setdefault(name, {})[spec["batch_size"]] = record["result"]["peak_bytes"]
    batches = {}
    for name, by_batch in peaks.items():
        if len(by_batch) > 1:
            (small, low), (large, high) = min(by_batch.items()), max(by_batch.items())
            each = (high - low) / (large - small)
            batches[name] = max(int((memory - low) / each + small), 0) if each > 0 else large
    return batches


def plot(records: Sequence[dict[str, Any]]) -> bytes:
    """Tokens per second, and memory, over the batch size, as PNG: a line for each cache."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    series: dict[str, list[tuple[int, float, float]]] = {}
    for record in records:
        spec, result = record["spec"], record["result"]
        if "error" not in result:
            name = named(spec)
            series.setdefault(name, []).append((spec["batch_size"], speed(record), result["peak_bytes"] / 1e9))
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for index, (name, points) in enumerate(series.items()):
        batch, speeds, memory = zip(*sorted(points), strict=True)
        style = {"marker": "osv^Dx+"[index % 7], "color": f"C{index % 10}", "linestyle": ["-", "--"][index // 10 % 2]}
        axes[0].plot(batch, speeds, label=name, **style)
        axes[1].plot(batch, memory, **style)
    for axis, title in zip(axes, ("decode, tokens per second", "peak memory, GB"), strict=True):
        axis.set(xlabel="batch size", ylabel=title, ylim=(0, None))
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    pyplot.close(figure)
    return image.getvalue()
