"""The command line that `pred.py` and `eval.py` share: the published flags, and what was added to them."""

from __future__ import annotations

import argparse
import dataclasses
from functools import cache

from squeeze.benchmarks.registry import BENCHMARKS
from squeeze.cli.arguments import Parser, path_text, real, whole
from squeeze.config import ALGORITHMS, ALLOCATIONS, DEFAULT_ALGORITHM, DTYPES, SqueezeConfig
from squeeze.errors import InputError
from squeeze.numbers import MOST_SEED
from squeeze.text import shortened

MODEL_ARCHS = ("Mistral", "llama", "no_change")
ATTENTIONS = ("auto", "sdpa", "eager", "flash_attention_2")
DEVICE_MAPS = ("auto", "balanced", "sequential")
WORDS = {
    "algorithm": ALGORITHMS,
    "allocation": ALLOCATIONS,
    "dtype": DTYPES,
    "attn": ATTENTIONS,
    "device_map": DEVICE_MAPS,
}

#: Flags of `pred.py` that only some benchmarks take (`Benchmark.flags`), and their values where they are not given.
SOME_BENCHMARKS = {"requests": None, "datasets": None, "data_dir": None, "chat": False, "temperature": 0, "top_p": 1}

TEMPERATURE = real("a number, 0 or more")

PRED_EXAMPLES = """examples
  a uniform budget of 21 % of the prompt in every layer (Mistral: sliding window):
    python pred.py --model Mistral --pred Long --enable_squeeze --model_arch Mistral --device cuda:0 \\
        --ini_size 0.21 --KV_class3 0.21
  SqueezeAttention: the layers that change the least keep 8 %, the others share what that frees:
    python pred.py --model Mistral --pred Long --enable_squeeze --model_arch Mistral --device cuda:0 \\
        --ini_size 0.21 --KV_class3 0.08
  the full cache, the baseline:
    python pred.py --model Mistral --pred Long --device cuda:0
  the small embedded model on the demo rows, without a GPU or a network:
    python pred.py --model SmolLM2-135M --pred Long --enable_squeeze --ini_size 0.2 --KV_class3 0.1 \\
        --data_dir data/longbench --sample_num 4
  HELM's XSum, from the requests that python -m squeeze.helm_requests makes; script/helm.sh scores it:
    python pred.py --model llama2-7b-32k --pred xsum --enable_squeeze --model_arch llama --device cuda:0 \\
        --ini_size 0.4 --KV_class3 0.25 --sample_num 300 --start_size 4

A run that was interrupted goes on where it was when it is started again with the same flags. Several GPUs share one:
    torchrun --nproc_per_node 4 pred.py --model Mistral --pred Long --datasets all --device cuda
"""

EVAL_EXAMPLES = """examples
  score the squeezed run that pred.py made with these sizes:
    python eval.py --model Mistral --pred Long --ini_size 0.21 --KV_class3 0.08
  score the full cache's run:
    python eval.py --model Mistral --pred Long
  score a folder, also one that other LongBench code wrote:
    python eval.py pred_Long/Mistral/0.21/8
  is the second better than the first? with the 95 % interval of the difference, sample by sample:
    python eval.py --compare pred_Long/Mistral/0.21/21 pred_Long/Mistral/0.21/8
"""


