"""Runs side by side, as text or as a page with figures: `python -m squeeze.report --help`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from squeeze.bench import tables as bench
from squeeze.bench.files import bandwidth, full_speeds, read_bench
from squeeze.cli.arguments import Parser, as_path
from squeeze.cli.run import run_command
from squeeze.cli.tables import table
from squeeze.errors import InputError
from squeeze.report import distance, paired
from squeeze.runs.inventory import COLUMNS, GO_ON, Entry, Inventory, at_once, describe, find
from squeeze.storage.files import read_json, write_whole, writing
from squeeze.text import printable, say

FIDELITY_COLUMNS = (*COLUMNS[:6], "KL", "95% interval", "agreement", "KV kept", "tokens")
#: So many data sets that are not finished are each named in a line of their own.
UNFINISHED = 5
EXAMPLES = """examples
  every run below pred_Long as a table, with the scores that eval.py wrote:
    python -m squeeze.report pred_Long
  the same, and a page with figures, tables and their data; scores are computed from the predictions:
    python -m squeeze.report pred_Long --out report
  several benchmarks, and the measurements of python -m squeeze.bench:
    python -m squeeze.report pred_Long pred_e pred_xsum bench/bench.json --out report
  of runs of pred.py --fidelity: what each allocation gains over uniform budgets, on the same samples; and in scores:
    python -m squeeze.report pred_Long --against uniform --wide --figure kl.png
    python -m squeeze.report pred_ruler --against uniform --wide --score

The page, report/index.html, is one file that needs nothing beside it, no network and no server. The figures lie beside
it as SVG and PNG, and what they show as CSV. A run that is not finished, or damaged, is named and left out. Nothing is
kept from one report to the next: what is there now is what is shown.
"""


def parser() -> Parser:
    """The flags of `python -m squeeze.report`."""
    made = Parser(
        prog="python -m squeeze.report",
        description="Show runs side by side: scores, KV kept and speed, as text tables or as a page with figures.",
        epilog=EXAMPLES,
    )
    made.add_argument(
        "runs",
        nargs="+",
        type=as_path,
        metavar="RUNS",
        help="run folders, or folders that hold any, like pred_Long; also bench.json of squeeze.bench, or its folder",
    )
    made.add_argument(
        "--out",
        type=as_path,
        metavar="FOLDER",
        help="write a page with figures into this folder, which must be new, empty, or an earlier report's",
    )
    made.add_argument(
        "--against",
        metavar="ALLOCATION",
        help="in place of the tables: the KL divergence from the full cache of every allocation, mean over data sets, "
        "and how much it is less than this one's on the same samples, with a 95%% interval",
    )
    made.add_argument("--wide", action="store_true", help="with --against: a line for each method and size")
    made.add_argument(
        "--score", action="store_true", help="with --against: the scores of predictions, and how much more they are"
    )
    made.add_argument(
        "--figure",
        type=as_path,
        metavar="FILE",
        help="with --against: draw KL, or scores, over size into this .png or .svg, a panel for each method",
    )
    return made


def rows(folder: Path) -> list[dict[str, str]]:
    """One run's line for each of its finished data sets: the columns and `dataset`, as text."""
    entries = [entry for entry in find([folder / "run.json"]).entries if not entry.fidelity]
    return [line(entry, recorded_score(entry)) for entry in entries]


def line(entry: Entry, score: Any) -> dict[str, str]:
    """A line of the table of scores.

    Args:
        score: a number, or several by name; None where there is none.
    """
    summary, together = entry.summary, entry.start.get("together", 1)
    return describe(entry.settings, summary) | {
        "dataset": entry.dataset,
        "model": entry.start["model"]["name"],
        "score": _text(score),
        "KV kept": f"{100 * summary['kept']:.1f}%",
        "KV MB": f"{summary['kv_bytes'] / 1e6:.1f}",
        "tokens/s": f"{summary['tokens_per_second']:.1f}" + at_once(together),
        "samples": str(summary["samples"]),
    }


