"""Throughput and memory of caches, each configuration in its own process: `python -m squeeze.bench --help`."""

from __future__ import annotations

import argparse
import io
import os
import platform
import shutil
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from random import Random
from typing import Any

from tqdm import tqdm

from squeeze.allocations import ALLOCATIONS
from squeeze.bench.files import bandwidth, full_speeds, speed
from squeeze.bench.processes import run, turns
from squeeze.bench.throughput import PRESETS, fits, lines, memory_of, named, shape
from squeeze.benchmarks.longbench.data import build_prompt, load_data
from squeeze.cli.arguments import Parser, as_path, path_text, real, whole
from squeeze.cli.tables import table
from squeeze.config import DTYPES, PER, SqueezeConfig
from squeeze.errors import InputError
from squeeze.evictors import EVICTORS
from squeeze.models import sources
from squeeze.numbers import parse_fraction
from squeeze.runs.resolve import with_curves
from squeeze.storage.files import write_json, write_whole, writing
from squeeze.storage.paths import config_file, shipped
from squeeze.text import say

EXAMPLES = """examples
  the embedded model, full, uniform and squeezed caches, one prompt and batches of 8:
    python -m squeeze.bench --batch_size 1 8 --prompt_length 4096 --ini_size 0.2 --KV_class3 0.12
  beside Hugging Face's DynamicCache; and NVIDIA's kvpress, which needs an environment of its own:
    python3.11 -m venv .venv-peers && .venv-peers/bin/pip install -r requirements-peers.txt
    python -m squeeze.bench --peers --peer_python .venv-peers/bin/python
  on a machine that others use too, or whose clock varies: all caches of a batch size side by side, in turns:
    python -m squeeze.bench --batch_size 8 --dtype float32 --peers --in_turns
  what budgets of KV heads cost beside those of layers, by the embedded model's loss curves:
    python -m squeeze.bench --algorithm h2o --allocation calibrated --per layer head --caches squeezed --in_turns
  tokens a second where memory is used up, at the paper's sizes, on a model of Mistral-7B's shape with made-up weights:
    python -m squeeze.bench --throughput --preset mistral-7b --device cuda --dtype float16 --caches squeezed
"""
COLUMNS = (
    *("engine", "cache", "dtype", "batch", "prompt", "prefill s", "importance", "step ms", "late/early", "tokens/s"),
    *("vs full", "KV MB", "peak MB", "limit ms", "of limit"),
)
LEGEND = """prefill s, step ms: median (quartiles) over all rounds
importance: share of the prefill that similarities, classes and budgets took
late/early: the last 32 steps over the first 32, where there are 64 or more
vs full: tokens/s over those of the full DynamicCache, in its best dtype and attention, at this batch size
peak MB: most memory held after loading"""
#: Decode steps of a turn.
TURN_STEPS = 4
CACHES = ("full", "uniform", "squeezed", "compiled")
#: The model where none is asked for.
EMBEDDED = "SmolLM2-135M"
#: Tokens of made-up prompts for a model with random weights, which has no tokenizer.
MADE_UP = 20_000


