"""Figures of a model's layers: similarities of every prompt, and budgets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from squeeze.report.figures import LINES, MARKERS, OKABE_ITO, STYLE, new_panel

#: Class → colour, hatch.
CLASSES = {1: ("#0072B2", ""), 2: ("#56B4E9", "///"), 3: ("#E69F00", "\\\\\\")}
#: A map of more prompts has no numbers in its cells.
MANY_PROMPTS = 12


def similarity_map(layers: pd.DataFrame, title: str) -> Figure:
    """Cosine similarity of every prompt (rows) and layer (columns), on the scale of -log10(1 - similarity).

    White lines part layers of different classes. With few prompts each cell has its class's number, with many each
    column its most frequent one, at the top.

    Args:
        layers: `layers.parse_layers` of one run.
    """
    values = layers.pivot(index="prompt", columns="layer", values="similarity")
    classes = layers.pivot(index="prompt", columns="layer", values="layer_class").to_numpy()
    scaled = -np.log10(np.maximum(1 - values.to_numpy(dtype=float), 1e-7))
    prompts, count = scaled.shape
    with matplotlib.rc_context(STYLE):
        height = 1.9 + min(max(0.24 * prompts, 0.7), 3.0)
        figure, axes = new_panel(title, "layer", "prompt", (max(5.2, min(0.19 * count + 1, 13)), height))
        axes.grid(False)
        image = axes.imshow(scaled, cmap="cividis", aspect="auto", interpolation="nearest")
        borders = [
            [(layer + 0.5, row - 0.5), (layer + 0.5, row + 0.5)]
            for row in range(prompts)
            for layer in range(count - 1)
            if classes[row, layer] != classes[row, layer + 1]
        ]
        axes.add_collection(LineCollection(borders, colors="white", linewidths=1.6))
        if prompts <= MANY_PROMPTS:
            bright = scaled > scaled.min() + 0.55 * (scaled.max() - scaled.min())
            for row, layer in np.ndindex(prompts, count):
                text = str(classes[row, layer])
                color = "black" if bright[row, layer] else "white"
                axes.text(layer, row, text, ha="center", va="center", fontsize=6.5, color=color)
        else:
            most = [str(np.bincount(column).argmax()) for column in classes.T]
            top = axes.secondary_xaxis("top")
            top.set_ticks(range(count), labels=most)
            top.tick_params(length=0, labelsize=6.5, pad=1)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=min(prompts, 10)))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
        ticks = np.linspace(scaled.min(), scaled.max(), 5)
        shown = [f"{1 - 10.0**-tick:.4f}" for tick in ticks]
        bar = figure.colorbar(image, orientation="horizontal", aspect=40, pad=0.02, label="cosine similarity")
        bar.set_ticks(list(ticks), labels=shown)
    return figure


def budget_bars(layers: pd.DataFrame, ini_size: float, title: str) -> Figure:
    """Mean budget of each layer, coloured by its most frequent class; the bars' whiskers span all prompts.

    Args:
        layers: `layers.parse_layers` of one run.
        ini_size: what every layer would have uniformly of what it reaches, drawn as a line.
    """
    grouped = layers.groupby("layer")
    shares = 100 * grouped["share"].agg(["mean", "min", "max"])
    classes = grouped["layer_class"].agg(lambda values: values.mode().iloc[0])
    with matplotlib.rc_context(STYLE):
        figure, axes = new_panel(
            title, "layer", "budget, % of the prompt", (max(4.6, min(0.13 * len(shares) + 1, 13)), 3.3)
        )
        axes.grid(False, axis="x")
        for layer_class, (color, hatch) in CLASSES.items():
            part = shares[classes == layer_class]
            bars: Any = {"color": color, "hatch": hatch, "edgecolor": "white", "linewidth": 0.4}
            axes.bar(part.index, part["mean"], width=0.9, label=f"class {layer_class}, layers: {len(part)}", **bars)
        varied = shares[shares["max"] - shares["min"] > 0.5]
        axes.vlines(varied.index, varied["min"], varied["max"], color="#222222", linewidth=0.9)
        uniform = 100 * ini_size * grouped["reach"].mean()
        line: Any = {"color": "#222222", "linewidth": 1, "linestyle": "--", "label": f"uniform, {ini_size:g}"}
        axes.stairs(uniform, np.arange(len(uniform) + 1) - 0.5, baseline=None, **line)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
        axes.set_xlim(-0.8, len(shares) - 0.2)
        figure.legend(loc="outside lower center", ncols=2, handlelength=2)
    return figure


def head_shares(layers: pd.DataFrame) -> np.ndarray:
    """Mean budget of each KV head over the prompts, % of the prompt.

    Args:
        layers: `layers.parse_layers` of a run with budgets by head.
    Returns:
        `(most kv_heads, layers)`, NaN where a layer has fewer heads than others.
    """
    parts = layers["heads"].str.split(expand=True).astype(float)
    parts = 100 * parts.mul(layers["share"] / layers["budget"], axis=0)
    return parts.groupby(layers["layer"]).mean().to_numpy().T


def head_map(layers: pd.DataFrame, title: str) -> Figure:
    """Mean budget of every KV head (rows) of every layer (columns)."""
    shares = head_shares(layers)
    heads, count = shares.shape
    with matplotlib.rc_context(STYLE):
        size = (max(5.2, min(0.19 * count + 1, 13)), 1.9 + min(max(0.24 * heads, 0.7), 4.0))
        figure, axes = new_panel(title, "layer", "KV head", size)
        axes.grid(False)
        image = axes.imshow(shares, cmap="cividis", aspect="auto", interpolation="nearest")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=min(heads, 10)))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
        figure.colorbar(image, orientation="horizontal", aspect=40, pad=0.02, label="budget, % of the prompt")
    return figure


def loss_lines(losses: np.ndarray, multiples: Sequence[float], share: float, title: str, part: str) -> Figure:
    """Loss curves: the loss with one layer, or KV head, alone cut or enlarged, against that of uniform budgets.

    Args:
        losses: KL divergence from the full cache, in multiples of uniform budgets', `(parts, multiples)`.
        multiples: of `share`, what the layer keeps while the others keep `share`; 1 among them.
        share: as a fraction of the prompt.
        part: what was cut, in words.
    """
    with matplotlib.rc_context(STYLE):
        size = (max(4.6, min(0.13 * len(losses) + 1, 13)), 3.3)
        figure, axes = new_panel(title, part, "KL / KL of uniform budgets, less 1", size)
        axes.axhline(0, color="#222222", linewidth=1, linestyle="--")
        shown = [index for index, multiple in enumerate(multiples) if multiple != 1]
        for index, color, marker, line in zip(shown, OKABE_ITO, MARKERS, LINES, strict=False):
            label = f"keeps {100 * min(multiples[index] * share, 1):.3g}%"
            style: Any = {"color": color, "marker": marker, "linestyle": line, "markersize": 3.5, "linewidth": 1}
            axes.plot(losses[:, index] - 1, label=label, **style)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
        axes.set_xlim(-0.8, len(losses) - 0.2)
        figure.legend(loc="outside lower center", ncols=4, handlelength=2)
    return figure
