"""Which models can be squeezed, by which methods, and why not: `python -m squeeze.models_table --help`."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

from squeeze.cli.arguments import Parser, as_path, path_text
from squeeze.cli.tables import table
from squeeze.errors import InputError
from squeeze.storage.files import write_whole, writing
from squeeze.text import say

EXAMPLES = """examples
  your model, whatever its architecture: is it squeezed rightly, by which methods?
    python -m squeeze.models_table --model my_model
  some architectures, as tiny random models; all of them without a name:
    python -m squeeze.models_table llama gemma3_text
  the table of docs/models.md, which takes the better part of an hour:
    python -m squeeze.models_table --out docs/models.md
"""
#: Where a page has the table.
BEGIN, END = "<!-- the table: begin -->\n", "<!-- the table: end -->\n"
#: Tokens that are decoded with a real model, whose steps take longer than those of a tiny one.
REAL_STEPS = 8


def parser() -> Parser:
    """The flags of `python -m squeeze.models_table`."""
    made = Parser(
        prog="python -m squeeze.models_table",
        description="Put models through every check of a squeezed cache, and print a row of a table for each.",
        epilog=EXAMPLES,
    )
    made.add_argument("names", nargs="*", metavar="NAME", help="tiny models of the table (default: all)")
    made.add_argument(
        "--model",
        type=path_text,
        help="a real model, by its folder or by a name as in pred.py; on the CPU, in float32",
    )
    made.add_argument("--out", type=as_path, help="a page to write the whole table into, between its two markers")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, or write it into a page.

    Returns:
        1 where a model that can be squeezed does not compute what it should, else 0.
    Raises:
        InputError: a name is not known, the model cannot be loaded, or the page has no place for the table.
    """
    args = parser().parse_args(argv)
    if sum(map(bool, (args.names, args.model, args.out))) > 1:
        raise InputError("NAMES, --model and --out exclude each other: --out writes the whole table")
    page = None if args.out is None else _page(args.out)
    start, rows = time.monotonic(), []
    for row in _real(args.model) if args.model else _tiny(args.names):
        rows.append(row)
        say(f"{time.monotonic() - start:5.0f} s  {'  '.join(filter(None, row.values()))}", sys.stderr)
    from squeeze.models_table.rows import COLUMNS

    text = table(COLUMNS, rows)
    if page is None:
        print(text)
    else:
        versions = " and ".join(f"{name} {version(name)}" for name in ("transformers", "torch"))
        with writing(args.out):
            write_whole(args.out, f"{page[0]}{BEGIN}{len(rows)} models, with {versions}:\n\n{text}\n{END}{page[1]}")
    return int(any("WRONG" in row.values() for row in rows))


def _page(path: Path) -> tuple[str, str]:
    """What a page has before its table, and after it."""
    before, begun, rest = path.read_text("utf-8").partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not begun or not ended:
        raise InputError(f"{path} has no place for the table: the lines {BEGIN.strip()} and {END.strip()}")
    return before, after


def _tiny(names: Sequence[str]) -> Iterator[dict[str, str]]:
    from squeeze.models_table.rows import row
    from squeeze.models_table.zoo import ZOO, build

    unknown = [name for name in names if name not in ZOO]
    if unknown:
        raise InputError(f"there is no tiny model {unknown[0]}: there are {', '.join(ZOO)}")
    _quiet()
    for name in names or ZOO:
        yield row(name, build(name))


def _real(name: str) -> Iterator[dict[str, str]]:
    import torch

    from squeeze.models import loading, sources
    from squeeze.models_table.rows import row

    folder = sources.fetch(sources.resolve(name))
    model, _ = loading.load(folder, torch.device("cpu"), torch.float32, "eager")
    _quiet()
    yield row(Path(name).name, model, REAL_STEPS)


def _quiet() -> None:
    """transformers says of some architectures which kernels it does without."""
    from transformers.utils import logging

    logging.set_verbosity_error()
