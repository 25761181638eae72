"""Captions: the figures in words."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from squeeze.allocations.calibration import Calibration
from squeeze.report.layer_figures import MANY_PROMPTS, head_shares
from squeeze.report.results import shown_score
from squeeze.runs.inventory import at_once

SCORE = (
    "Higher is better, further left is smaller. The grey line is the full cache and its band the 95% bootstrap "
    "interval over samples; bars are the intervals of the points. Points at the same size are moved apart a "
    "little so that their bars can be seen; the CSV has the exact numbers. Where intervals overlap, python "
    "eval.py --compare tells more: it compares the same samples in pairs."
)
KL = (
    "Lower is better. Both caches are fed the full cache's own greedy answer; the KL divergence between their "
    "next-token distributions is what the squeezed cache costs, in nats a token. Bars are 95% bootstrap intervals "
    "over samples. On small models and few samples it tells configurations apart where scores are noise."
)
NEEDLES = (
    "A number is hidden at each depth of prompts of each length, 0 being the beginning. Needles found: how many of "
    "them the model could say, in percent. KL: the divergence from the full cache over the first tokens of its "
    "answer, as many as a number has, in nats a token, on one scale for all maps of a model in the same prose; it "
    "shows damage before an answer is lost."
)
SENSITIVITY = (
    "From right to left, class 3 gives up more of its budget: at 1 the budgets are uniform, at 0.5 class 3 keeps "
    "half of ini_size. A line is one ini_size, so all of its points keep the same KV in total (with the paper's "
    "allocation, at most that). A flat line says that the choice does not matter; bars are 95% intervals."
)
LAYERS = (
    "A layer whose attention changes the residual stream little has a cosine similarity near 1, and falls into "
    "class 3, which gives up budget to the others. Similarities come from the prompt alone, so one map serves "
    "every budget of a model and data set. Budgets are shown for one run of each allocation: at the median "
    "ini_size, and there the median KV_class3, of those that were run."
)
BENCH = (
    "Measurements of python -m squeeze.bench. Speed is the median of the decode steps, with bars from the slowest "
    "to the fastest quarter; higher is better. Of memory, lower is better."
)
CHEAPEST = (
    "The run with the least KV whose score is at least 99, 97 or 95% of the full cache's on the same samples, for "
    "uniform and for squeezed budgets: allocation, ini_size / KV_class3, and its score. It does not look at "
    "intervals: with few samples a run can be within 1% by luck."
)
RUNS = (
    "Every finished run with its settings, the command that made it, and the versions it was made with (on paper: in "
    "the CSV)."
)

#: The column of LongBench-E's scores by length and of HELM's ROUGE.
PARTS = "0-4k/4-8k/8k+ or ROUGE-1/2/L"
#: Columns too wide for paper.
ASIDE = ("device", "settings", "versions", "command", "folder")
NUMBERS = ("ini_size", "KV_class3", "seed", "samples", "score", "KL", "KV kept", "KV MB", "tokens/s")


def _ranged(value: float, low: Any, high: Any, digits: int = 2) -> str:
    return f"{value:.{digits}f}" + ("" if pd.isna(low) else f" [{low:.{digits}f}, {high:.{digits}f}]")


def sizes(run: Any) -> str:
    """A run's `ini_size` and `KV_class3`."""
    return f"{run.ini_size:g} / " + ("-" if pd.isna(run.KV_class3) else f"{run.KV_class3:g}")


def _samples(panel: pd.DataFrame) -> str:
    counts = sorted(set(panel["samples"]))
    return f"{counts[0]} samples" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} samples: not all runs compare"


def score(panel: pd.DataFrame, full: Any | None) -> str:
    """A panel of scores in words: the full cache, the best run, and the uniform one nearest to its size."""
    open_markers = len(panel) - int(panel["same"].sum())
    panel = panel[panel["same"]] if panel["same"].any() else panel
    best = max(panel.itertuples(), key=lambda run: (run.score, -run.kept, run.folder))
    words = [
        f"Full cache: {_ranged(full.score, full.low, full.high)}."
        if full is not None
        else "No run of the full cache on the same samples."
    ]
    words.append(
        f"Highest: {best.allocation} at {100 * best.kept:.1f}% kept (ini_size / KV_class3 {sizes(best)}), "
        f"{_ranged(best.score, best.low, best.high)}."
    )
    uniform = panel[(panel["allocation"] == "uniform") & ((panel["kept"] - best.kept).abs() < 0.005)]
    if best.allocation != "uniform" and len(uniform):
        other = uniform.iloc[0]
        words.append(f"Uniform at that size: {_ranged(other.score, other.low, other.high)}.")
        if not pd.isna(best.low) and best.low <= other.high:
            words.append("The intervals overlap.")
    words.append(f"{_samples(panel)}.")
    if open_markers:
        words.append(f"Open markers: on other samples, which do not compare ({open_markers}).")
    return " ".join(words)