def parser() -> Parser:
    """The flags of `python -m squeeze.bench`."""
    made = Parser(
        prog="python -m squeeze.bench",
        description="Measure prefill, decode and memory of full, uniform and squeezed KV caches.",
        epilog=EXAMPLES,
    )
    made.add_argument("--model", type=path_text, help="as in pred.py (default: the embedded model)")
    made.add_argument("--model_path", type=path_text, help="where --model lies, as in pred.py")
    made.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    made.add_argument("--batch_size", type=whole(1), nargs="+", default=[1, 8], help="batch sizes (default: 1 8)")
    made.add_argument("--prompt_length", type=whole(1), default=4096, help="tokens of every prompt (default: 4096)")
    made.add_argument("--new_tokens", type=whole(1), default=65, help="tokens to generate after it (default: 65)")
    made.add_argument(
        "--dtype", nargs="+", default=["float32", "bfloat16"], choices=DTYPES[1:], help="default: float32 bfloat16"
    )
    made.add_argument(
        "--caches",
        nargs="+",
        default=CACHES[:3],
        choices=CACHES,
        help="which caches; compiled is squeezed with its decode step compiled (default: full uniform squeezed)",
    )
    made.add_argument(
        "--algorithm", nargs="+", default=["streaming"], choices=EVICTORS.names, help="default: streaming"
    )
    made.add_argument("--ini_size", default="0.2", help="as in pred.py (default: 0.2)")
    made.add_argument("--KV_class3", default="0.12", help="as in pred.py (default: 0.12)")
    squeezing = [name for name in ALLOCATIONS.names if has_class3(name)]
    made.add_argument(
        "--allocation", default="squeeze-log", choices=[*squeezing, "calibrated"], help="default: squeeze-log"
    )
    made.add_argument(
        "--per",
        nargs="+",
        default=["layer"],
        choices=PER,
        help="what has a budget in squeezed and compiled caches, as in pred.py (default: layer)",
    )
    made.add_argument("--rounds", type=whole(1), default=3, help="prefills and generations of each (default: 3)")
    made.add_argument(
        "--in_turns",
        action="store_true",
        help=f"run the configurations of a batch size side by side, one at a time: a prefill each, then {TURN_STEPS} "
        "decode steps each in turn, so that slow minutes hit all alike; needs memory for all caches at once",
    )
    made.add_argument(
        "--peers",
        action="store_true",
        help="also DynamicCache, full and cut, and kvpress's presses of the algorithms; on a GPU a compiled "
        "StaticCache",
    )
    made.add_argument(
        "--peer_python", type=path_text, help="Python of the environment with kvpress (without it: no kvpress)"
    )
    made.add_argument(
        "--peer_attn",
        nargs="+",
        default=["sdpa"],
        choices=["sdpa", "eager"],
        help="attention of peers (default: sdpa)",
    )
    made.add_argument(
        "--memory_gb",
        type=real("a number above 0", without_least=True),
        help="say which batch would fit into so much, by the peaks measured; with --throughput the limit (default "
        "there: all that the device has)",
    )
    made.add_argument(
        "--throughput",
        action="store_true",
        help="run each cache, and transformers' full one, with one batch size after the other until one does not fit "
        "into memory: tokens a second at the largest, with and without the prefill",
    )
    made.add_argument(
        "--random_weights",
        type=as_path,
        metavar="CONFIG",
        help="in place of --model: a model of this config.json's shape with made-up weights, on which speed does not "
        "depend",
    )
    made.add_argument(
        "--preset",
        choices=sorted(PRESETS),
        help="sizes of --throughput, for mistral-7b the paper's; without --model also the shape, with random weights",
    )
    made.add_argument(
        "--data_dir",
        type=path_text,
        default=shipped("data/longbench"),
        help="its samsum.jsonl gives the prompts' text",
    )
    made.add_argument("--out", type=as_path, default=Path("bench"), help="folder of the results (default: bench)")
    return made


def count_layers(folder: Path) -> int:
    """Layers of a model that have a cache of keys and values."""
    from squeeze.models.cached_layers import own_layers
    from squeeze.models.folder_config import model_config

    return len(own_layers(model_config(folder)))


def has_class3(allocation: str) -> bool:
    """Whether an allocation takes `KV_class3`."""
    return "class3" in ALLOCATIONS.find(allocation).fields


