"""The command lines of `pred.py` and `eval.py`, made from the fields of `RunSpec`, and the runs that they describe."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

from squeeze.cli.arguments import Parser, path_text
from squeeze.runs.spec import CACHE, FLAGS, RunSpec, command_line

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


def pred_parser() -> Parser:
    """The flags of `pred.py`."""
    parser = _parser(
        "Write a model's predictions on LongBench or for HELM, with a full or a squeezed KV cache.", PRED_EXAMPLES
    )
    for flag in FLAGS.values():
        flag.add_to(parser)
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
    for name in (*CACHE, "compress", "pred", "datasets"):
        FLAGS[name].add_to(parser)
    return parser


def _parser(description: str, examples: str) -> Parser:
    return Parser(
        description=description,
        epilog=examples,
    )


def read_flags(argv: Sequence[str]) -> RunSpec:
    """The run that a command line of `pred.py` describes.

    Raises:
        InputError: it has a flag that is not known, or a value that its flag does not take.
    """
    return RunSpec(**vars(pred_parser().parse_args(argv)), command=command_line(argv))


def named_run(args: argparse.Namespace, *more: str) -> RunSpec:
    """The run that another command's flags name: where they give sizes, its cache is squeezed, as in the published
    commands, which say nothing but the sizes.

    Args:
        args: the flags of the cache among them.
        more: other fields of the run that are among them.
    Raises:
        InputError: a word is none of those allowed.
    """
    spec = RunSpec(**{name: getattr(args, name) for name in (*CACHE, *more)})
    spec.check()
    return replace(spec, enable_squeeze=spec.enable_squeeze or spec.ini_size is not None or spec.KV_class3 is not None)
