"""Tables as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def table(columns: Sequence[str], lines: Sequence[Mapping[str, str]]) -> str:
    """Lines as a Markdown table whose columns are aligned."""
    widths = {name: max(len(name), *(len(line[name]) for line in lines)) for name in columns}
    text = [[name.ljust(widths[name]) for name in columns], ["-" * widths[name] for name in columns]]
    text += [[line[name].ljust(widths[name]) for name in columns] for line in lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in text)
