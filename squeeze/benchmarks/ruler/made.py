"""A sample's prompt and answers, and the largest one that fits into a length."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import NamedTuple, TypeVar

from squeeze.errors import InputError


class Made(NamedTuple):
    """A prompt in its two parts, and what its answer must have.

    Args:
        question: all but the answer's beginning.
        after: the part of the question that follows on the context.
        prefix: the answer's beginning.
        answers: strings to be found in what a model writes.
    """

    question: str
    after: str
    prefix: str
    answers: list[str]


#: A sample of some size, by chance.
Maker = Callable[[int, Random], Made]

#: Tokens of a prompt.
Counter = Callable[[Made], int]

#: A sample, or several that must have one size.
Some = TypeVar("Some")


def largest(
    make: Callable[[int, Random], Some],
    count: Callable[[Some], int],
    room: int,
    step: int,
    rng: Random,
    name: str,
    most: int | None = None,
) -> int:
    """The largest size whose prompt fits into a room of tokens: doubled, then found by halves, each a new sample.

    Args:
        step: the smallest size.
        name: of the task, for the error.
        most: the largest size that can be made; None: any.
    Raises:
        InputError: not even the smallest fits.
    """
    smallest = count(make(step, rng))
    if smallest > room:
        raise InputError(f"{name}'s smallest prompt has {smallest} tokens, and there is room for {max(room, 0)}")
    low, high = step, 2 * step
    while (most is None or high <= most) and count(make(high, rng)) <= room:
        low, high = high, 2 * high
    if most is not None:
        high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        if count(make(middle, rng)) <= room:
            low = middle
        else:
            high = middle
    return low


def fitting(
    make: Callable[[int, Random], Some],
    count: Callable[[Some], int],
    room: int,
    size: int,
    step: int,
    rng: Random,
    name: str,
) -> Some:
    """A sample of a size, or of one that is smaller by some steps, which fits."""
    while True:
        made = make(size, rng)
        if count(made) <= room:
            return made
        if size <= step:
            raise InputError(
                f"{name}'s smallest prompt has {count(made)} tokens, and there is room for {max(room, 0)}"
            )
        size = max(size - step, step)