@cache
def pred_parser() -> Parser:
    """The flags of `pred.py`; one parser, since a sweep reads thousands of command lines."""
    parser = _parser(
        "Write a model's predictions on LongBench or for HELM, with a full or a squeezed KV cache.", PRED_EXAMPLES
    )
    _add_run_flags(parser)
    parser.add_argument(
        "--device", help="cpu, cuda, or one GPU such as cuda:0 (default: the first GPU if there is one, else the CPU)"
    )
    parser.add_argument(
        "--sample_num", type=whole(1), help="how many rows of each data set to run (default: all; of HELM: 300)"
    )
    parser.add_argument(
        "--device_map",
        help="in place of --device, for models larger than one GPU: auto, balanced or sequential (accelerate) spreads "
        "the layers over the GPUs, then CPU memory, then disk; a layer's cache lives where the layer runs",
    )
    parser.add_argument(
        "--batch_size", type=whole(1), default=1, help="prompts to run together, alike in length (default: 1)"
    )
    parser.add_argument(
        "--data_dir",
        type=path_text,
        help="folder with <dataset>.jsonl files in LongBench's format (default: LongBench from the Hub)",
    )
    parser.add_argument(
        "--requests",
        type=path_text,
        help="of HELM: the file of requests that python -m squeeze.helm_requests makes (default: data/xsum.jsonl or "
        "data/cnndm.jsonl)",
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        help="auto (bfloat16 on GPUs and on CPUs with AVX512-BF16 or AMX, else float32), float32, bfloat16 or float16",
    )
    parser.add_argument(
        "--attn",
        default="auto",
        help="attention over the prompt: auto (sdpa), sdpa, eager, or, for the full cache, flash_attention_2; "
        "h2o needs the probabilities and always computes them in blocks",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the decode step with torch.compile: faster steps, after some seconds for the first ones; needs "
        "a C++ compiler on the CPU, Triton on a GPU, and a squeezed cache",
    )
    parser.add_argument(
        "--prefill_chunk",
        type=whole(1),
        help="prefill so many tokens at a time and evict after each, for sliding_window and streaming with KV_class3 "
        "equal to ini_size: bounds memory further, but a chunk sees only what was kept before it (default: off)",
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help="put the prompt into the tokenizer's own chat template, for instruct models; as in LongBench, not for "
        "the few-shot and code data sets (default: LongBench's own format for names with llama2, vicuna, ...)",
    )
    parser.add_argument(
        "--temperature", type=TEMPERATURE, default=0.0, help="of sampling (default: 0, which is greedy)"
    )
    parser.add_argument(
        "--top_p",
        type=real("in (0, 1]", most=1, without_least=True),
        default=1.0,
        help="sample from the likeliest tokens of this probability (default: 1)",
    )
    parser.add_argument(
        "--fidelity",
        action="store_true",
        help="in place of predictions: feed the full cache's greedy answer to both caches, and report the mean KL "
        "divergence and top-1 agreement per token; can tell configurations apart where scores are noise",
    )
    parser.add_argument(
        "--allow_pickle", action="store_true", help="also load weights that are not safetensors; they can run code"
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="start anew: drop the samples that the run's folder already has of these data sets",
    )
    return parser


def eval_parser() -> Parser:
    """The flags of `eval.py`: those of `pred.py` that name a run's folder, or the folder itself."""
    parser = _parser("Score a run's predictions with LongBench's own metrics.", EVAL_EXAMPLES)
    parser.add_argument(
        "folder",
        nargs="?",
        type=path_text,
        help="folder of prediction files, or one file, in place of the flags that name a run; also other tools': "
        "MiniLongBench's, and KVCache-Factory's, where FOLDER/METHOD names a run",
    )
    parser.add_argument(
        "--compare",
        nargs="+",
        action="extend",
        type=path_text,
        metavar="RUN",
        help="folders of prediction files: scores side by side, and every run's difference to the first",
    )
    _add_run_flags(parser)
    return parser


