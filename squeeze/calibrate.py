"""Measure a model's loss curves for `--allocation calibrated`: `python -m squeeze.calibrate --help`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from tqdm import tqdm

from squeeze.allocations import calibration
from squeeze.benchmarks.longbench.prompts import chat_settings
from squeeze.benchmarks.records import NoStats
from squeeze.cli.arguments import Parser, as_path
from squeeze.cli.run import run_command
from squeeze.errors import InputError
from squeeze.evictors import EVICTORS
from squeeze.numbers import parse_fraction
from squeeze.ranks import ALONE
from squeeze.runs.execute import load
from squeeze.runs.folder import Run, versions
from squeeze.runs.jobs import Job, prepare
from squeeze.runs.samples import Samples
from squeeze.runs.spec import FLAGS, RunSpec, command_line
from squeeze.storage.files import write_json, writing
from squeeze.storage.paths import shipped
from squeeze.storage.schema import Count, Nats, Positive
from squeeze.text import file_name, say

EXAMPLES = """examples
  the embedded model under H2O, on prompts that the project ships:
    python -m squeeze.calibrate --model SmolLM2-135M --algorithm h2o
  your model, on prompts of your own kind:
    python -m squeeze.calibrate --model Mistral --algorithm sliding_window --device cuda:0 \\
        --data_dir my_rows --datasets samsum,qasper --sample_num 4
  what it is for:
    python pred.py --model Mistral --enable_squeeze --ini_size 0.2 --allocation calibrated

It is done once for a model and an eviction method. An interrupted calibration goes on when it is started again.
"""
#: Of the embedded rows: a story, a paper, articles, a report, a meeting, news, questions by example and code.
DATASETS = "narrativeqa,qasper,hotpotqa,gov_report,qmsum,multi_news,triviaqa,repobench-p"


class MeasuredSample(TypedDict):
    """A prompt's loss curves, `(shares, layers, multiples)`."""

    dataset: str
    row: Count
    prompt_tokens: Positive
    loss: list[list[list[Nats]]]
    index: Count
    stats: NoStats


def parser() -> Parser:
    """The flags of `python -m squeeze.calibrate`."""
    made = Parser(
        prog="python -m squeeze.calibrate",
        description="Measure how much the output loses when a layer's cache is cut, for --allocation calibrated.",
        epilog=EXAMPLES,
    )
    FLAGS["model"].add_to(made, help="as in pred.py")
    FLAGS["model_path"].add_to(made, help="as in pred.py")
    FLAGS["algorithm"].add_to(made, help="any eviction method that pred.py takes (default: the architecture's)")
    replace(FLAGS["start_size"], also=()).add_to(made, help="as in pred.py (default: 4)")
    made.add_argument(
        "--per",
        default="layer",
        choices=("layer", "head"),
        help="what is cut by itself: a layer (default), or a KV head, for pred.py --per head, which takes as many "
        "times longer as a layer has heads",
    )
    made.add_argument(
        "--ini_size", nargs="+", default=["0.1", "0.2", "0.4"], help="sizes to measure at (default: 0.1 0.2 0.4)"
    )
    FLAGS["data_dir"].add_to(made, help="rows in LongBench's format (default: those that the project ships)")
    FLAGS["datasets"].add_to(made, default=DATASETS, help=f"which of them (default: {DATASETS})")
    FLAGS["sample_num"].add_to(made, default=1, help="prompts of each data set (default: 1)")
    FLAGS["device"].add_to(made, help="as in pred.py")
    FLAGS["dtype"].add_to(made, help="as in pred.py")
    made.add_argument("--overwrite", action="store_true", help="measure anew what is there")
    made.add_argument(
        "--out", type=as_path, help="the file to write (default: config/calibration/MODEL-ALGORITHM.json)"
    )
    return made


def spec_of(args: argparse.Namespace) -> RunSpec:
    """The run whose model, data and eviction method are measured, as the flags name them."""
    names = ("model", "model_path", "algorithm", "start_size", "datasets", "sample_num", "device", "dtype")
    values = {name: getattr(args, name) for name in names}
    values["data_dir"] = args.data_dir or str(shipped("data/longbench"))
    # For the record only: what prepares the same model and data in pred.py.
    words = ["--enable_squeeze", "--ini_size", "1", "--KV_class3", "1"]
    words += [f"--{name}={value}" for name, value in values.items() if value is not None]
    return RunSpec(enable_squeeze=True, ini_size="1", KV_class3="1", **values, command=command_line(words))


