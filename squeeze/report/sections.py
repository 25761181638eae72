"""The parts of the page: which figures and tables there are, what they show in words, and their data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from squeeze.allocations.calibration import Calibration
from squeeze.errors import InputError
from squeeze.numbers import parse_fraction
from squeeze.report import captions, figures, layer_figures, needles, results
from squeeze.report.layers import chosen, curves_of, parse_layers
from squeeze.report.needle_figure import needle_map
from squeeze.report.page_parts import Cell, Names, Plot, Section, Sections, Table, heading, label_of, panel_name
from squeeze.report.results import GROUP, Results
from squeeze.text import fitted


def make(tables: Results) -> Sections:
    """Choose and draw what there is to be seen."""
    problems = list(tables.problems)
    names = Names()
    made = [
        cheapest(tables),
        scores(tables, names),
        fidelity(tables, names),
        needle_maps(tables, names, problems),
        sensitivity(tables, names),
        layers(tables, names, problems),
        bench(tables, names),
        all_runs(tables),
    ]
    return Sections([section for section in made if section is not None], problems, tables.unscored)


def scores(tables: Results, names: Names) -> Section | None:
    """Score against KV kept: a panel for each model, data set and algorithm."""
    scored = tables.runs[tables.runs["score"].notna()]
    bounded = scored[scored["allocation"] != "full"]
    if bounded.empty:
        return None
    made = Section("score", "Score against KV kept", captions.SCORE, scored.drop(columns=["versions", "command"]))
    for _, group in bounded.groupby(GROUP, sort=False):
        full = _full(tables, group)
        limits = _limits(group, full)
        for algorithm, panel in group.groupby("algorithm", sort=False):
            first = panel.iloc[0]
            panel = panel.assign(same=_same(panel, full))
            line = None if full is None else (full.score, full.low, full.high)
            figure = figures.by_kept(panel, "score", heading(first, str(algorithm)), label_of(first), line, limits)
            name = panel_name(names, "score", first, str(algorithm))
            made.plots.append(Plot(name, figure, captions.score(panel, full)))
    return made


def _full(tables: Results, group: pd.DataFrame) -> Any | None:
    """The full cache's run that most of the runs of a data set compare with."""
    fulls = [full for run in group.itertuples() if (full := results.full_of(tables.runs, run)) is not None]
    folders = [full.folder for full in fulls]
    return max(fulls, key=lambda full: folders.count(full.folder)) if fulls else None


def _same(panel: pd.DataFrame, full: Any | None) -> pd.Series:
    """True for runs on the full cache's samples, or where there is no full cache, on as many as most."""
    if full is not None:
        return (panel["samples"] == full.samples) & (panel["data"] == full.data)
    return panel["samples"] == panel["samples"].mode().iloc[0]


def _limits(group: pd.DataFrame, full: Any | None) -> tuple[float, float] | None:
    line = [] if full is None else [full.score, full.low, full.high]
    return figures.limits(group["score"], group["low"], group["high"], line)


def fidelity(tables: Results, names: Names) -> Section | None:
    """KL divergence against KV kept: a panel for each model, data set and algorithm."""
    if tables.fidelity.empty:
        return None
    frame = tables.fidelity
    made = Section("kl", "KL divergence against KV kept", captions.KL, frame.drop(columns=["versions", "command"]))
    for _, panel in frame.groupby([*GROUP, "algorithm"], sort=False):
        first = panel.iloc[0]
        log = bool((panel["low"] > 0).all())
        title = heading(first, first.algorithm)
        panel = panel.assign(same=_same(panel, None))
        figure = figures.by_kept(panel, "kl", title, "KL from the full cache, nats a token", log=log)
        name = panel_name(names, "kl", first, first.algorithm)
        made.plots.append(Plot(name, figure, captions.kl(panel)))
    return made


def needle_maps(tables: Results, names: Names, problems: list[str]) -> Section | None:
    """What was found at each depth and length, and the distance there: a panel for each configuration."""
    cells = needles.cells(tables, problems)
    if cells.empty:
        return None
    made = Section("needles", "Needle maps", captions.NEEDLES, cells)
    for _, group in cells.groupby(["model", "haystack"], sort=False):
        for _, panel in group.groupby("folder", sort=False):
            run = panel.iloc[0]
            words = ["full cache"] if pd.isna(run.ini_size) else [run.algorithm, run.allocation, captions.sizes(run)]
            words += [] if run.seed == 42 else [f"seed {run.seed}"]
            title = " · ".join(fitted(word, 60) for word in (run.haystack, *words))
            figure = needle_map(panel, f"{title}\n{fitted(run.model, 120)}", group["kl"])
            name = names("needles", run.model, run.haystack, *words)
            made.plots.append(Plot(name, figure, captions.needles(panel), wide=panel["kl"].notna().any()))
    return made


def sensitivity(tables: Results, names: Names) -> Section | None:
    """Score over KV_class3 at fixed ini_size: a panel for each model, data set, algorithm and allocation."""
    frame = results.sensitivity(tables.runs)
    if frame.empty:
        return None
    made = Section("sensitivity", "Sensitivity to KV_class3", captions.SENSITIVITY, frame)
    for _, group in frame.groupby([*GROUP, "samples", "data"], sort=False):
        full = _full(tables, tables.runs[tables.runs["folder"].isin(group["folder"])])
        line = None if full is None else full.score
        limits = _limits(group, full)
        for _, panel in group.groupby(["algorithm", "allocation"], sort=False):
            first = panel.iloc[0]
            title = heading(first, first.algorithm, first.allocation)
            figure = figures.sensitivity(panel, title, label_of(first), line, limits)
            name = panel_name(names, "sensitivity", first, first.algorithm, first.allocation)
            made.plots.append(Plot(name, figure, captions.sensitivity(panel)))
    return made


