"""Tables of numbers → figures: a function for each kind, none of which keeps state.

Colours are those of Okabe and Ito, who chose them for colour-blind readers; markers, line styles and hatches say the
same again, so that a figure holds in grey.
"""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, ScalarFormatter

from squeeze.text import fitted, printable

#: Allocation → colour, marker, line style.
SERIES = {
    "uniform": ("#E69F00", "o", "-"),
    "squeeze": ("#0072B2", "s", "--"),
    "squeeze-log": ("#009E73", "^", "-."),
    "paper": ("#CC79A7", "D", ":"),
    "linear": ("#56B4E9", "<", "--"),
    "pyramid": ("#F0E442", ">", "-."),
    "cake": ("#999999", "X", "-."),
    "calibrated": ("#D55E00", "v", "-"),
    "measured": ("#000000", "P", ":"),
}
#: Of allocations that are not built in, in the order of their names.
OTHERS = [("#000000", marker, ":") for marker in "x+*1234"]
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS, LINES = "os^Dv<>P", ("-", "--", "-.", ":")
FULL = "#666666"
STYLE: Any = {
    "svg.hashsalt": "squeeze.report",  # the same ids each time
    "svg.fonttype": "none",
    "text.parse_math": False,  # names are the user's: a $ is a $
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e3e3",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "hatch.linewidth": 0.6,
}
SIZE = (4.3, 3.5)


def render(figure: Figure, kind: str, command: str) -> bytes:
    """A figure as `svg` or `png`, the same bytes for the same figure, with the command that makes it inside."""
    buffer, command = io.BytesIO(), printable(command)
    for text in figure.findobj(Text):
        text.set_parse_math(False)
        text.set_text("\n".join(map(printable, text.get_text().split("\n"))))
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # one for each letter, and for each figure
        if kind == "svg":
            figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Description": command})
        else:
            figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None, "Description": command})
    return buffer.getvalue()


