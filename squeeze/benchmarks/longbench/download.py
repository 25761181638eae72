"""The command that fetches LongBench and checks it: `python -m squeeze.longbench download`."""

from __future__ import annotations

from collections.abc import Sequence

from squeeze.benchmarks.longbench.data import LONGBENCH_E, load_data, prompt_formats
from squeeze.cli.arguments import Parser
from squeeze.errors import InputError
from squeeze.text import say

#: Rows of each data set as published, where they are not 200.
ROWS = {"multifieldqa_en": 150, "lcc": 500, "repobench-p": 500}


def download() -> None:
    """Fetch LongBench from the Hub, unless it is cached, and check every row of every data set.

    Raises:
        InputError: it cannot be read, a row is not one of LongBench's, or rows are missing.
    """
    for task, datasets in (("Long", tuple(prompt_formats())), ("e", LONGBENCH_E)):
        for dataset in datasets:
            data = load_data(dataset, None, task)
            expected = ROWS.get(dataset, 200)
            if task == "Long" and len(data.rows) != expected:
                raise InputError(f"{data.source} has {len(data.rows)} rows, and LongBench published {expected}")
            say(f"{data.source}: {len(data.rows)} rows, sha256 {data.sha256[:16]}, revision {data.revision}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="python -m squeeze.longbench", description="Get LongBench's data from the Hugging Face Hub.")
    parser.add_argument("command", choices=["download"], help="fetch everything once, and check every row")
    parser.parse_args(argv)
    download()