def layers(tables: Results, names: Names, problems: list[str]) -> Section | None:
    """Similarities of a run of each model and data set, and budgets of one for each allocation."""
    parts: list[pd.DataFrame] = []
    made = Section("layers", "Layers: similarities, classes and budgets", captions.LAYERS, pd.DataFrame())
    for _, group in chosen(tables.runs).groupby(GROUP, sort=False):
        budgets: list[Plot] = []
        mapped = False
        for run in group.itertuples():
            try:
                measured = parse_layers(Path(run.folder), run.dataset)
            except InputError as error:
                problems.append(f"{error}; its layers are not drawn")
                continue
            parts.append(measured.assign(**{name: getattr(run, name) for name in (*GROUP, "allocation", "folder")}))
            if not mapped and measured["similarity"].notna().all():
                figure = layer_figures.similarity_map(measured, heading(run, "similarity"))
                caption = captions.similarity(measured, run)
                made.plots.append(Plot(panel_name(names, "similarity", run), figure, caption, wide=True))
                mapped = True
            title = heading(run, "budgets", run.allocation)
            figure = layer_figures.budget_bars(measured, run.ini_size, title)
            budgets.append(
                Plot(panel_name(names, "budgets", run, run.allocation), figure, captions.budgets(measured, run))
            )
            if "heads" in measured:
                figure = layer_figures.head_map(measured, heading(run, "budgets of KV heads", run.allocation))
                name, caption = panel_name(names, "heads", run, run.allocation), captions.heads(measured, run)
                budgets.append(Plot(name, figure, caption, wide=True))
            try:
                curves = curves_of(Path(run.folder), run.model, run.algorithm)
            except InputError as error:
                made.notes.append(str(error))
                continue
            if curves is not None:
                budgets.append(losses(run, curves, names))
        if budgets and not mapped:
            made.notes.append(captions.no_similarities(group.iloc[0]))
        made.plots += budgets
    made.data = pd.concat(parts).reset_index(drop=True) if parts else made.data
    return made if made.plots else None


def losses(run: Any, curves: Calibration, names: Names) -> Plot:
    """The loss curves that a calibrated run was made from."""
    first = curves.first(parse_fraction("ini_size", run.ini_size))
    measured, share = curves.relative(first), curves.shares[first]
    multiples = [float(multiple) for multiple in curves.multiples]
    title = heading(run, "loss curves", run.algorithm)
    part = "layer" if curves.kv_heads is None else "KV head, layer after layer"
    figure = layer_figures.loss_lines(measured, multiples, float(share), title, part)
    return Plot(
        panel_name(names, "losses", run, run.algorithm),
        figure,
        captions.losses(measured, curves, float(share), run.algorithm),
    )


def bench(tables: Results, names: Names) -> Section | None:
    """Speed, memory and KV held over the batch size, for each file and prompt length."""
    if tables.bench.empty:
        return None
    made = Section("bench", "Throughput and memory", captions.BENCH, tables.bench)
    for _, group in tables.bench.groupby(["file", "model", "device", "prompt_length"], sort=False):
        first = group.iloc[0]
        group = group.assign(peak=group["peak_bytes"] / 1e9, kv=group["kv_bytes"] / 1e6)
        where = fitted(f"{first.model}, {first.prompt_length} tokens, {first.device}", 120)
        for value, title, label in (
            ("tokens_per_second", "Decode speed", "tokens per second"),
            ("peak", "Peak memory", "GB, most held after loading"),
            ("kv", "KV cache", "MB held after prefill"),
        ):
            speed = value == "tokens_per_second"
            figure = figures.by_batch(group, value, f"{title}\n{where}", label, intervals=speed)
            name = names("bench", title.lower(), first.model, str(first.prompt_length), first.device)
            made.plots.append(Plot(name, figure, captions.bench(group, value, title, first)))
    return made


def cheapest(tables: Results) -> Section | None:
    """The least KV within some percent of the full cache's score, as a table."""
    frame = results.cheapest(tables.runs)
    if frame.empty:
        return None
    rows = []
    for key, group in frame.groupby([*GROUP, "algorithm", "kind"], sort=False):
        cells = [Cell(str(word)) for word in key]
        full = group["full"].max()
        cells.append(Cell("-" if pd.isna(full) else f"{full:.2f}", -1.0 if pd.isna(full) else full))
        for row in group.itertuples():
            order = 9.0 if pd.isna(row.kept) else row.kept
            cells.append(Cell(row.reason or captions.best(row), order))
        rows.append(cells)
    titles = ["model", "benchmark", "data set", "algorithm", "budgets", "full score"]
    table = Table([*titles, *(f"within {within}%" for within in results.WITHIN)], rows, ["full score"])
    return Section("cheapest", "How little KV is enough", captions.CHEAPEST, frame, table=table)


def all_runs(tables: Results) -> Section | None:
    """Every run, with what made it."""
    frames = [frame for frame in (tables.runs, tables.fidelity) if not frame.empty]
    if not frames:
        return None
    frame = pd.concat(frames)
    rows = [captions.run_cells(row) for row in frame.to_dict("records")]
    columns = [name for name in rows[0] if any(row[name][0] not in ("", "-") for row in rows)]
    cells = [[Cell(*row[name]) for name in columns] for row in rows]
    numbers = [name for name in columns if name in captions.NUMBERS]
    return Section("runs", "All runs", captions.RUNS, frame, table=Table(columns, cells, numbers, captions.ASIDE))
