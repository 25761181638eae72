"""What a run is asked to do: one validated, frozen SqueezeConfig.

The words are those of the paper's command line (SqueezeAttention, arXiv 2404.04793): `ini_size` is the initial
budget of every layer and `KV_class3` the budget of the least important layers, both as fractions of the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral
from typing import TYPE_CHECKING

from squeeze.errors import InputError
from squeeze.numbers import parse_fraction, shown, whole_number

if TYPE_CHECKING:
    from squeeze.allocations.calibration import Calibration

ALGORITHMS = ("sliding_window", "streaming", "h2o")
ALLOCATIONS = ("squeeze", "squeeze-log", "paper", "calibrated", "measured")

#: Those that make budgets from loss curves, and take no `KV_class3`.
BY_LOSS = ("calibrated", "measured")
ATTENTIONS = ("auto", "sdpa", "eager")
DTYPES = ("auto", "float32", "bfloat16", "float16")

#: What the published command lines rely on: each architecture has its own eviction method.
DEFAULT_ALGORITHM: dict[str, str] = {"mistral": "sliding_window", "llama": "streaming"}


@dataclass(frozen=True)
class SqueezeConfig:
    """How much KV cache each layer may keep, and which tokens it keeps.

    Args:
        algorithm: `sliding_window`, `streaming` (StreamingLLM) or `h2o`; None takes the model's default
            (`DEFAULT_ALGORITHM`).
        ini_size: initial budget of every layer, as a fraction of the prompt's tokens, in (0, 1].
        kv_class3: budget of the layers in class 3, as a fraction of the prompt's tokens, in (0, `ini_size`].
        allocation: how similarities become budgets: `squeeze`, `squeeze-log` or `paper`, or
            `calibrated` or `measured`, by loss curves and without `kv_class3`: of a file (see
            `squeeze.allocations`), or measured on each prompt's own last tokens, which costs several prefills (see
            `squeeze.engine.loss_curves`).
        budgets: tokens, one entry a layer, in place of `ini_size` and `kv_class3`.
        start_size: sink tokens that StreamingLLM never evicts.
        attn: prefill attention; `auto` and `sdpa` use PyTorch's fused kernel, `eager` explicit blocks of queries
            with a float32 softmax. H2O always uses the latter, since it needs the probabilities.
        compile: compile the decode step with `torch.compile`; the first steps take some seconds then.
        calibration: the loss curves of `calibrated`, from `squeeze.allocations.calibration.read_calibration`.
        prefill_chunk: tokens of the prompt that are prefilled at a time; None: all of them. A sliding window or
            StreamingLLM whose budgets do not depend on similarities then holds no layer's whole prompt: every chunk is
            cut to the budgets before the next one comes. The cache ends up with the same tokens, but a chunk attends
            to itself and to what was kept before it, at original positions, in place of everything. That is the same
            result, up to rounding, where in every layer nothing was evicted before the last chunk (budget and
            `prefill_chunk` together reach the prompt's length), or where what is kept besides the sinks reaches back
            as far as the model's own attention window does; else it is another, cheaper method.
    Raises:
        InputError: a value is out of its range, or two exclude each other.
    """

    algorithm: str | None = None
    ini_size: Fraction | float | str | None = None
    kv_class3: Fraction | float | str | None = None
    allocation: str = "squeeze"
    budgets: Sequence[int] | None = None
    start_size: int = 4
    attn: str = "auto"
    compile: bool = False
    calibration: Calibration | None = None
    prefill_chunk: int | None = None

    def __post_init__(self) -> None:
        if self.algorithm is not None:
            _one_of("algorithm", self.algorithm, ALGORITHMS)
        _one_of("allocation", self.allocation, ALLOCATIONS)
        _one_of("attn", self.attn, ATTENTIONS)
        whole_number("start_size", self.start_size, 0, "a whole number of tokens")
        self._parse_sizes()
        if self.prefill_chunk is not None:
            self._check_prefill_chunk()

    def _parse_sizes(self) -> None:
        if self.budgets is not None:
            if self.ini_size is not None or self.kv_class3 is not None:
                raise InputError("budgets replaces ini_size and kv_class3: give one or the other")
            budgets = tuple(self.budgets)
            if not all(isinstance(tokens, Integral) for tokens in budgets):
                raise InputError(f"budgets must be whole numbers of tokens, got {list(budgets)}")
            object.__setattr__(self, "budgets", tuple(int(tokens) for tokens in budgets))
            return
        if self.allocation in BY_LOSS:
            if self.kv_class3 is not None:
                raise InputError(
                    f"KV_class3 is not for the allocation {self.allocation}, whose budgets come from loss curves: "
                    "leave it out"
                )
            if self.ini_size is None:
                raise InputError(f"ini_size is missing: the allocation {self.allocation} needs it")
            object.__setattr__(self, "ini_size", _size(self.ini_size))
            return
        if self.ini_size is None or self.kv_class3 is None:
            missing = "ini_size" if self.ini_size is None else "KV_class3"
            raise InputError(f"{missing} is missing: ini_size and KV_class3 are given together")
        ini_size = _size(self.ini_size)
        kv_class3 = parse_fraction("KV_class3", self.kv_class3)
        if not 0 < kv_class3 <= ini_size:
            raise InputError(f"KV_class3 must be in (0, ini_size = {float(ini_size):g}], got {shown(self.kv_class3)}")
        object.__setattr__(self, "ini_size", ini_size)
        object.__setattr__(self, "kv_class3", kv_class3)

    def _check_prefill_chunk(self) -> None:
        whole_number("prefill_chunk", self.prefill_chunk, 1, "a whole number of tokens")
        if self.algorithm == "h2o":
            raise InputError(
                "prefill_chunk cannot be used with h2o, which chooses tokens by the attention of the whole prompt: "
                "leave it out, or take sliding_window or streaming"
            )
        if self.allocation == "measured":
            raise InputError(
                "prefill_chunk cannot be used with the allocation measured, which prefills the whole prompt: "
                "leave it out, or take the allocation calibrated"
            )
        if self.needs_similarities:
            raise InputError(
                "prefill_chunk needs budgets that are known before the prompt is read: "
                f"make KV_class3 equal to ini_size ({float(self.fractions[0]):g}), or leave prefill_chunk out"
            )

    @property
    def needs_similarities(self) -> bool:
        """Whether budgets follow from similarities, which are not known before the end of the prefill."""
        if self.budgets is not None or self.allocation in BY_LOSS:
            return False
        ini_size, kv_class3 = self.fractions
        return kv_class3 < ini_size

    @property
    def fractions(self) -> tuple[Fraction, Fraction]:
        """`ini_size` and `kv_class3`, exactly; ValueError where there are none."""
        if self.kv_class3 is None:
            raise ValueError("this configuration has no KV_class3")
        return self.share, parse_fraction("KV_class3", self.kv_class3)

    @property
    def share(self) -> Fraction:
        """`ini_size`, exactly; ValueError with explicit budgets, which have none."""
        if self.ini_size is None:
            raise ValueError("this configuration has explicit budgets and no ini_size")
        return parse_fraction("ini_size", self.ini_size)

    @property
    def sizes(self) -> dict[str, float]:
        """`ini_size` and `KV_class3`, as far as they are given."""
        found = {"ini_size": self.ini_size, "KV_class3": self.kv_class3}
        return {name: float(parse_fraction(name, value)) for name, value in found.items() if value is not None}


def _size(value: Fraction | float | str) -> Fraction:
    """Read `ini_size`."""
    found = parse_fraction("ini_size", value)
    if not 0 < found <= 1:
        raise InputError(f"ini_size must be in (0, 1], got {shown(value)}")
    return found


def _one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise InputError(f"{name} must be one of {', '.join(allowed)}, got {shown(value)}")
