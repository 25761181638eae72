"""A sample's prompt and answers, and the largest one that fits into a length."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import NamedTuple

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


def largest(make: Maker, count: Counter, room: int, step: int, rng: Random, name: str) -> int:
    """The largest size whose prompt fits into a room of tokens, found as RULER does: by halves, each a new sample.

    Args:
        step: the smallest size.
        name: of the task, for the error.
    Raises:
        InputError: not even that fits.
    """
    smallest, next_one = count(make(step, rng)), count(make(2 * step, rng))
    if smallest > room:
        raise InputError(f"{name}'s smallest prompt has {smallest} tokens, and there is room for {max(room, 0)}")
    # Half more than a straight line through both says.
    low, high = step, step + int(1.5 * step * (room - smallest) / max(next_one - smallest, 1))
    found = step
    while low <= high:
        middle = (low + high) // 2
        if count(make(middle, rng)) <= room:
            found, low = middle, middle + 1
        else:
            high = middle - 1
    return found


def fitting(make: Maker, count: Counter, room: int, size: int, step: int, rng: Random, name: str) -> Made:
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