def squeezed_caches(args: argparse.Namespace, algorithm: str, identity: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What is said of a squeezed cache after its name, one for each of `--per`, and its fields of `SqueezeConfig`.

    The loss curves of `calibrated` are given as a path, and read where the cache is made.

    Args:
        identity: of the model, see `squeeze.models.sources.identity`.
    Raises:
        InputError: a configuration cannot be, or its curves are not there.
    """
    caches = {}
    for per in args.per:
        fields = {"algorithm": algorithm, "allocation": args.allocation, "per": per, "ini_size": args.ini_size}
        if has_class3(args.allocation):
            fields["kv_class3"] = args.KV_class3
        config = with_curves(SqueezeConfig(**fields), sources.run_name(args.model or EMBEDDED), identity)
        assert config is not None
        if config.calibration is not None:
            fields["calibration"] = os.path.abspath(config.calibration.source)  # workers run elsewhere
        caches["" if per == "layer" else f" per {per}"] = fields
    return caches


def specs(args: argparse.Namespace, folder: Path, tokens: list[int], identity: dict[str, Any]) -> list[dict[str, Any]]:
    """Every configuration to measure, this engine's first. Budgets of peers are this engine's own, filled in later.

    Raises:
        InputError: a configuration cannot be.
    """
    common = {
        **{"model": str(folder), "device": args.device, "tokens": tokens, "rounds": args.rounds},
        **{"prompt_length": args.prompt_length, "new_tokens": args.new_tokens, "attn": "sdpa"},
        "turn_steps": TURN_STEPS if args.in_turns else args.new_tokens,
    }
    if args.random_weights is not None:
        common["random_weights"] = True
    if args.throughput:
        common["memory"] = memory_of(args.device, args.memory_gb)
    layers = count_layers(folder)
    everything = {"budgets": [args.prompt_length + args.new_tokens] * layers}
    variants = []
    for batch_size in sorted(args.batch_size) if args.throughput else args.batch_size:
        for dtype in args.dtype:
            base = common | {"batch_size": batch_size, "dtype": dtype}
            for algorithm in args.algorithm:
                squeezed = squeezed_caches(args, algorithm, identity)
                uniform = {"algorithm": algorithm, "allocation": "uniform", "ini_size": args.ini_size}
                configs = {
                    "full": {"": {"algorithm": algorithm, **everything}},
                    "uniform": {"": uniform},
                    "squeezed": squeezed,
                    "compiled": {per: fields | {"compile": True} for per, fields in squeezed.items()},
                }
                for cache in args.caches:
                    for per, config in configs[cache].items():
                        label = f"{algorithm} {cache}{per}"
                        variants.append(base | {"engine": "squeeze", "cache": label, "config": config})
            if args.peers:
                variants += peers(base, args)
            elif args.throughput:
                variants.append(base | {"engine": "transformers", "cache": "DynamicCache full"})
    return variants


def peers(base: dict[str, Any], args: argparse.Namespace) -> list[dict[str, Any]]:
    """The caches that users would run instead, at the same total of tokens."""
    budget = int(parse_fraction("ini_size", args.ini_size) * args.prompt_length)
    layers = count_layers(Path(base["model"]))
    cut = {"budgets": [budget] * layers}
    squeezed = "squeezed" in args.caches and "layer" in args.per
    variants = []
    for attn in args.peer_attn:
        transformers = base | {"engine": "transformers", "attn": attn}
        name = "DynamicCache" if attn == "sdpa" else f"DynamicCache {attn}"
        variants += [transformers | {"cache": f"{name} full"}, transformers | {"cache": f"{name} uniform", **cut}]
        if attn == "sdpa" and squeezed:  # eager attention builds one mask for all layers
            variants.append(transformers | {"cache": f"{name} squeezed", "budgets": "squeezed"})
        if attn == "sdpa" and args.device.startswith("cuda"):
            variants.append(transformers | {"cache": "StaticCache, compiled", "static": True})
        if args.peer_python and "streaming" in args.algorithm:
            kvpress = transformers | {"engine": "kvpress", "python": args.peer_python, "algorithm": "streaming"}
            name = "" if attn == "sdpa" else f" {attn}"
            variants.append(kvpress | {"cache": f"StreamingLLMPress{name}", **cut})
            if attn == "sdpa" and squeezed:
                variants.append(kvpress | {"cache": "PerLayerCompressionPress", "budgets": "squeezed"})
    if args.peer_python and "h2o" in args.algorithm:  # attention weights, which eager attention alone gives
        observed = {"engine": "kvpress", "python": args.peer_python, "algorithm": "h2o", "attn": "eager"}
        variants.append(base | observed | {"cache": "ObservedAttentionPress", **cut})
    return variants


def with_quartiles(quartiles: dict[str, float], digits: int, unit: float = 1.0) -> str:
    """A median and its quartiles, as `12.3 (12.1–12.9)`."""
    median, low, high = (f"{quartiles[key] / unit:.{digits}f}" for key in ("median", "low", "high"))
    return f"{median} ({low}–{high})"


def row(record: dict[str, Any], copy_bandwidth: float, baseline: float | None = None) -> dict[str, str]:
    """A line of the table; the limit is the time to read the weights and the KV kept once.

    Args:
        baseline: tokens per second to compare with.
    """
    spec, result = record["spec"], record["result"]
    line = {
        **{"engine": spec["engine"], "cache": spec["cache"], "dtype": spec["dtype"]},
        **{"batch": str(spec["batch_size"]), "prompt": str(spec["prompt_length"])},
    }
    if "error" in result:
        return dict.fromkeys(COLUMNS, "-") | line | {"prefill s": "failed"}
    step = result["step_seconds"]["median"]
    limit = (result["weight_bytes"] + result["kv_bytes"]) / copy_bandwidth
    importance = result.get("importance_seconds", {"median": 0.0})["median"] / result["prefill_seconds"]["median"]
    return line | {
        "prefill s": with_quartiles(result["prefill_seconds"], 2),
        "importance": f"{100 * importance:.1f}%" if importance else "-",
        "step ms": with_quartiles(result["step_seconds"], 1, 0.001),
        "late/early": f"{result['late_over_early']:.2f}" if "late_over_early" in result else "-",
        "tokens/s": f"{speed(record):.1f}",
        "vs full": f"{speed(record) / baseline:.2f}" if baseline else "-",
        "KV MB": f"{result['kv_bytes'] / 1e6:.1f}",
        "peak MB": f"{result['peak_bytes'] / 1e6:.0f}",
        "limit ms": f"{1000 * limit:.1f}",
        "of limit": f"{100 * limit / step:.0f}%",
    }


def fitting(records: Sequence[dict[str, Any]], memory: float) -> dict[str, int]:
    """The largest batch whose peak fits into `memory` bytes, by a line through the peaks of two batch sizes."""
    peaks: dict[str, dict[int, int]] = {}
    for record in records:
        if "peak_bytes" in record["result"]:
            spec = record["spec"]
            name = f"{spec['engine']} {spec['cache']} {spec['dtype']}"
            peaks.setdefault(name, {})[spec["batch_size"]] = record["result"]["peak_bytes"]
    batches = {}
    for name, by_batch in peaks.items():
        if len(by_batch) > 1:
            (small, low), (large, high) = min(by_batch.items()), max(by_batch.items())
            each = (high - low) / (large - small)
            batches[name] = max(int((memory - low) / each + small), 0) if each > 0 else large
    return batches


def plot(records: Sequence[dict[str, Any]]) -> bytes:
    """Tokens per second, and memory, over the batch size, as PNG: a line for each cache."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    series: dict[str, list[tuple[int, float, float]]] = {}
    for record in records:
        spec, result = record["spec"], record["result"]
        if "error" not in result:
            name = named(spec)
            series.setdefault(name, []).append((spec["batch_size"], speed(record), result["peak_bytes"] / 1e9))
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for index, (name, points) in enumerate(series.items()):
        batch, speeds, memory = zip(*sorted(points), strict=True)
        style = {"marker": "osv^Dx+"[index % 7], "color": f"C{index % 10}", "linestyle": ["-", "--"][index // 10 % 2]}
        axes[0].plot(batch, speeds, label=name, **style)
        axes[1].plot(batch, memory, **style)
    for axis, title in zip(axes, ("decode, tokens per second", "peak memory, GB"), strict=True):
        axis.set(xlabel="batch size", ylabel=title, ylim=(0, None))
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    pyplot.close(figure)
    return image.getvalue()


def read_flags(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags, with those that a preset gives where they are not given.

    Raises:
        InputError: they do not go together.
    """
    args = parser().parse_args(argv)
    own = args.model is not None or args.model_path is not None
    if args.random_weights is not None and own:
        raise InputError("--random_weights takes the place of the model: leave --model and --model_path out")
    if args.preset is not None:
        if not args.throughput:
            raise InputError("--preset is for --throughput")
        changed = parser()
        changed.set_defaults(**PRESETS[args.preset])
        if not own:
            changed.set_defaults(random_weights=config_file(f"shapes/{args.preset}.json"))
        args = changed.parse_args(argv)
    if args.random_weights is not None and args.allocation == "calibrated":
        raise InputError("random weights have no loss curves: take another --allocation than calibrated")
    if args.throughput and args.in_turns:
        raise InputError("--throughput fills the memory with one cache at a time: leave --in_turns out")
    if args.random_weights is None:
        args.model = args.model or EMBEDDED
    return args


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
