"""A run described by one frozen object: its fields are the flags of `pred.py`, the keys of a sweep and `run.json`'s
`flags`, in this order."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from squeeze.allocations import ALLOCATIONS, DEFAULT
from squeeze.benchmarks.registry import BENCHMARKS
from squeeze.cli.arguments import path_text, real, whole
from squeeze.cli.fields import flag, flags_of, switch
from squeeze.config import DTYPES, PER, SqueezeConfig, default_algorithm
from squeeze.errors import InputError
from squeeze.evictors import EVICTORS
from squeeze.numbers import MOST_SEED
from squeeze.text import shortened

MODEL_ARCHS = ("Mistral", "llama", "no_change")
ATTENTIONS = ("auto", "sdpa", "eager", "flash_attention_2")
DEVICE_MAPS = ("auto", "balanced", "sequential")
MODEL_MISSING = "--model is missing: a name in config/model2path.json, a local folder or a Hub name"


@dataclass(frozen=True)
class RunSpec:
    """A run of `pred.py`; each field's help says what it is.

    Sizes that flags and sweeps give are text, so that 0.03 is 3/100 and not the nearest binary number.

    Args:
        command: the command line that asked for the run, for the record; it is no flag and makes no other run.
    """

    model: str | None = flag(
        None,
        "a name in config/model2path.json, a local model folder, or a Hub name such as org/model",
        path_text,
        axis=1,
    )
    model_path: str | None = flag(None, "where --model lies, in place of what config/model2path.json says", path_text)
    model_arch: str | None = flag(
        None,
        "Mistral, llama, qwen2 or another model_type of transformers: must be the model's own, which is the default; "
        "no_change: full cache",
    )
    enable_squeeze: bool = switch("bound the KV cache (default: the full cache, the baseline)", in_sweeps=False)
    ini_size: str | float | None = flag(
        None, "budget of every layer before squeezing, as a fraction of the prompt, (0, 1]", axis=7, squeezed=True
    )
    KV_class3: str | float | None = flag(
        None,
        "budget of the layers whose attention changes the least, as a fraction of the prompt, (0, ini_size]; "
        "equal to ini_size: every layer keeps the same",
        axis=8,
        squeezed=True,
    )
    algorithm: str | None = flag(
        None,
        "which tokens stay: sliding_window (default for Mistral), streaming (StreamingLLM, default otherwise), h2o, "
        "snapkv, tova, expected_attention, knorm, keydiff, lagkv or random (docs/evictors.md), parameters in "
        "brackets: snapkv(window=16)",
        check=EVICTORS.check,
        axis=4,
        squeezed=True,
    )
    allocation: str | None = flag(
        None,
        "how classes become budgets: squeeze (default; keeps the total to the token), squeeze-log (classes on a "
        "log scale), paper (the published formula to the letter, which can lose part of the total); or, without "
        "--KV_class3, uniform, linear, pyramid (PyramidKV), cake (by each prompt's attention), calibrated (from the "
        "loss curves that python -m squeeze.calibrate measures once), or measured (the same from curves of each "
        "prompt's own last tokens, for studies: it costs several prefills); parameters in brackets: pyramid(beta=10)",
        check=ALLOCATIONS.check,
        axis=5,
        squeezed=True,
    )
    per: str = flag(
        "layer",
        "what has a budget of its own: layer (default: the KV heads of a layer keep as much each); head, with the "
        "allocation calibrated, from curves that python -m squeeze.calibrate --per head measures; or adakv: the KV "
        "heads of a layer share its budget by the scores of each prompt's tokens (Ada-KV), for h2o and its like",
        choices=PER,
        axis=6,
        squeezed=True,
    )
    start_size: int = flag(
        4,
        "tokens at the start that streaming never evicts (default: 4)",
        whole(0),
        also=("--start_token",),
        squeezed=True,
    )
    seed: int = flag(
        42,
        "names the run, and decides on what is sampled; greedy decoding does not depend on it (default: 42)",
        whole(0, MOST_SEED),
        axis=2,
    )
    pred: str = flag(
        "Long", "the benchmark: Long (LongBench), e (LongBench-E), ruler, niah (a needle map), xsum or cnndm (HELM)"
    )
    datasets: str | None = flag(
        None,
        "data sets, separated by commas, or all (default: samsum, of ruler niah_single_1; of eval.py: those that are "
        "there)",
    )
    lengths: str | None = flag(
        None,
        "of ruler and niah: tokens of a prompt with its answer, one or several separated by commas (default: 4096)",
    )
    depths: str | None = flag(
        None,
        "of niah: where the needle lies, in percent of the prose, one or several separated by commas (default: "
        "0,25,50,75,100)",
    )
    device: str | None = flag(
        None, "cpu, cuda, or one GPU such as cuda:0 (default: the first GPU if there is one, else the CPU)"
    )
    sample_num: int | None = flag(
        None,
        "how many rows of each data set to run (default: all; of HELM: 300, of ruler: 500); of niah: needles at each "
        "depth (default: 5)",
        whole(1),
    )
    device_map: str | None = flag(
        None,
        "in place of --device, for models larger than one GPU: auto, balanced or sequential (accelerate) spreads "
        "the layers over the GPUs, then CPU memory, then disk; a layer's cache lives where the layer runs",
        choices=DEVICE_MAPS,
    )
    batch_size: int = flag(1, "prompts to run together, alike in length (default: 1)", whole(1))
    data_dir: str | None = flag(
        None,
        "folder with <dataset>.jsonl files in LongBench's format (default: LongBench from the Hub); of ruler and "
        "niah: with the files that RULER downloads (default: none of them)",
        path_text,
    )
    haystack: str | None = flag(
        None,
        "of ruler and niah: a file of prose that needles lie in (default: PaulGrahamEssays.json in --data_dir, or "
        "made-up sentences)",
        path_text,
    )
    requests: str | None = flag(
        None,
        "of HELM: the file of requests that python -m squeeze.helm_requests makes (default: data/xsum.jsonl or "
        "data/cnndm.jsonl)",
        path_text,
    )
    dtype: str = flag(
        "auto",
        "auto (bfloat16 on GPUs and on CPUs with AVX512-BF16 or AMX, else float32), float32, bfloat16 or float16",
        choices=DTYPES,
    )
    attn: str = flag(
        "auto",
        "attention over the prompt: auto (sdpa), sdpa, eager, or, for the full cache, flash_attention_2; "
        "h2o needs the probabilities, and but for a GPU in half precision computes them in blocks",
        choices=ATTENTIONS,
    )
    compile: bool = switch(
        "compile the decode step with torch.compile: faster steps, after some seconds for the first ones; needs "
        "a C++ compiler on the CPU, Triton on a GPU, and a squeezed cache",
        squeezed=True,
    )
    cuda_graph: bool = switch(
        "record the decode step of each batch as one CUDA graph and replay it: steps of small models and batches no "
        "longer wait for their kernels to be launched; needs a squeezed cache and an NVIDIA GPU",
        squeezed=True,
    )
    prefill_chunk: int | None = flag(
        None,
        "prefill so many tokens at a time and evict after each, for sliding_window and streaming with KV_class3 "
        "equal to ini_size: bounds memory further, but a chunk sees only what was kept before it (default: off)",
        whole(1),
        squeezed=True,
    )
    compress: str = flag(
        "prompt",
        "what is cut: the whole prompt (default), or its context alone, before the question that follows on it is "
        "read: a cache that serves several questions must survive that",
        choices=("prompt", "context"),
        squeezed=True,
    )
    chat: bool = switch(
        "put the prompt into the tokenizer's own chat template, for instruct models; as in LongBench, not for "
        "the few-shot and code data sets (default: LongBench's own format for names with llama2, vicuna, ...)"
    )
    temperature: float = flag(0.0, "of sampling (default: 0, which is greedy)", real("a number, 0 or more"))
    top_p: float = flag(
        1.0,
        "sample from the likeliest tokens of this probability (default: 1)",
        real("in (0, 1]", most=1, without_least=True),
    )
    fidelity: bool = switch(
        "in place of predictions: feed the full cache's greedy answer to both caches, and report the mean KL "
        "divergence and top-1 agreement per token; can tell configurations apart where scores are noise",
        axis=3,
        squeezed=True,
    )
    allow_pickle: bool = switch("also load weights that are not safetensors; they can run code")
    overwrite: bool = switch(
        "start anew: drop the samples that the run's folder already has of these data sets", in_sweeps=False
    )
    command: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        spelled = {arch.lower(): arch for arch in MODEL_ARCHS}
        if self.model_arch is not None:
            object.__setattr__(self, "model_arch", spelled.get(self.model_arch.lower(), self.model_arch))

    @classmethod
    def read(cls, texts: Mapping[str, str]) -> RunSpec:
        """The run whose flags have these values, as text; of switches `true` or `false`.

        Raises:
            InputError: a flag has no such value.
        """
        given = [known for name, known in FLAGS.items() if name in texts]
        words = [word for known in given for word in known.words(texts[known.name])]
        return cls(**{known.name: known.value(texts[known.name]) for known in given}, command=command_line(words))

    @property
    def flags(self) -> dict[str, Any]:
        """All flags with their values, as `run.json` has them."""
        return {name: getattr(self, name) for name in FLAGS}

    def check(self) -> None:
        """Raises InputError where a word is none of those allowed, or flags do not go together."""
        if self.pred not in BENCHMARKS:
            names = " or ".join(f"{benchmark.name} ({benchmark.title})" for benchmark in BENCHMARKS.values())
            raise InputError(f"--pred must be {names}, got {shortened(self.pred)}")
        if self.model_arch is not None and self.model_arch not in MODEL_ARCHS:
            raise InputError(f"--model_arch must be one of {', '.join(MODEL_ARCHS)}, got {shortened(self.model_arch)}")
        if self.device_map is not None:
            if self.device is not None:
                raise InputError("--device_map chooses the devices: leave --device out")
            for name in ("compile", "cuda_graph"):
                if getattr(self, name):
                    raise InputError(f"--{name} needs the model on one device: leave --device_map out")
        for name, known in FLAGS.items():
            value = getattr(self, name)
            if known.choices and value is not None and value not in known.choices:
                raise InputError(f"--{name} must be one of {', '.join(known.choices)}, got {shortened(value)}")
            if known.check is not None and value is not None:
                known.check(value, f"--{name}")
        if self.top_p < 1 and self.temperature == 0:
            raise InputError("--top_p is for sampling: give --temperature as well")
        if self.fidelity and self.temperature > 0:
            raise InputError("--fidelity compares greedy answers: leave --temperature out")
        self._check_benchmark()

    def _check_benchmark(self) -> None:
        """Raises InputError for flags that are another benchmark's."""
        benchmark = BENCHMARKS[self.pred]
        if self.compress == "context" and not benchmark.has_context:
            raise InputError(f"--compress context is not for --pred {self.pred}, whose prompts have no context apart")
        for name in dict.fromkeys(name for other in BENCHMARKS.values() for name in other.flags):
            if name not in benchmark.flags and getattr(self, name) != FLAGS[name].default:
                takers = [other.name for other in BENCHMARKS.values() if name in other.flags]
                raise InputError(benchmark.refusal(name, takers))

    def config(self, model_type: str | None = None) -> SqueezeConfig | None:
        """The configuration of the cache that the flags ask for; None for the full one.

        Args:
            model_type: the model's architecture, whose own algorithm is taken where none is asked for.
        Raises:
            InputError: a size is out of its range or missing, or stands beside the full cache.
        """
        if not self.enable_squeeze or self.model_arch == "no_change":
            self._check_full()
            return None
        if self.attn == "flash_attention_2":
            raise InputError("--attn flash_attention_2 is for the full cache only: use auto with --enable_squeeze")
        algorithm = self.algorithm
        if algorithm is None and model_type is not None:
            algorithm = default_algorithm(model_type)
        return SqueezeConfig(
            algorithm=algorithm,
            ini_size=self.ini_size,
            kv_class3=self.KV_class3,
            allocation=DEFAULT if self.allocation is None else self.allocation,
            per=self.per,
            start_size=self.start_size,
            attn=self.attn,
            compile=self.compile,
            cuda_graph=self.cuda_graph,
            prefill_chunk=self.prefill_chunk,
        )

    def _check_full(self) -> None:
        """Raises InputError for flags of a squeezed cache, which was not asked for."""
        why = "--model_arch no_change" if self.enable_squeeze else "no --enable_squeeze"
        for name in SQUEEZED:
            # The published commands give a start size to the full cache as well.
            if name not in ("start_size", "fidelity") and getattr(self, name) != FLAGS[name].default:
                raise InputError(f"--{name} is for a squeezed cache, but the full cache was asked for ({why})")
        if self.fidelity:
            raise InputError(f"--fidelity compares a squeezed cache with the full one, which was asked for ({why})")


#: By name, in the fields' order.
FLAGS = flags_of(RunSpec)

#: The model and its cache.
CACHE = (
    *("model", "model_path", "model_arch", "enable_squeeze", "ini_size", "KV_class3", "algorithm", "allocation"),
    *("per", "start_size", "seed"),
)

#: Flags that a squeezed cache has and the full one has not.
SQUEEZED = tuple(name for name, known in FLAGS.items() if known.squeezed)


def command_line(words: Sequence[str]) -> str:
    """The command line of `pred.py` with these words, as `run.json` has it."""
    return shlex.join(["python", "pred.py", *words])
