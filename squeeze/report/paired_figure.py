"""The figure of allocations beside each other: KL, or scores, over size."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import matplotlib
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from squeeze.report.figures import OTHERS, SERIES, STYLE
from squeeze.report.paired import KL, Quantity

#: Panels in a row.
COLUMNS = 5


def over_size(lines: Sequence[dict[str, str]], quantity: Quantity) -> Figure:
    """KL on a logarithmic axis, or scores, over size: a panel for each method, a line for each allocation.

    Args:
        lines: see `squeeze.report.paired`, of one model.
    """
    known = [line for line in lines if line[quantity.name] != "-"]
    full = [float(line[quantity.name]) for line in known if line["allocation"] == "-"]
    frame = pd.DataFrame([line for line in known if line["allocation"] != "-"])
    frame = frame.assign(value=frame[quantity.name].astype(float), size=100 * frame["ini_size"].astype(float))
    methods, sizes = list(dict.fromkeys(frame["algorithm"])), sorted(set(frame["size"]))
    others = sorted(set(frame["allocation"]) - set(SERIES))
    series = SERIES | dict(zip(others, itertools.cycle(OTHERS), strict=False))
    columns = min(len(methods), COLUMNS)
    rows = -(-len(methods) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2.4 * columns, 2.5 * rows + 0.5), layout="constrained")
        panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
        handles = {}
        for axes, method in zip(panels, methods, strict=False):
            axes.set_title(method, loc="left")
            for allocation, (color, marker, style) in series.items():
                own = frame[(frame["algorithm"] == method) & (frame["allocation"] == allocation)].sort_values("size")
                if len(own):
                    drawn = {"color": color, "marker": marker, "linestyle": style, "label": allocation}
                    [handles[allocation]] = axes.plot(own["size"], own["value"], markersize=4, linewidth=1.2, **drawn)
            axes.set_xscale("log")
            axes.set_xticks(sizes, labels=[f"{size:g}" for size in sizes])
            axes.set_xlabel("ini_size, %")
            if quantity is KL:
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
                axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            for score in full:
                axes.axhline(score, color="0.4", linewidth=1, linestyle=":")
            axes.minorticks_off()
        for axes in panels[len(methods) :]:
            axes.set_axis_off()
        scores = "score, %; dotted: the full cache" if full else "score, %"
        figure.supylabel("KL from the full cache, nats a token" if quantity is KL else scores, fontsize=9)
        ordered = {name: handles[name] for name in series if name in handles}
        figure.legend(ordered.values(), ordered.keys(), loc="outside lower center", ncols=6, handlelength=2.6)
    return figure
