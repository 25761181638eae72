"""The figure of a needle map."""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from squeeze.report.figures import STYLE

#: A map of more cells has no numbers in them.
MANY_CELLS = 150
#: Distances below this are none: rounding.
LEAST_KL = 1e-4


def needle_map(cells: pd.DataFrame, title: str, distances: pd.Series) -> Figure:
    """Needles found, and KL from the full cache, over depth (rows) and length (columns); brighter is better.

    Args:
        cells: of one configuration, see `squeeze.report.needles`.
        distances: of all configurations that share the scale of KL.
    """
    both = [name for name in ("score", "kl") if cells[name].notna().any()]
    columns, rows = cells["length"].nunique(), cells["depth"].nunique()
    width = 1.3 + max(0.52 * columns, 2.2)
    with matplotlib.rc_context(STYLE):
        size = (max(width * len(both), 4.3), 1.7 + max(0.27 * rows, 1.0))
        figure = Figure(figsize=size, layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=10)
        for number, (axes, name) in enumerate(zip(figure.subplots(1, len(both), squeeze=False)[0], both, strict=True)):
            values = cells.pivot(index="depth", columns="length", values=name)
            if name == "score":
                norm: Normalize = Normalize(0, 100)
                _map(axes, values, norm, "cividis", "{:.0f}", "needles found, %")
            else:
                shown = distances[distances.notna()].clip(lower=LEAST_KL)
                norm = LogNorm(shown.min(), max(shown.max(), 2 * shown.min()))
                _map(axes, values.clip(lower=LEAST_KL), norm, "cividis_r", "{:.2g}", "KL, nats a token")
            axes.set_xlabel("tokens")
            if number == 0:
                axes.set_ylabel("depth, %")
    return figure


def _map(axes: Axes, values: pd.DataFrame, norm: Normalize, colors: str, form: str, label: str) -> None:
    numbers = values.to_numpy(dtype=float)
    axes.grid(False)
    image = axes.imshow(numbers, cmap=colors, norm=norm, aspect="auto", interpolation="nearest")
    axes.set_xticks(range(values.shape[1]), labels=[f"{length:,}" for length in values.columns])
    axes.set_yticks(range(values.shape[0]), labels=[f"{depth:g}" for depth in values.index])
    axes.set_title(label, loc="left", fontsize=9)
    if numbers.size > MANY_CELLS:
        assert axes.figure is not None
        axes.figure.colorbar(image, ax=axes, aspect=30)
        return
    for (row, column), value in np.ndenumerate(numbers):
        if np.isfinite(value):
            red, green, blue, _ = image.cmap(norm(value))
            style: Any = {"color": "black" if 0.3 * red + 0.6 * green + 0.1 * blue > 0.5 else "white"}
            axes.text(column, row, form.format(value), ha="center", va="center", fontsize=6.5, **style)
