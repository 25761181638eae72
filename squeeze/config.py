"""The configuration of a squeezed cache: one validated, frozen SqueezeConfig.

The words are those of the paper's command line (SqueezeAttention, arXiv 2404.04793): `ini_size` is the initial
budget of every layer and `KV_class3` the budget of the least important layers, both as fractions of the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from functools import cached_property
from typing import Any

from squeeze import allocations
from squeeze.allocations.base import Allocation
from squeeze.allocations.calibration import Calibration
from squeeze.allocations.explicit import Explicit
from squeeze.errors import InputError
from squeeze.evictors import EVICTORS, Evictor, make_evictor
from squeeze.numbers import shown, whole_number
from squeeze.registry import Named

ATTENTIONS = ("auto", "sdpa", "eager")
PER = ("layer", "head", "adakv")
DTYPES = ("auto", "float32", "bfloat16", "float16")

#: Sink tokens where none are asked for.
START_SIZE = 4


def default_algorithm(model_type: str) -> str:
    """The eviction method of an architecture where none is asked for: what the published command lines rely on."""
    return "sliding_window" if model_type == "mistral" else "streaming"


@dataclass(frozen=True)
class SqueezeConfig:
    """The KV cache that each layer may keep: how much, and which tokens.

    Args:
        algorithm: an `Evictor`, or what names one: `sliding_window`, `streaming` (StreamingLLM), `h2o`, an entry
            point, or `package.module:Class`, with parameters in brackets; None takes the model's default
            (`default_algorithm`).
        ini_size: initial budget of every layer, as a fraction of the prompt's tokens, or of those that its own window
            holds (docs/budgets.md), in (0, 1].
        kv_class3: budget of the layers in class 3, as a fraction of the prompt's tokens, in (0, `ini_size`].
        allocation: an `Allocation`, which has its own sizes, or what names one. How similarities become budgets:
            `squeeze`, `squeeze-log` or `paper`; or, without `kv_class3`, `uniform`, and `calibrated` or `measured`, by
            loss curves: of a file (see `squeeze.allocations.calibration`), or measured on each prompt's own last
            tokens, which costs several prefills (see `squeeze.engine.loss_curves`).
        budgets: tokens, one entry an attention layer, or in each one an entry a KV head, in place of `ini_size` and
            `kv_class3`.
        per: what has a budget: a `layer`, whose KV heads all keep as much; each `head`, by loss curves of heads; or
            `adakv`: the heads of a layer share its budget by the scores of each prompt's tokens (Ada-KV, arXiv
            2407.11550), with an evictor that scores.
        start_size: sink tokens that StreamingLLM never evicts.
        attn: prefill attention; `auto` and `sdpa` use PyTorch's fused kernel, `eager` explicit blocks of queries
            with a float32 softmax. H2O, which needs the probabilities, uses the latter but on GPUs in half precision.
        compile: compile the decode step with `torch.compile`; the first steps take some seconds then.
        cuda_graph: record the decode step of each batch as one CUDA graph and replay it, for which its kernels are
            launched at once: on an NVIDIA GPU, for models that cache nothing but attention.
        calibration: the loss curves of `calibrated`, from `squeeze.read_calibration`.
        prefill_chunk: tokens of the prompt that are prefilled at a time; None: all of them. A sliding window or
            StreamingLLM whose budgets do not depend on similarities then holds no layer's whole prompt: every chunk is
            cut to the budgets before the next one comes. The cache ends up with the same tokens, but a chunk attends
            to itself and to what was kept before it, at original positions, in place of everything. That is the same
            result, up to rounding, where in every layer nothing was evicted before the last chunk (budget and
            `prefill_chunk` together reach the prompt's length), or where what is kept besides the sinks reaches back
            as far as the model's own attention window does; else it is another, cheaper method.
    Raises:
        InputError: a value is out of its range, two exclude each other, or a strategy is not there.
    """

    algorithm: str | Evictor | None = None
    ini_size: Fraction | float | str | None = None
    kv_class3: Fraction | float | str | None = None
    allocation: str | Allocation = allocations.DEFAULT
    budgets: Sequence[int] | Sequence[Sequence[int]] | None = None
    per: str = "layer"
    start_size: int = START_SIZE
    attn: str = "auto"
    compile: bool = False
    cuda_graph: bool = False
    calibration: Calibration | None = None
    prefill_chunk: int | None = None

    def __post_init__(self) -> None:
        self._name_evictor()
        if self.attn not in ATTENTIONS:
            raise InputError(f"attn must be one of {', '.join(ATTENTIONS)}, got {shown(self.attn)}")
        whole_number("start_size", self.start_size, 0, "a whole number of tokens")
        self._name_allocation()
        self._check_per()
        if self.prefill_chunk is not None:
            self._check_prefill_chunk()

    def __getstate__(self) -> dict[str, Any]:
        """Fields alone: another process makes the strategies from their names."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def evictor(self) -> Evictor:
        """The eviction method; ValueError where the model's default is asked for."""
        if self.algorithm is None:
            raise ValueError("this configuration has no algorithm")
        return self.algorithm if isinstance(self.algorithm, Evictor) else make_evictor(self.algorithm, self.start_size)

    @cached_property
    def allocator(self) -> Allocation:
        """The strategy that makes the budgets."""
        if self.budgets is not None:
            return Explicit(self.budgets)
        if isinstance(self.allocation, Allocation):
            return self.allocation
        named = allocations.ALLOCATIONS.find(self.allocation)
        sizes = {"ini_size": self.ini_size, "class3": self.kv_class3}
        return named.make(sizes | {"calibration": self.calibration})

    @property
    def algorithm_name(self) -> str | None:
        """The eviction method's name, for files and errors; the same for all texts that mean the same."""
        return None if self.algorithm is None else str(self.algorithm)

    @property
    def allocation_name(self) -> str:
        """The allocation's name."""
        return str(self.allocation)

    @property
    def fractions(self) -> tuple[Fraction, Fraction]:
        """`ini_size` and `KV_class3`, exactly; ValueError where there are none."""
        if self.allocator.class3_size is None:
            raise ValueError("this configuration has no KV_class3")
        return self.share, self.allocator.class3_size

    @property
    def share(self) -> Fraction:
        """`ini_size`, exactly; ValueError with explicit budgets, which have none."""
        if self.allocator.size is None:
            raise ValueError("this configuration has explicit budgets and no ini_size")
        return self.allocator.size

    @property
    def sizes(self) -> dict[str, float]:
        """`ini_size` and `KV_class3`, as far as they are given."""
        sizes = {"ini_size": self.allocator.size, "KV_class3": self.allocator.class3_size}
        return {name: float(value) for name, value in sizes.items() if value is not None}

    def _name_evictor(self) -> None:
        """Check the algorithm, and spell it in one way; sink tokens that its text asks for become `start_size`."""
        if self.algorithm is None or isinstance(self.algorithm, Evictor) or self.algorithm in EVICTORS.names:
            return
        if not isinstance(self.algorithm, str):
            raise InputError(f"algorithm must be a name or an Evictor, got {shown(self.algorithm)}")
        named = EVICTORS.find(self.algorithm)
        sinks = named.parameters.get("sinks", self.start_size)
        if self.start_size not in (START_SIZE, sinks):
            raise InputError(f"{shown(self.algorithm)} contradicts start_size {self.start_size}: give one of them")
        self._set(algorithm=named.text, start_size=sinks)
        whole_number("start_size", sinks, 0, "a whole number of tokens")
        self.evictor  # noqa: B018 (a sentence, where the parameters are wrong)

    def _name_allocation(self) -> None:
        """Check the allocation, and the sizes that it takes."""
        if self.budgets is not None:
            if self.ini_size is not None or self.kv_class3 is not None:
                raise InputError("budgets replaces ini_size and kv_class3: give one or the other")
            if self.allocation != allocations.DEFAULT:
                raise InputError(f"budgets replaces the allocation {self.allocation}: give one or the other")
            self._set(budgets=Explicit(self.budgets).tokens)
        elif isinstance(self.allocation, Allocation):
            for name in ("ini_size", "kv_class3", "calibration"):
                if getattr(self, name) is not None:
                    raise InputError(f"{name} is a parameter of the allocation: {self.allocation} has its own")
        elif not isinstance(self.allocation, str):
            raise InputError(f"allocation must be a name or an Allocation, got {shown(self.allocation)}")
        else:
            self._check_sizes(allocations.ALLOCATIONS.find(self.allocation))

    def _check_sizes(self, named: Named[Allocation]) -> None:
        if "ini_size" not in named.fields:
            raise InputError(f"{named.label} has no parameter ini_size, by which its runs are named: add the field")
        if self.kv_class3 is not None and "class3" not in named.fields:
            raise InputError(f"KV_class3 is not for the {named.label}, which has no such parameter: leave it out")
        if "class3" in named.required and (self.ini_size is None or self.kv_class3 is None):
            missing = "ini_size" if self.ini_size is None else "KV_class3"
            raise InputError(f"{missing} is missing: ini_size and KV_class3 are given together")
        if self.ini_size is None:
            raise InputError(f"ini_size is missing: the {named.label} needs it")
        if self.calibration is not None and "calibration" not in named.fields:
            raise InputError(f"calibration is not for the {named.label}: leave it out")
        sizes = self.allocator.size, self.allocator.class3_size
        if not all(isinstance(size, Fraction | None) for size in sizes):
            raise InputError(f"{named.label}: its __post_init__ must call super().__post_init__(), which reads sizes")
        self._set(allocation=named.text, ini_size=sizes[0], kv_class3=sizes[1])

    def _check_per(self) -> None:
        if self.per not in PER:
            raise InputError(f"per must be one of {', '.join(PER)}, got {shown(self.per)}")
        curves, wanted = getattr(self.allocator, "calibration", None), "head" if self.per == "head" else "layer"
        if isinstance(curves, Calibration) and curves.per != wanted:
            raise InputError(
                f"{curves.source} has loss curves of each {curves.per}, and those of each {wanted} are asked for: "
                f"python -m squeeze.calibrate --per {wanted} measures them"
            )
        if self.per == "head" and not self.allocator.by_head:
            raise InputError(
                f"per head is for budgets by loss curves, and the allocation {self.allocator} knows only layers: take "
                "calibrated or measured, or per adakv"
            )
        if self.per == "adakv" and isinstance(self.allocator, Explicit) and self.allocator.per_head:
            raise InputError(
                "per adakv shares a layer's budget among its KV heads, and budgets has theirs: leave one out"
            )
        if self.per == "adakv" and self.algorithm is not None:
            self.check_scores(self.evictor)

    def check_scores(self, evictor: Evictor) -> None:
        """Raises InputError where KV heads compete by scores, and the evictor has none."""
        if self.per == "adakv" and not evictor.scores_prompts:
            raise InputError(f"per adakv needs a method that scores tokens, such as h2o, and {evictor} does not")

    def _check_prefill_chunk(self) -> None:
        whole_number("prefill_chunk", self.prefill_chunk, 1, "a whole number of tokens")
        if self.algorithm is not None and (self.evictor.scores_prompts or not self.evictor.fixed_slots):
            why = "chooses among the tokens" if self.evictor.scores_prompts else "gives slots by the length"
            raise InputError(
                f"prefill_chunk cannot be used with {self.algorithm}, which {why} of the whole prompt: "
                "leave it out, or take sliding_window or streaming"
            )
        if self.allocator.needs == "loss_curves":
            raise InputError(
                f"prefill_chunk cannot be used with the allocation {self.allocation}, which prefills the whole "
                "prompt: leave it out, or take the allocation calibrated"
            )
        if self.allocator.needs_prefill:
            other = "take another allocation"
            if "KV_class3" in self.sizes:
                other = f"make KV_class3 equal to ini_size ({float(self.share):g})"
            raise InputError(
                f"prefill_chunk needs budgets that are known before the prompt is read: {other}, or leave "
                "prefill_chunk out"
            )

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)


def as_config(
    asked: SqueezeConfig | Evictor | str | None, allocation: Allocation | str | None, **options: Any
) -> SqueezeConfig:
    """A configuration as it is, or one of an eviction method, an allocation and the other fields of SqueezeConfig.

    Raises:
        InputError: one is missing, or something stands beside a whole configuration.
    """
    if not isinstance(asked, SqueezeConfig):
        if allocation is None:
            raise InputError("the allocation is missing: squeezed(model, H2O(), Squeeze(0.2, class3=0.1))")
        return SqueezeConfig(asked, allocation=allocation, **options)
    if allocation is not None or options:
        raise InputError("a SqueezeConfig says everything: put the allocation and all options into it")
    return asked