def new_panel(title: str, x: str, y: str, size: tuple[float, float] = SIZE) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    # Not by `wrap=True`, which measures the text as a formula where it has two $.
    width = int((72 * size[0] - 45) / 5.8)
    axes.set_title("\n".join(textwrap.fill(line, width) for line in title.split("\n")), loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return figure, axes


def _label(name: str, most: int) -> str:
    """A series' name in the legend, which leaves out those that begin with `_`."""
    return f"{' ' * name.startswith('_')}{fitted(name, most)}"


def spread(points: pd.DataFrame, step: float) -> np.ndarray:
    """Positions on the x axis, where points of the same `kept` stand beside each other, in points' order.

    Args:
        points: with `kept`.
        step: from one to the next, in the unit of `kept`.
    """
    kept = points["kept"].to_numpy(dtype=float)
    positions = kept.copy()
    order = np.argsort(kept, kind="stable")
    clusters: list[list[int]] = []
    for index in order:
        if clusters and kept[index] - kept[clusters[-1][0]] < step:
            clusters[-1].append(index)
        else:
            clusters.append([index])
    for cluster in clusters:
        for position, index in enumerate(sorted(cluster)):
            positions[index] += (position - (len(cluster) - 1) / 2) * step
    return positions


def by_kept(
    points: pd.DataFrame,
    value: str,
    title: str,
    label: str,
    full: Sequence[float] | None = None,
    limits: tuple[float, float] | None = None,
    log: bool = False,
) -> Figure:
    """A value over the KV kept, a series for each allocation, with 95% intervals.

    Args:
        points: with `allocation`, `kept`, `low`, `high`, the column `value`, and `same`, False for those on other
            samples than the rest: their markers are open.
        full: value, low and high of the full cache, of which the last two may be NaN; None if there is none.
        limits: of the y axis.
        log: a logarithmic y axis.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = new_panel(title, "KV kept, % of the full cache", label)
        if full is not None:
            axes.axhline(full[0], color=FULL, linewidth=1.2, label="full cache", zorder=1)
            axes.axhspan(full[1], full[2], color=FULL, alpha=0.13, linewidth=0, zorder=0)
        names = [*SERIES, *sorted(set(points["allocation"]) - set(SERIES))]
        ordered = points.assign(rank=[names.index(name) for name in points["allocation"]])
        ordered = ordered.sort_values(["rank", "kept", "KV_class3"], kind="stable").reset_index(drop=True)
        width = max(ordered["kept"].max() - ordered["kept"].min(), 0.2)
        ordered["x"] = 100 * spread(ordered, 0.02 * width)
        for name, series in ordered.groupby("allocation", sort=False):
            color, marker, style = SERIES.get(str(name), OTHERS[(names.index(name) - len(SERIES)) % len(OTHERS)])
            series = series.sort_values("x")
            joined = style if series["same"].all() and not series["kept"].round(2).duplicated().any() else "none"
            drawn = {"color": color, "marker": marker, "markersize": 5.5, "linestyle": joined, "linewidth": 1.2}
            for same, part in series.groupby("same", sort=False):
                face = {} if same else {"markerfacecolor": "white", "markeredgecolor": color}
                label = _label(f"{name}{'' if same else ' (other samples)'}", 30)
                _with_intervals(axes, part["x"], part[value], part, label, drawn | face)
        low, high = ordered["x"].min(), ordered["x"].max()
        margin = max(5.0 * width, 5 - (high - low) / 2)
        axes.set_xlim(low - margin, high + margin)
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        elif limits is not None:
            axes.set_ylim(*limits)
        figure.legend(loc="outside lower center", ncols=3, handlelength=2.6)
    return figure


def _with_intervals(
    axes: Axes, x: pd.Series, y: pd.Series, points: pd.DataFrame, label: str, drawn: dict[str, Any]
) -> None:
    """Points with error bars from `low` to `high`, where those are numbers."""
    edge = {"markeredgecolor": "white", "markeredgewidth": 0.6} if "markeredgecolor" not in drawn else {}
    axes.plot(x, y, label=label, zorder=3, **{**edge, **drawn})
    axes.vlines(
        x, points["low"].astype(float), points["high"].astype(float), color=drawn["color"], linewidth=1, zorder=2
    )


def sensitivity(
    points: pd.DataFrame, title: str, label: str, full: float | None, limits: tuple[float, float] | None
) -> Figure:
    """Score over `KV_class3 / ini_size`, a line for each `ini_size`; of the same ratio (seeds) the mean is joined."""
    with matplotlib.rc_context(STYLE):
        figure, axes = new_panel(title, "KV_class3 / ini_size (1: uniform)", label)
        if full is not None:
            axes.axhline(full, color=FULL, linewidth=1.2, label="full cache", zorder=1)
        sizes = sorted(set(points["ini_size"]))
        shades = matplotlib.colormaps["cividis"](np.linspace(0.0, 0.82, len(sizes)))
        for index, (size, line) in enumerate(points.groupby("ini_size")):
            style = {"color": shades[index], "marker": MARKERS[index % 8], "linestyle": LINES[index % 4]}
            style |= {"markersize": 5.5, "linewidth": 1.2}
            shift = (index - (len(sizes) - 1) / 2) * 0.008
            means = line.groupby("ratio")[["score", "low", "high"]].mean().reset_index()
            _with_intervals(axes, means["ratio"] + shift, means["score"], means, f"ini_size {size:g}", style)
        axes.set_xlim(min(points["ratio"].min() - 0.06, 0.94), 1.06)
        if limits is not None:
            axes.set_ylim(*limits)
        figure.legend(loc="outside lower center", ncols=3, handlelength=2.6)
    return figure


def by_batch(points: pd.DataFrame, value: str, title: str, label: str, intervals: bool = False) -> Figure:
    """A measurement of `squeeze.bench` over the batch size, a line for each engine, cache and dtype.

    Args:
        points: with `engine`, `cache`, `dtype`, `batch_size` and the column `value`.
        intervals: also bars from `low` to `high`.
    """
    with matplotlib.rc_context(STYLE):
        names = (points["engine"] + ": " + points["cache"] + ", " + points["dtype"]).rename("name")
        rows = names.nunique()
        figure, axes = new_panel(title, "batch size", label, (SIZE[0], 2.9 + 0.165 * rows))
        for index, (name, line) in enumerate(points.groupby(names, sort=False)):
            line = line.sort_values("batch_size")
            style: dict[str, Any] = {
                "color": OKABE_ITO[index % 7],
                "marker": MARKERS[index % 8],
                "linestyle": LINES[index // 7 % 4],
            }
            # From thick to thin, so that lines that lie on each other can all be seen.
            style |= {"markersize": max(10.5 - index, 4), "linewidth": max(3.6 - 0.5 * index, 0.9)}
            drawn = line if intervals else line.assign(low=np.nan, high=np.nan)
            _with_intervals(axes, line["batch_size"].astype(float), line[value], drawn, _label(str(name), 70), style)
        sizes = sorted(set(points["batch_size"]))
        if len(sizes) > 1:
            axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator([float(size) for size in sizes]))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(0, None)
        figure.legend(loc="outside lower center", ncols=1, fontsize=7.5, handlelength=3)
    return figure


def limits(*numbers: Iterable[float | None]) -> tuple[float, float] | None:
    """Limits of a y axis that hold all numbers, with a margin, not far below 0; None without numbers."""
    values = np.array([value for series in numbers for value in series], dtype=float)
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    low, high = float(values.min()), float(values.max())
    margin = max(0.06 * (high - low), 0.5)
    return max(low - margin, -0.5 * margin), high + margin
