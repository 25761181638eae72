"""The interface of an allocation: how many tokens each layer may hold, for one prompt. No torch, no model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from squeeze.allocations.classes import classify
from squeeze.errors import InputError
from squeeze.evictors.base import Evictor
from squeeze.numbers import parse_fraction, shown
from squeeze.registry import Strategy, fields_of

Needs = Literal["nothing", "similarities", "loss_curves"]


@dataclass(frozen=True)
class Budgets:
    """Tokens per layer, and what the user should know about how they came out.

    Attributes:
        tokens: one budget a layer.
        classes: class of each layer (1, 2 or 3), or None where the allocation did not sort them.
        notes: sentences, empty when the total is what was asked for.
    """

    tokens: list[int]
    classes: list[int] | None = None
    notes: tuple[str, ...] = ()


class LossCurves(NamedTuple):
    """Sizes of a layer that is cut, as multiples of `ini_size`, ascending; and losses, `(prompts, layers, sizes)`."""

    multiples: Sequence[Fraction]
    losses: np.ndarray


@dataclass(frozen=True)
class PromptFacts:
    """Facts about a prompt and its model that budgets are made from.

    Attributes:
        layers: decoder layers of the model.
        length: tokens of the prompt, padding excluded.
        cap: the most tokens a layer can hold: prompt plus new tokens, or the model's attention window.
        minimum: the fewest tokens the eviction method works with.
        similarities: importance of each layer, `(layers,)`, where the allocation needs it (`squeeze.importance`).
        curves: measured on this prompt's own last tokens, where the allocation needs them.
    """

    layers: int
    length: int
    cap: int
    minimum: int
    similarities: np.ndarray | None = None
    curves: LossCurves | None = None

    @property
    def least(self) -> int:
        """The fewest tokens of a layer: the minimum, or the cap of a prompt that cannot fill it."""
        return min(self.minimum, self.cap)


class Allocation(Strategy, ABC):
    """A way of making budgets: a frozen dataclass whose fields are its parameters.

    The fields `ini_size`, `class3` and `calibration` are given by `--ini_size`, `--KV_class3` and the model's file of
    loss curves; commands need an allocation to have the first.

    Attributes:
        needs: `similarities` of the prompt, which are known at the end of its prefill; `loss_curves`, which cost
            several prefills; or `nothing` beside the prompt's length.
        ini_size: budget of every layer before some give tokens to others, as a fraction of the prompt.
    """

    needs: Needs = "nothing"
    ini_size: Fraction

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        if isinstance(cls.needs, str) and cls.needs not in get_args(Needs):
            raise InputError(f"needs of {cls.__name__} must be one of {', '.join(get_args(Needs))}, got {cls.needs}")

    def __post_init__(self) -> None:
        if self.size is None:
            return
        object.__setattr__(self, "ini_size", read_size(self.size))
        field = fields_of(type(self)).get("class3")
        given: Any = getattr(self, "class3", None)
        if field is not None and (given is not None or field.default is not None):
            class3 = parse_fraction("KV_class3", given)
            if not 0 < class3 <= self.ini_size:
                raise InputError(f"KV_class3 must be in (0, ini_size = {float(self.ini_size):g}], got {shown(given)}")
            object.__setattr__(self, "class3", class3)

    @property
    def size(self) -> Fraction | None:
        """`ini_size`; None of an allocation without it."""
        return getattr(self, "ini_size", None)

    @property
    def class3_size(self) -> Fraction | None:
        """`class3`; None of an allocation without it."""
        return getattr(self, "class3", None)

    @abstractmethod
    def allocate(self, facts: PromptFacts) -> Budgets:
        """Budgets of all layers for one prompt, none below `facts.least` or above `facts.cap`."""

    def classify(self, similarities: np.ndarray) -> list[int]:
        """The class of each layer (1, 2 or 3), for reports."""
        return classify(similarities)

    def check(self, algorithm: str, evictor: Evictor, layers: int) -> None:
        """Raises InputError unless the allocation fits an eviction method and a model of so many layers."""


def read_size(value: Fraction | float | str) -> Fraction:
    """Read `ini_size`; InputError unless it is in (0, 1]."""
    size = parse_fraction("ini_size", value)
    if not 0 < size <= 1:
        raise InputError(f"ini_size must be in (0, 1], got {shown(value)}")
    return size


def check_budgets(budgets: Budgets, facts: PromptFacts, allocation: Allocation) -> None:
    """Raises InputError unless each layer has a whole number of tokens within its bounds, and a class or none has."""
    if not isinstance(budgets, Budgets):
        raise InputError(f"the allocation {allocation} must return squeeze.Budgets, and gave {shown(budgets)}")
    tokens, classes = budgets.tokens, budgets.classes
    if len(tokens) != facts.layers or not all(
        isinstance(count, Integral) and facts.least <= count <= facts.cap for count in tokens
    ):
        raise InputError(
            f"the allocation {allocation} must give {facts.layers} layers whole numbers of tokens from {facts.least} "
            f"to {facts.cap}, and gave {shown(tokens)}"
        )
    if classes is not None and (len(classes) != facts.layers or not set(classes) <= {1, 2, 3}):
        raise InputError(
            f"the allocation {allocation} must sort {facts.layers} layers into the classes 1, 2 and 3, or leave "
            f"classes out, and gave {shown(classes)}"
        )
