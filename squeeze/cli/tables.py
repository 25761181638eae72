"""Tables as text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from squeeze.text import printable


def table(columns: Sequence[str], lines: Sequence[Mapping[str, str]]) -> str:
    """Lines as a Markdown table whose columns are aligned."""
    # A `|` in a cell must not end it.
    rows = [{name: re.sub(r"(\\*)\|", r"\1\1\\|", printable(line[name])) for name in columns} for line in lines]
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in columns}
    text = [[name.ljust(widths[name]) for name in columns], ["-" * widths[name] for name in columns]]
    text += [[row[name].ljust(widths[name]) for name in columns] for row in rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in text)