def kl(panel: pd.DataFrame) -> str:
    """A panel of KL divergences in words: at each size, the allocations from the closest to the furthest."""
    words = []
    for kept, group in panel.groupby(panel["kept"].round(2)):
        ordered = sorted(group.itertuples(), key=lambda run: (run.kl, run.folder))
        closest = ", ".join(f"{run.allocation} ({sizes(run)}) {run.kl:.4f}" for run in ordered[:4])
        words.append(f"At {100 * kept:.0f}%: {closest}{', …' if len(ordered) > 4 else ''}.")
    return " ".join(["Closest to the full cache first.", *words, f"{_samples(panel)}."])


def needles(panel: pd.DataFrame) -> str:
    """A needle map in words: what was found, and where the cache is furthest from the full one."""
    words = []
    found = panel[panel["needles"] > 0]
    if len(found):
        total = int(found["needles"].sum())
        words.append(f"Found: {round(float((found['score'] * found['needles']).sum()) / 100)} of {total} needles.")
        worst = found.loc[found["score"].idxmin()]
        if worst["score"] < 100:
            words.append(f"Fewest: {worst['score']:.0f}% {_place(worst)}.")
    compared = panel[panel["compared"] > 0]
    if len(compared):
        furthest = compared.loc[compared["kl"].idxmax()]
        words.append(
            f"KL: {compared['kl'].mean():.4f} nats a token, mean of the cells; largest {_place(furthest)}, "
            f"{furthest['kl']:.4f}."
        )
        whole = compared[compared["score"] == 100]
        if len(whole):
            most = whole.loc[whole["kl"].idxmax()]
            words.append(f"Of the cells where every needle was found, {most['kl']:.4f} {_place(most)}.")
    return " ".join(words)


def _place(cell: Any) -> str:
    return f"at {cell['depth']:g}% of {cell['length']} tokens"


def sensitivity(panel: pd.DataFrame) -> str:
    """A panel of sensitivity in words: for each ini_size, its best ratio and its spread."""
    words = []
    for size, line in panel.groupby("ini_size"):
        means = line.groupby("ratio")["score"].mean()
        words.append(
            f"ini_size {size:g}: best at ratio {means.idxmax():g} ({means.max():.2f}), worst at {means.idxmin():g} "
            f"({means.min():.2f})."
        )
    return " ".join([*words, f"{_samples(panel)}."])


def similarity(layers: pd.DataFrame, run: Any) -> str:
    """A map of similarities in words."""
    means = layers.groupby("layer")["similarity"].mean()
    numbers = "the classes" if layers["prompt"].nunique() <= MANY_PROMPTS else "the most frequent classes"
    low = ", ".join(str(layer) for layer in means.nsmallest(3).index)
    return (
        "Each row is a prompt, each column a layer; brighter is more similar, on a scale that opens up values near 1. "
        f"White lines part layers of different classes, numbers are {numbers}, as {run.allocation} sorts them "
        f"({run.folder}). Layers {low} change the stream the most (mean similarity {means.min():.3f} and up), layer "
        f"{means.idxmax()} the least ({means.max():.4f})."
    )


def budgets(layers: pd.DataFrame, run: Any) -> str:
    """The bars of a run's budgets in words."""
    classes = layers.groupby("prompt")["layer_class"].agg(tuple)
    share = layers.groupby("prompt")["share"].mean().mean()
    varied = "the same" if classes.nunique() == 1 else f"{classes.nunique()} different sets of"
    return (
        f"{run.algorithm}, {run.allocation}, ini_size / KV_class3 {sizes(run)} ({run.folder}). Bars are means over "
        f"{classes.size} prompts, coloured by the layer's most frequent class; a thin line shows the range where it "
        "moves. "
        f"The prompts have {varied} classes. Mean over layers: {100 * share:.1f}% of the prompt."
    )


def heads(layers: pd.DataFrame, run: Any) -> str:
    """The map of a run's budgets by head in words."""
    shares = head_shares(layers)
    low, high = np.nanmin(shares, axis=0), np.nanmax(shares, axis=0)
    widest = int(np.argmax(high - low))
    return (
        f"{run.algorithm}, {run.allocation}, ini_size {run.ini_size:g} ({run.folder}): the mean budget of each KV "
        f"head, from {low.min():.1f}% to {high.max():.1f}% of the prompt. The heads of layer {widest} differ most, "
        f"from {low[widest]:.1f}% to {high[widest]:.1f}%. The column heads of the CSV has the tokens of each."
    )