def recorded_score(entry: Entry) -> Any:
    """The score that `eval.py`, or HELM, wrote into the run's folder; None if none did.

    Raises:
        InputError: what is there is damaged.
    """
    path = entry.folder / "result.json"
    kind: Any = dict[str, distance.Percent | dict[str, distance.Percent | None]]
    return read_json(path, kind).get(entry.dataset) if path.exists() else None


def _text(score: Any) -> str:
    """A score as text; LongBench-E has one for each range of lengths, shortest first, HELM one for each ROUGE."""
    if isinstance(score, dict):
        return "/".join(_text(value) for value in score.values())
    return f"{score:.2f}" if isinstance(score, int | float) else "-"


def fidelity_line(entry: Entry) -> dict[str, str]:
    """A line of the table of comparisons with the full cache."""
    summary = entry.summary
    cells = describe(entry.settings, summary) | {"dataset": entry.dataset, "model": entry.start["model"]["name"]}
    cells |= {"samples": str(summary["samples"]), "KV kept": f"{100 * summary['kept']:.1f}%"}
    cells |= distance.cells(summary) | {"95% interval": "-", "tokens": str(summary.get("tokens", "-"))}
    if "kl" in summary:
        cells["95% interval"] = f"{summary['kl']['low']:.4f}–{summary['kl']['high']:.4f}"
    return cells


def print_tables(inventory: Inventory, scores: dict[tuple[str, str], Any] | None = None) -> None:
    """Print a table for every data set, the full cache first, then as the folders came.

    Args:
        scores: of (folder, data set), in place of what was written beside the runs; what is not in it is left out.
    Raises:
        InputError: there is nothing that could be printed.
    """
    benches = []
    entries = [entry for entry in inventory.entries if scores is None or (str(entry.folder), entry.dataset) in scores]
    measured = distance.measured(entries, inventory.problems)
    lines, compared = [], []
    scales: dict[str, str] = {}
    for number, entry in enumerate(entries):
        if entry.fidelity:
            compared.append(fidelity_line(entry))
            continue
        score = None
        try:
            score = recorded_score(entry) if scores is None else scores[str(entry.folder), entry.dataset]
        except InputError as error:
            inventory.problems.append(str(error))
        lines.append(line(entry, score) | distance.cells_beside(entry, measured.get(number)))
        scales.setdefault(entry.dataset, entry.benchmark.scale)
    for path in inventory.benches:
        try:
            benches.append((path, read_bench(path)["runs"]))
        except InputError as error:
            inventory.problems.append(str(error))
    if not lines and not compared and not benches:
        raise InputError("; ".join(inventory.problems))
    for dataset, scale in scales.items():
        chosen = [row for row in lines if row["dataset"] == dataset]
        heading = f"{dataset}: {scale}; KV is what is held after prefill, mean of the samples"
        columns: Sequence[str] = COLUMNS
        if any(run.entry.dataset == dataset for run in measured.values()):
            heading += "; KL in nats a token, and agreement of the likeliest token, are with the full cache"
            columns = (*COLUMNS[:7], *distance.COLUMNS, *COLUMNS[7:])
        say(heading)
        print(table(columns, sorted(chosen, key=lambda row: row["algorithm"] != "full cache")))
    for dataset in dict.fromkeys(row["dataset"] for row in compared):
        say(f"{dataset}: KL divergence from the full cache, nats a token, and agreement of the likeliest token")
        print(table(FIDELITY_COLUMNS, [row for row in compared if row["dataset"] == dataset]))
    for path, records in benches:
        print_bench(path, records)
    together: dict[tuple[str, str], list[distance.Measured]] = {}
    for run in measured.values():
        together.setdefault((run.entry.start["model"]["name"], run.entry.dataset), []).append(run)
    for (model, dataset), runs in together.items():
        say(distance.sentence(model, dataset, runs))


