"""Variable tracking: a chain of assignments in sentences without meaning, after a short example of one."""

from __future__ import annotations

import re
import string
from itertools import pairwise
from random import Random

from squeeze.benchmarks.ruler.made import Counter, Made, largest
from squeeze.benchmarks.ruler.tasks import Chain
from squeeze.benchmarks.ruler.texts import NOISE

#: Of the example: tokens, its value, and letters of a variable, of which others have more.
EXAMPLE_TOKENS, EXAMPLE_VALUE, EXAMPLE_LETTERS, LETTERS = 500, "12345", 3, 5
EXAMPLE_STEP = 5


def step(length: int) -> int:
    """The fewest sentences."""
    return 10 if length >= 4096 else 5


def make(task: Chain, size: int, rng: Random, example: str) -> Made:
    """A prompt with a chain among so many sentences, after the example with new names."""
    made = _alone(task, size, rng, LETTERS, str(rng.randint(10000, 99998)))
    return made._replace(question=f"{renamed(example, rng)}\n{made.question}")


def example(task: Chain, count: Counter, rng: Random) -> str:
    """A solved prompt of a chain, as long as fits into `EXAMPLE_TOKENS`."""

    def short(size: int, chance: Random) -> Made:
        return _alone(task, size, chance, EXAMPLE_LETTERS, EXAMPLE_VALUE)

    made = short(largest(short, count, EXAMPLE_TOKENS, EXAMPLE_STEP, rng, f"the example of {task.name}"), rng)
    return f"{made.question}{made.prefix} {' '.join(made.answers)}\n"


def renamed(example: str, rng: Random) -> str:
    """The example with other variables and another value."""
    for name in re.findall(r"VAR ([A-Z]+) = ", example):
        new = _names(1, len(name), rng)[0]
        example = re.sub(rf"\b{name}\b", new, example)
    return example.replace(EXAMPLE_VALUE, str(rng.randint(10000, 99998)))


def _alone(task: Chain, size: int, rng: Random, letters: int, value: str) -> Made:
    names = _names(task.hops + 1, letters, rng)
    chain = [f"VAR {names[0]} = {value}"]
    chain += [f"VAR {name} = VAR {before} " for before, name in pairwise(names)]
    lines = [NOISE] * size
    for later, place in enumerate(sorted(rng.sample(range(size), len(chain)))):
        lines.insert(place + later, chain[later])
    context = "\n".join(lines).replace(". \n", ".\n")
    asked = {"query": value, "num_v": task.hops + 1}
    return Made(*task.form.filled(context, **asked), task.form.prefix.format(**asked), names)


def _names(count: int, letters: int, rng: Random) -> list[str]:
    """Different variables."""
    names: list[str] = []
    while len(names) < count:
        name = "".join(rng.choices(string.ascii_uppercase, k=letters))
        # VAR is what every assignment begins with.
        names += [name] if name not in (*names, "VAR") else []
    return names