def calibrate(argv: Sequence[str] | None = None) -> None:
    """Measure and write a file of loss curves.

    Raises:
        InputError: a flag, the model or a prompt is wrong.
    """
    args = parser().parse_args(argv)
    shares = sorted({parse_fraction("ini_size", size) for size in args.ini_size})
    if not all(0 < share <= 1 for share in shares):
        raise InputError(f"--ini_size must be in (0, 1], got {', '.join(args.ini_size)}")
    job = prepare(spec_of(args), ALONE)
    from squeeze.engine import loss_curves

    assert job.config is not None and job.config.algorithm_name is not None
    algorithm, evictor, name = job.config.algorithm_name, job.config.evictor, job.source.name
    out = args.out or calibration.curves_file(name, algorithm, args.per, to_write=True)
    if out.is_dir():
        raise InputError(f"--out {out} is a folder: give the name of a file")
    method = {
        "algorithm": algorithm,
        "start_size": evictor.sinks if evictor.has("sinks") else None,
        **EVICTORS.record(algorithm, evictor),
        "shares": [str(share) for share in shares],
        "multiples": [str(multiple) for multiple in loss_curves.MULTIPLES],
        "tail": loss_curves.TAIL,
    }
    origins = [{"dataset": data.dataset, **data.origin, "source": _shown(data.origin["source"])} for data in job.data]
    rows = [(data, row) for data in job.data for row in range(job.count(data))]
    settings = {key: job.settings[key] for key in ("model", "dtype", "max_length")} | method
    settings |= {"per": "head"} if args.per == "head" else {}
    folder = Path("calibration") / name / (file_name(algorithm) + ("-heads" if args.per == "head" else ""))
    with Run(folder, settings, job.info, args.overwrite, MeasuredSample) as run:
        measured = {"data": origins, "rows": [[data.dataset, row] for data, row in rows]}
        formats = {data.dataset: chat for data in job.data if (chat := chat_settings(data.dataset, name, False))}
        samples = run.open("curves", measured | ({"chat_formats": formats} if formats else {}), len(rows))
        check_whole(samples, len(shares), len(loss_curves.MULTIPLES))
        run.start(samples)
        if samples.missing:
            measure(job, samples, rows, shares, args.per == "head")
        run.finish(samples, lambda stats: {"samples": len(stats)})
    losses = np.array([record["loss"] for record in samples.records])
    if args.per == "head":
        from squeeze.models.cached_layers import own_layers
        from squeeze.models.folder_config import model_config

        method = method | {"kv_heads": [layer.kv_heads for layer in own_layers(model_config(job.model_folder))]}
    content = {
        "version": calibration.VERSION,
        **method,
        "model": job.settings["model"],
        "name": name,
        "dtype": job.settings["dtype"],
        "prompts": [{key: record[key] for key in ("dataset", "row", "prompt_tokens")} for record in samples.records],
        "data": origins,
        "versions": versions(),
        "loss": np.round(losses, 7).tolist(),
    }
    with writing(out, f"; what was measured is in {folder}"):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, content)
    parts = "attention layers" if args.per == "layer" else "KV heads"
    say(f"{out}: loss curves of {losses.shape[2]} {parts} at {len(shares)} sizes, {len(losses)} prompts")


def check_whole(samples: Samples, shares: int, multiples: int) -> None:
    """Raises InputError where the curves that are there are not those of one model."""
    layers = {len(curves) for record in samples.records for curves in record["loss"]}
    lengths = {len(curve) for record in samples.records for curves in record["loss"] for curve in curves}
    counts = {len(record["loss"]) for record in samples.records}
    if samples.records and (counts, lengths, len(layers)) != ({shares}, {multiples}, 1):
        raise InputError(f"{samples.folder} has curves that are not whole: --overwrite measures them anew")


def _shown(source: str) -> str:
    """The source of rows, as a path within the project where it ships them."""
    path, top = Path(source), shipped("")
    return path.relative_to(top).as_posix() if path.is_relative_to(top) else source


def measure(
    job: Job, samples: Samples, rows: Sequence[tuple[Any, int]], shares: Sequence[Fraction], per_head: bool
) -> None:
    """Measure the prompts that are missing, and say before what it costs."""
    from squeeze.devices import unless_out_of_memory
    from squeeze.engine import loss_curves

    with load([job]) as engine:
        assert engine.squeezed is not None
        run, tokenizer = engine.squeezed, engine.tokenizer
        parts = sum(run.kv_heads) if per_head else len(run.layers)
        wanted = [rows[index] for index in samples.missing]
        most = {data.dataset: 1 + row for data, row in wanted}  # rows come in order
        encoded = {
            data.dataset: job.benchmark.encode(tokenizer, data, most[data.dataset], job.options)
            for data in job.data
            if data.dataset in most
        }
        prompts = {index: encoded[rows[index][0].dataset][rows[index][1]].tokens for index in samples.missing}
        total = sum(loss_curves.cost(len(tokens), len(shares), parts) for tokens in prompts.values())
        print(f"{len(prompts)} prompts, {total:,} tokens to run")
        with tqdm(total=total, unit="token", unit_scale=True, desc=job.config and job.config.algorithm_name) as bar:
            for index, tokens in prompts.items():
                data, row = rows[index]
                curves = partial(loss_curves.measure, run, tokens, shares, bar.update, per_head)
                loss = unless_out_of_memory(curves)
                if loss is None:
                    where = f"row {row} of {data.dataset} alone, {len(tokens)} tokens"
                    raise InputError(f"out of memory with {where}: take shorter ones")
                made = {"dataset": data.dataset, "row": row, "prompt_tokens": len(tokens)}
                samples.append([{"index": index, **made, "loss": loss, "stats": NoStats()}])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 2 and a sentence where something is wrong."""
    return run_command(lambda _: calibrate(argv))


if __name__ == "__main__":
    sys.exit(main())
