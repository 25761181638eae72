"""Throughput and memory of caches, each configuration in its own process: `python -m squeeze.bench --help`."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from random import Random
from typing import Any

from tqdm import tqdm

from squeeze.bench.configurations import specs
from squeeze.bench.files import bandwidth, full_speeds
from squeeze.bench.flags import read_flags
from squeeze.bench.processes import run, turns
from squeeze.bench.tables import COLUMNS, LEGEND, fitting, plot, row
from squeeze.bench.throughput import fits, lines, named, shape
from squeeze.benchmarks.longbench.data import build_prompt, load_data
from squeeze.cli.tables import table
from squeeze.errors import InputError
from squeeze.models import sources
from squeeze.storage.files import write_json, write_whole, writing
from squeeze.text import say

#: Tokens of made-up prompts for a model with random weights, which has no tokenizer.
MADE_UP = 20_000


def main(argv: Sequence[str] | None = None) -> None:
    args = read_flags(argv)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write into {args.out}: {error.strerror}") from None
    if args.peer_python is not None:
        program = shutil.which(args.peer_python)
        if program is None:
            raise InputError(f"--peer_python {args.peer_python} is no program that can be run")
        args.peer_python = os.path.abspath(program)  # links as they are: they tell Python its environment
    folder, tokens, identity = model_of(args)

    from squeeze.devices import pick_device, pick_dtype

    device = pick_device(args.device)
    args.device = str(device)  # a GPU with its number
    for dtype in args.dtype:
        pick_dtype(dtype, device)
    if "graphed" in args.caches:
        from squeeze.engine.graph import check_device

        check_device(device)
    todo = specs(args, folder, tokens, identity)
    records: list[dict[str, Any]] = []
    shared: dict[str, Any] = {}
    together = groupby(todo, key=lambda spec: spec["batch_size"] if args.in_turns else id(spec))  # id: each alone
    with tqdm(total=sum(map(turns, todo)), unit="turn") as bar:
        full_up: set[str] = set()  # caches of which a smaller batch did not fit already
        for _, grouped in together:
            asked = list(grouped)
            group = [spec for spec in asked if named(spec) not in full_up]
            bar.update(sum(turns(spec) for spec in asked if spec not in group))
            for record in run(group, shared, bar):
                records.append(record)
                if args.throughput and fits(record, record["spec"]["memory"]) is False:
                    full_up.add(named(record["spec"]))
                with writing(args.out / "bench.json"):
                    write_json(args.out / "bench.json", {"machine": platform.platform(), "runs": records})
                bar.write(table(COLUMNS, [row(record, bandwidth(records))]).splitlines()[-1])
    if not args.throughput:
        copies, full = bandwidth(records), full_speeds(records)
        print(table(COLUMNS, [row(record, copies, full.get(record["spec"]["batch_size"])) for record in records]))
        print(LEGEND)
        print(f"limit: weights and KV read once, at the {copies / 1e9:.1f} GB/s of a copy (median of all processes)")
    for record in records:
        if "error" in record["result"]:
            say(f"{record['spec']['engine']} {record['spec']['cache']}: {record['result']['error']}")
    if all("error" in record["result"] for record in records):
        raise InputError("nothing could be measured")
    if args.throughput:
        print("\n".join(lines(records, todo[0]["memory"])))
    elif args.memory_gb:
        for name, batch in fitting(records, 1e9 * args.memory_gb).items():
            print(f"{name}: batches of up to {batch} fit into {args.memory_gb:g} GB")
    with writing(args.out / "bench.png"):
        # A line ends where memory does.
        shown = [record for record in records if not args.throughput or fits(record, record["spec"]["memory"])]
        write_whole(args.out / "bench.png", plot(shown))
    say(f"{args.out / 'bench.json'} {args.out / 'bench.png'}")


def model_of(args: argparse.Namespace) -> tuple[Path, list[int], dict[str, Any]]:
    """The model's folder, tokens of a text that prompts are cut from, and what tells the model from others.

    Raises:
        InputError: the model or the text is not there.
    """
    if args.random_weights is not None:
        from squeeze.models.folder_config import model_config

        folder = shape(args.random_weights, args.out)
        vocabulary, chance = model_config(folder).get_text_config().vocab_size, Random(0)
        return folder, [chance.randrange(vocabulary) for _ in range(MADE_UP)], {}
    source = sources.resolve(args.model, args.model_path)
    folder = sources.fetch(source)
    data = load_data("samsum", args.data_dir)

    from squeeze.models.loading import load_tokenizer

    text = "\n\n".join(build_prompt("samsum", sample) for sample in data.rows[:8])
    return folder, load_tokenizer(folder)(text).input_ids, sources.identity(source, folder)
