"""The flags of `python -m squeeze.bench`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from squeeze.allocations import ALLOCATIONS
from squeeze.bench.throughput import PRESETS
from squeeze.cli.arguments import Parser, as_path, path_text, real, whole
from squeeze.config import DTYPES, PER
from squeeze.errors import InputError
from squeeze.evictors import EVICTORS
from squeeze.storage.paths import config_file, shipped

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

#: Decode steps of a turn.
TURN_STEPS = 4
CACHES = ("full", "uniform", "squeezed", "compiled", "graphed")
#: The model where none is asked for.
EMBEDDED = "SmolLM2-135M"


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
        help="which caches; compiled is squeezed with its decode step compiled, graphed with it as one CUDA "
        "graph (default: full uniform squeezed)",
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


def has_class3(allocation: str) -> bool:
    """Whether an allocation takes `KV_class3`."""
    return "class3" in ALLOCATIONS.find(allocation).fields


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