def losses(relative: np.ndarray, curves: Calibration, share: float, algorithm: str) -> str:
    """A model's loss curves in words.

    Args:
        relative: `curves.relative` at that share.
    """
    multiples = [float(multiple) for multiple in curves.multiples]
    part = "layer" if curves.kv_heads is None else "KV head"
    most = ", ".join(str(layer) for layer in np.argsort(-relative[:, 0], kind="stable")[:3])
    return (
        f"{algorithm}: KL divergence from the full cache where one {part} alone keeps more or less and all others "
        f"keep {100 * share:g}% of the prompt, over that of {100 * share:g}% everywhere, less 1, mean over "
        f"prompts ({len(curves.losses)}); python -m squeeze.calibrate measured it ({curves.name}). Cutting to "
        f"{multiples[0]:g} of that costs the most in {part}s {most}. Budgets follow how fast a {part}'s loss falls "
        "with every token that it gets, here and at the larger sizes that were measured."
    )


def no_similarities(run: Any) -> str:
    """The reason why there is no map."""
    return (
        f"{run.model}, {run.dataset}: the runs were made by a version that did not keep the similarities, so there is "
        "no map of them; pred.py --overwrite makes them anew."
    )


def bench(group: pd.DataFrame, value: str, title: str, first: Any) -> str:
    """A panel of measurements in words, at the largest batch."""
    largest = group[group["batch_size"] == group["batch_size"].max()]
    good, bad = largest[value].idxmax(), largest[value].idxmin()
    if value != "tokens_per_second":
        good, bad = bad, good
    unit = {"tokens_per_second": "tokens/s", "peak": "GB", "kv": "MB"}[value]

    def named(index: Any) -> str:
        row = group.loc[index]
        return f"{row.engine} {row.cache}, {row['dtype']} ({row[value]:.1f} {unit})"

    words = f": {named(good)}" if len(largest) == 1 else f", best: {named(good)}; worst: {named(bad)}"
    return f"{title} at batch size {largest.iloc[0].batch_size}{words}. {first.file}, {first.machine}."


def best(run: Any) -> str:
    """A cell of the table of cheapest runs."""
    return f"{100 * run.kept:.1f}%: {run.allocation} {sizes(run)}, {run.score:.2f}"


def run_cells(row: dict[Any, Any]) -> dict[str, tuple[Any, ...]]:
    """A run's cells of the table of all runs: text and what it is sorted by."""

    def number(value: Any, text: str) -> tuple[str, float]:
        return ("-", -1.0) if value is None or pd.isna(value) else (text.format(value), float(value))

    shown = shown_score(row) if "score" in row else None
    parts = list(shown.values()) if isinstance(shown, dict) else []
    measure = "kl" if not pd.isna(row.get("kl")) else "score"
    low, high = row["low"], row["high"]
    digits = 4 if measure == "kl" else 2
    interval = "-" if pd.isna(low) else f"{low:.{digits}f}–{high:.{digits}f}"
    return {
        "model": (row["model"],),
        "benchmark": (row["benchmark"],),
        "data set": (row["dataset"],),
        "algorithm": (row["algorithm"],),
        "allocation": (row["allocation"],),
        "ini_size": number(row["ini_size"], "{:g}"),
        "KV_class3": number(row["KV_class3"], "{:g}"),
        "seed": number(row["seed"], "{:g}"),
        "samples": number(row["samples"], "{:g}"),
        "score": number(row.get("score"), "{:.2f}"),
        PARTS: ("/".join("-" if pd.isna(value) else f"{value:.2f}" for value in parts) or "-",),
        "KL": number(row.get("kl"), "{:.4f}"),
        "95% interval": (interval, -1.0 if pd.isna(low) else low),
        "KV kept": number(row["kept"], "{:.1%}"),
        "KV MB": number(None if pd.isna(row.get("kv_bytes")) else row["kv_bytes"] / 1e6, "{:.1f}"),
        "tokens/s": number(row.get("tokens_per_second"), "{:.1f}" + at_once(row.get("together", 1))),
        "classes 1/2/3": ("-" if pd.isna(row.get("layers_per_class")) else row["layers_per_class"],),
        "device": (row["device"],),
        "settings": (row["settings"],),
        "versions": (row["versions"],),
        "command": (row["command"], None, True),
        "folder": (row["folder"], None, True),
    }
