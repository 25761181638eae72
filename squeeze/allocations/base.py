"""The interface of an allocation: how many tokens each layer may hold, for one prompt. No torch, no model."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import accumulate
from numbers import Integral
from typing import Any, Literal, NamedTuple, Protocol, get_args

import numpy as np

from squeeze.allocations.classes import classify
from squeeze.errors import InputError
from squeeze.evictors.base import Evictor
from squeeze.numbers import parse_fraction, shown
from squeeze.registry import Strategy, fields_of

Needs = Literal["nothing", "similarities", "attention", "loss_curves"]


@dataclass(frozen=True)
class Budgets:
    """Tokens per layer, and what the user should know about how they came out.

    Attributes:
        tokens: one budget a layer, or in each layer one a KV head.
        classes: class of each layer (1, 2 or 3), or None where the allocation did not sort them.
        notes: sentences, empty when the total is what was asked for.
    """

    tokens: list[int] | list[list[int]]
    classes: list[int] | None = None
    notes: tuple[str, ...] = ()

    @property
    def per_head(self) -> bool:
        """Whether KV heads have budgets of their own."""
        return any(isinstance(tokens, list | tuple) for tokens in self.tokens)

    def of_heads(self, kv_heads: Sequence[int]) -> Budgets:
        """What was made for heads as if each were a layer (`heads_of`), as budgets of layers with so many."""
        ends = list(accumulate(kv_heads))
        tokens: list[Any] = [self.tokens[end - heads : end] for end, heads in zip(ends, kv_heads, strict=True)]
        return replace(self, tokens=tokens)


class LossCurves(NamedTuple):
    """Sizes of a layer that is cut, as multiples of `ini_size`, ascending; and losses, `(prompts, layers, sizes)`."""

    multiples: Sequence[Fraction]
    losses: np.ndarray


class Spread(NamedTuple):
    """How a prompt's last queries spread their attention over the tokens before them, in each layer.

    Args:
        entropy: of their probabilities, in nats, summed over queries and query heads, `(layers,)`.
        variance: of a token's probabilities over the queries, summed over tokens and query heads, `(layers,)`.
    """

    entropy: np.ndarray
    variance: np.ndarray


class CachedLayer(Protocol):
    """An attention layer with a cache of its own, as far as budgets go by it."""

    @property
    def window(self) -> int | None:
        """Tokens that a query sees at most, itself included; None for all."""

    @property
    def chunk(self) -> int | None:
        """Tokens of the pieces that attention stays within; None where there are none."""

    @property
    def kv_heads(self) -> int: ...

    @property
    def key_dim(self) -> int:
        """Numbers of one head's key in the cache."""

    @property
    def value_dim(self) -> int: ...

    def reach(self, tokens: int) -> int:
        """Tokens that the layer's own full cache holds after so many: `min(tokens, window, chunk)`."""


@dataclass(frozen=True)
class Head:
    """A KV head of a layer, as a layer with a single one: so whatever makes budgets of layers makes those of heads."""

    layer: CachedLayer
    kv_heads: int = 1

    window = property(lambda self: self.layer.window)
    chunk = property(lambda self: self.layer.chunk)
    key_dim = property(lambda self: self.layer.key_dim)
    value_dim = property(lambda self: self.layer.value_dim)

    def reach(self, tokens: int) -> int:
        """As `CachedLayer.reach`."""
        return self.layer.reach(tokens)


def heads_of(layers: Sequence[CachedLayer]) -> list[Head]:
    """All KV heads, those of the first layer first."""
    return [Head(layer) for layer in layers for _ in range(layer.kv_heads)]


def reach(layers: Sequence[CachedLayer], length: int) -> tuple[int, ...]:
    """Tokens of a prompt that `ini_size` is a fraction of, in each layer (docs/budgets.md).

    They are what the model's own full cache would hold. Where all layers are alike they are the whole prompt even so,
    as published, and a window only bounds the budgets.
    """
    if len({(layer.window, layer.chunk) for layer in layers}) == 1:
        return (length,) * len(layers)
    return tuple(layer.reach(length) for layer in layers)