def print_bench(path: Path, records: Sequence[Any]) -> None:
    """Print the table that `squeeze.bench` printed."""
    copies, full = bandwidth(records), full_speeds(records)
    made = [bench.row(record, copies, full.get(record["spec"]["batch_size"])) for record in records]
    if made:
        say(f"{path}: speed and memory by squeeze.bench")
        print(table(bench.COLUMNS, made))


def print_paired(
    inventory: Inventory, against: str, quantity: paired.Quantity, wide: bool, figure: Path | None, command: str
) -> None:
    """Print what each allocation gains over another, and draw it; see `squeeze.report.paired`.

    Raises:
        InputError: there is nothing to compare, the figure would have several models, or cannot be written.
    """
    found = paired.lines(inventory, against, quantity)
    shown = paired.side_by_side(found, against, quantity) if wide else found
    columns = list(dict.fromkeys(name for line in shown for name in line))
    print(table(columns, [dict.fromkeys(columns, "-") | line for line in shown]))
    if figure is not None:
        from squeeze.report.figures import render
        from squeeze.report.paired_figure import over_size

        if "model" in columns:
            raise InputError("--figure draws the runs of one model: name its folder alone")
        with writing(figure):
            figure.parent.mkdir(parents=True, exist_ok=True)
            write_whole(figure, render(over_size(found, quantity), figure.suffix[1:], command))


def report(argv: Sequence[str] | None = None) -> None:
    """Print the tables, and with `--out` write the page.

    Raises:
        InputError: there is no finished run, or the folder of `--out` is not the command's own.
    """
    args = parser().parse_args(argv)
    for flag, value in (("wide", args.wide), ("score", args.score), ("figure", args.figure is not None)):
        if value and args.against is None:
            raise InputError(f"--{flag} is for --against")
    if args.against is not None and args.out is not None:
        raise InputError("--against prints a table: leave --out out")
    if args.figure is not None and args.figure.suffix not in (".png", ".svg"):
        raise InputError(f"--figure {printable(args.figure)} must end in .png or .svg")
    command = shlex.join(["python", "-m", "squeeze.report", *(sys.argv[1:] if argv is None else argv)])
    inventory = find(args.runs)
    if not inventory.entries and not inventory.benches:
        if inventory.damaged:
            raise InputError("; ".join(inventory.problems))
        raise InputError(f"no run in {', '.join(map(str, args.runs))} is finished: start pred.py again to go on")
    if args.out is None:
        if args.against is None:
            print_tables(inventory)
        else:
            quantity = paired.SCORE if args.score else paired.KL
            print_paired(inventory, args.against, quantity, args.wide, args.figure, command)
        say_left_out(inventory.problems, sys.stderr)
        return

    from squeeze.report import page, results, sections  # pandas and matplotlib, of which the text tables know nothing
    from squeeze.report.files import check_folder, write_folder

    check_folder(args.out)
    read = results.read(inventory)
    if not (len(read.runs) or len(read.fidelity) or len(read.bench)):
        raise InputError("; ".join(read.problems))
    scores = {(row["folder"], row["dataset"]): results.shown_score(row) for row in read.runs.to_dict("records")}
    scores |= {(row["folder"], row["dataset"]): None for row in read.fidelity.to_dict("records")}
    print_tables(inventory, scores)
    made = sections.make(read)
    say_left_out(made.problems)
    for scorer in read.unscored:
        say(f"not scored yet: {scorer}")
    say(write_folder(args.out, page.files(made, command)))


def say_left_out(problems: Sequence[str], file: TextIO | None = None) -> None:
    """A line for each thing that was left out, but one for all that are only not finished, where these are many."""
    unfinished = [problem for problem in problems if problem.endswith(GO_ON)]
    many = len(unfinished) > UNFINISHED
    for problem in problems:
        if not (many and problem in unfinished):
            say(f"left out: {problem}", file)
    if many:
        say(f"left out: {len(unfinished)} data sets of runs that are not finished, such as {unfinished[0]}", file)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 2 and a sentence where there is nothing to show."""
    return run_command(lambda _: report(argv))
