"""Sections → the files of a report: one page that loads nothing, the figures beside it, and their data as CSV."""

from __future__ import annotations

from base64 import b64encode
from importlib.metadata import version
from importlib.resources import files as package_files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from squeeze.report import figures, results
from squeeze.report.page_parts import Sections
from squeeze.text import printable


def files(made: Sections, command: str) -> dict[str, bytes]:
    """Every file of a report, by its name.

    Args:
        command: the command line that makes it.
    """
    written: dict[str, bytes] = {}
    shown: list[dict[str, Any]] = []
    for section in made.sections:
        csv = f"{section.name}.csv"
        written[csv] = results.to_csv(section.data).encode()
        plots = []
        for plot in section.plots:
            svg = figures.render(plot.figure, "svg", command)
            written[f"{plot.name}.svg"] = svg
            written[f"{plot.name}.png"] = figures.render(plot.figure, "png", command)
            width = round(96 * plot.figure.get_size_inches()[0])
            plots.append({"plot": plot, "uri": data_uri("image/svg+xml", svg), "width": width})
        shown.append({"section": section, "csv": csv, "plots": plots})
    bundle = package_files("itables") / "html"
    environment = Environment(
        loader=PackageLoader("squeeze.report", "."),
        autoescape=True,  # names of models and folders are the user's
        finalize=lambda value: printable(value) if type(value) is str else value,  # but not marked-up text
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(
        shown=shown,
        problems=made.problems,
        unscored=made.unscored,
        command=command,
        tables_version=version("itables"),
        tables_css=Markup((bundle / "dt_bundle.css").read_text("utf-8")),
        tables_js=data_uri("text/javascript", (bundle / "dt_bundle.js").read_bytes()),
    )
    return {"index.html": page.encode(), **written}


def data_uri(kind: str, content: bytes) -> str:
    """Content as a link that holds it."""
    return f"data:{kind};base64,{b64encode(content).decode()}"