@dataclass(frozen=True)
class PromptFacts:
    """Facts about a prompt and its model that budgets are made from; layers are those with a cache of keys and values.

    Attributes:
        length: tokens of the prompt, padding excluded.
        caps: the most tokens that each layer can hold: prompt plus new tokens, or its own window or chunk.
        reach: tokens of the prompt in each layer that `ini_size` is a fraction of, see `reach`.
        widths: numbers of one token's keys and values in each layer, all heads.
        minimum: the fewest tokens the eviction method works with.
        similarities: importance of each layer, `(layers,)`, where the allocation needs it (`squeeze.importance`).
        spread: of the attention of the last queries, where the allocation needs it.
        curves: measured on this prompt's own last tokens, where the allocation needs them.
    """

    length: int
    caps: tuple[int, ...]
    reach: tuple[int, ...]
    widths: tuple[int, ...]
    minimum: int
    similarities: np.ndarray | None = None
    spread: Spread | None = None
    curves: LossCurves | None = None

    @classmethod
    def of(
        cls,
        layers: Sequence[CachedLayer],
        length: int,
        max_new_tokens: int,
        minimum: int,
        **measured: Any,
    ) -> PromptFacts:
        """Facts about a prompt of `length` tokens in a model with these layers.

        Args:
            measured: `similarities`, `spread` or `curves`, where the allocation needs them.
        """
        return cls(
            length=length,
            caps=tuple(layer.reach(length + max_new_tokens) for layer in layers),
            reach=reach(layers, length),
            widths=tuple(layer.kv_heads * (layer.key_dim + layer.value_dim) for layer in layers),
            minimum=minimum,
            **measured,
        )

    @property
    def layers(self) -> int:
        """How many they are."""
        return len(self.caps)

    @property
    def least(self) -> tuple[int, ...]:
        """The fewest tokens of each layer: the minimum, or the cap of one that cannot hold as many."""
        return tuple(min(self.minimum, cap) for cap in self.caps)

    @property
    def weights(self) -> tuple[int, ...]:
        """Of one token in each layer, in a total: the widths in lowest terms, so 1 where they are equal."""
        common = math.gcd(*self.widths)
        return tuple(width // common for width in self.widths)


class Allocation(Strategy, ABC):
    """A way of making budgets: a frozen dataclass whose fields are its parameters.

    The fields `ini_size`, `class3` and `calibration` are given by `--ini_size`, `--KV_class3` and the model's file of
    loss curves; commands need an allocation to have the first.

    Attributes:
        by_head: whether it can make budgets of KV heads, each of which stands in `PromptFacts` as a layer then.
        needs: `similarities` of the prompt, or the spread of its last queries' `attention`, which are known at the end
            of its prefill; `loss_curves`, which cost several prefills; or `nothing` beside the prompt's length.
        observed: how many of the last queries, for an allocation that needs their attention.
        ini_size: budget of every layer before some give tokens to others, as a fraction of `PromptFacts.reach`.
    """

    by_head: bool = False
    needs: Needs = "nothing"
    observed: int = 0
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
    def needs_prefill(self) -> bool:
        """Whether budgets are known at the end of the prefill, and not before it."""
        return self.needs in ("similarities", "attention")

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
        """Budgets of all layers for one prompt, none below `facts.least` or above `facts.caps`."""

    def classify(self, similarities: np.ndarray) -> list[int]:
        """The class of each layer (1, 2 or 3), for reports."""
        return classify(similarities)

    def check(self, algorithm: str, evictor: Evictor, layers: int) -> None:
        """Raises InputError unless the allocation fits an eviction method and a model of so many attention layers."""


def read_size(value: Fraction | float | str) -> Fraction:
    """Read `ini_size`; InputError unless it is in (0, 1]."""
    size = parse_fraction("ini_size", value)
    if not 0 < size <= 1:
        raise InputError(f"ini_size must be in (0, 1], got {shown(value)}")
    return size


def check_budgets(budgets: Budgets, facts: PromptFacts, allocation: Allocation) -> None:
    """Raises InputError unless each layer has a whole number of tokens within its bounds, and a class or none has.

    Or so each KV head has.
    """
    if not isinstance(budgets, Budgets):
        raise InputError(f"the allocation {allocation} must return squeeze.Budgets, and gave {shown(budgets)}")
    tokens, classes, layers = budgets.tokens, budgets.classes, facts.layers
    if len(tokens) != layers:
        raise InputError(
            f"the allocation {allocation} must give {layers} layers their tokens, and gave {shown(tokens)}"
        )
    for layer, (own, least, cap) in enumerate(zip(tokens, facts.least, facts.caps, strict=True)):
        heads = own if isinstance(own, list | tuple) else [own]
        whole = isinstance(own, list | tuple) == budgets.per_head and bool(heads)
        if not (whole and all(isinstance(count, Integral) and least <= int(count) <= cap for count in heads)):
            raise InputError(
                f"the allocation {allocation} must give layer {layer} a whole number of tokens from {least} to {cap}, "
                f"and gave {shown(tokens)}"
            )
    if classes is not None and (len(classes) != layers or not set(classes) <= {1, 2, 3}):
        raise InputError(
            f"the allocation {allocation} must sort {layers} layers into the classes 1, 2 and 3, or leave "
            f"classes out, and gave {shown(classes)}"
        )
