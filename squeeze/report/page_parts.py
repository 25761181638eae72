"""The parts of a page: sections of figures and tables, and the names of files and panels."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from squeeze.benchmarks.longbench.benchmark import LONGBENCH
from squeeze.benchmarks.registry import titled
from squeeze.text import fitted


@dataclass
class Plot:
    """Args:
    name: of its files, without a suffix.
    figure: what is drawn.
    caption: what is seen, in words; also the text for those who cannot see it.
    wide: True if it needs a row of the page for itself.
    """

    name: str
    figure: Figure
    caption: str
    wide: bool = False


@dataclass
class Cell:
    """A cell of a table: its text and what it is sorted by."""

    text: str
    order: Any = None
    code: bool = False


@dataclass
class Table:
    """A table of the page; `numbers` are the columns that stand at the right, `aside` those that are not printed."""

    columns: Sequence[str]
    rows: list[list[Cell]]
    numbers: Sequence[str] = ()
    aside: Sequence[str] = ()


@dataclass
class Section:
    """Args:
    name: of its anchor and of its CSV.
    title: its heading.
    lead: how to read it.
    data: what its figures or table show, for the CSV.
    plots: its figures.
    table: its table.
    notes: what is missing, and why.
    """

    name: str
    title: str
    lead: str
    data: pd.DataFrame
    plots: list[Plot] = field(default_factory=list)
    table: Table | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class Sections:
    """The page's sections, what was left out, and which commands would score the runs that have no score."""

    sections: list[Section]
    problems: list[str]
    unscored: list[str]


class Names:
    """File names made of the user's words, each given once."""

    def __init__(self) -> None:
        self.given: set[str] = set()

    def __call__(self, *words: str) -> str:
        """A name that no other figure has."""
        name = "-".join(re.sub(r"[^A-Za-z0-9._]+", "-", word).strip("-.")[:60] for word in words if word)
        count, unique = 1, name
        while unique.lower() in self.given:
            count += 1
            unique = f"{name}-{count}"
        self.given.add(unique.lower())
        return unique


def data_name(row: Any) -> str:
    """A data set and, where it is not LongBench, nor called as its benchmark is, its benchmark."""
    benchmark = titled(row.benchmark)
    known = benchmark is LONGBENCH or benchmark.name == row.dataset
    return row.dataset if known else f"{row.dataset}, {row.benchmark}"


def heading(row: Any, *more: str) -> str:
    """A panel's title."""
    return "\n".join((" · ".join(fitted(word, 60) for word in (data_name(row), *more)), fitted(row.model, 120)))


def label_of(row: Any) -> str:
    """The label of the axis of scores."""
    return titled(row.benchmark).score_label


def panel_name(names: Names, kind: str, row: Any, *more: str) -> str:
    """The name of a panel's files."""
    benchmark = "" if data_name(row) == row.dataset else titled(row.benchmark).name
    return names(kind, row.model, benchmark, row.dataset, *more)