def _parser(description: str, examples: str) -> Parser:
    return Parser(
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _add_run_flags(parser: Parser) -> None:
    """What decides on a run's folder and its data sets."""
    add_cache_flags(parser)
    parser.add_argument(
        "--pred", default="Long", help="the benchmark: Long (LongBench), e (LongBench-E), xsum or cnndm (HELM)"
    )
    parser.add_argument(
        "--datasets",
        help="data sets, separated by commas, or all (default: samsum; of eval.py: those that are there)",
    )


def add_cache_flags(parser: Parser) -> None:
    """The model and its cache. Sizes stay text, so that 0.03 is 3/100 and not the nearest binary number."""
    parser.add_argument(
        "--model",
        type=path_text,
        help="a name in config/model2path.json, a local model folder, or a Hub name such as org/model",
    )
    parser.add_argument(
        "--model_path", type=path_text, help="where --model lies, in place of what config/model2path.json says"
    )
    parser.add_argument(
        "--model_arch",
        help="Mistral or llama: must be the model's own architecture, which is the default; no_change: full cache",
    )
    parser.add_argument(
        "--enable_squeeze", action="store_true", help="bound the KV cache (default: the full cache, the baseline)"
    )
    parser.add_argument(
        "--ini_size", help="budget of every layer before squeezing, as a fraction of the prompt, (0, 1]"
    )
    parser.add_argument(
        "--KV_class3",
        help="budget of the layers whose attention changes the least, as a fraction of the prompt, (0, ini_size]; "
        "equal to ini_size: every layer keeps the same",
    )
    parser.add_argument(
        "--algorithm",
        help="which tokens stay: sliding_window (default for Mistral), streaming (StreamingLLM, default for llama) "
        "or h2o",
    )
    parser.add_argument(
        "--allocation",
        help="how classes become budgets: squeeze (default; keeps the total to the token), squeeze-log (classes on a "
        "log scale), paper (the published formula to the letter, which can lose part of the total); or calibrated, "
        "without --KV_class3, from the loss curves that python -m squeeze.calibrate measures once; or measured, the "
        "same from curves of each prompt's own last tokens, for studies: it costs several prefills",
    )
    parser.add_argument(
        "--start_size",
        "--start_token",
        type=whole(0),
        default=4,
        help="tokens at the start that streaming never evicts (default: 4)",
    )
    parser.add_argument(
        "--seed",
        type=whole(0, MOST_SEED),
        default=42,
        help="names the run, and decides on what is sampled; greedy decoding does not depend on it (default: 42)",
    )


def check_flags(args: argparse.Namespace) -> None:
    """Check the values that are words, and spell `--model_arch` in one way.

    Raises:
        InputError: a value is none of those allowed.
    """
    task = getattr(args, "pred", "Long")
    if task not in BENCHMARKS:
        known = " or ".join(f"{benchmark.name} ({benchmark.title})" for benchmark in BENCHMARKS.values())
        raise InputError(f"--pred must be {known}, got {shortened(task)}")
    if args.model_arch is not None:
        spelled = {arch.lower(): arch for arch in MODEL_ARCHS}
        if args.model_arch.lower() not in spelled:
            raise InputError(f"--model_arch must be one of {', '.join(MODEL_ARCHS)}, got {shortened(args.model_arch)}")
        args.model_arch = spelled[args.model_arch.lower()]
    if getattr(args, "device_map", None) is not None:
        if args.device is not None:
            raise InputError("--device_map chooses the devices: leave --device out")
        if args.compile:
            raise InputError("--compile needs the model on one device: leave --device_map out")
    for name, allowed in WORDS.items():
        value = getattr(args, name, None)
        if value is not None and value not in allowed:
            raise InputError(f"--{name} must be one of {', '.join(allowed)}, got {shortened(value)}")
    if getattr(args, "top_p", 1) < 1 and args.temperature == 0:
        raise InputError("--top_p is for sampling: give --temperature as well")
    if getattr(args, "fidelity", False) and args.temperature > 0:
        raise InputError("--fidelity compares greedy answers: leave --temperature out")


def check_task_flags(args: argparse.Namespace) -> None:
    """Raises InputError for flags of `pred.py` that are another benchmark's."""
    benchmark = BENCHMARKS[args.pred]
    for flag, default in SOME_BENCHMARKS.items():
        if flag not in benchmark.flags and getattr(args, flag) != default:
            takers = [other.name for other in BENCHMARKS.values() if flag in other.flags]
            raise InputError(benchmark.refusal(flag, takers))


def config_from_flags(args: argparse.Namespace) -> SqueezeConfig | None:
    """What the flags ask of the cache; None for the full cache.

    Raises:
        InputError: a size is out of its range or missing, or stands beside the full cache.
    """
    if not args.enable_squeeze or args.model_arch == "no_change":
        why = "--model_arch no_change" if args.enable_squeeze else "no --enable_squeeze"
        for flag in ("ini_size", "KV_class3", "algorithm", "allocation"):
            if getattr(args, flag) is not None:
                raise InputError(f"--{flag} is for a squeezed cache, but the full cache was asked for ({why})")
        if getattr(args, "compile", False):
            raise InputError(f"--compile is for a squeezed cache, but the full cache was asked for ({why})")
        if getattr(args, "prefill_chunk", None) is not None:
            raise InputError(f"--prefill_chunk is for a squeezed cache, but the full cache was asked for ({why})")
        if getattr(args, "fidelity", False):
            raise InputError(f"--fidelity compares a squeezed cache with the full one, which was asked for ({why})")
        return None
    attn = getattr(args, "attn", "auto")
    if attn == "flash_attention_2":
        raise InputError("--attn flash_attention_2 is for the full cache only: use auto with --enable_squeeze")
    return SqueezeConfig(
        algorithm=args.algorithm,
        ini_size=args.ini_size,
        kv_class3=args.KV_class3,
        allocation=args.allocation or "squeeze",
        start_size=args.start_size,
        attn=attn,
        compile=getattr(args, "compile", False),
        prefill_chunk=getattr(args, "prefill_chunk", None),
    )


def for_model(config: SqueezeConfig | None, model_type: str) -> SqueezeConfig | None:
    """`config` with the algorithm that this architecture uses when none is asked for."""
    if config is None or config.algorithm is not None:
        return config
    return dataclasses.replace(config, algorithm=DEFAULT_ALGORITHM[model_type])
