"""Needles in a haystack: sentences that give keys their values, among others."""

from __future__ import annotations

import uuid
from dataclasses import replace
from random import Random

from squeeze.benchmarks.ruler import texts
from squeeze.benchmarks.ruler.made import Made
from squeeze.benchmarks.ruler.tasks import Kind, Needles
from squeeze.benchmarks.ruler.texts import NOISE, Texts, sentences

NEEDLE = "One of the special magic {type_needle_v} for {key} is: {value}."

#: Places in prose, in percent.
DEPTHS = [round(100 * step / 39) for step in range(40)]

#: Words of the shortest haystack whose needle lies at a depth that was asked for.
LEAST_PROSE = 25

#: What the words of a prompt become where a single value is asked for, in this order.
SINGULAR = (("Some", "A"), ("are all", "is"), ("are", "is"), ("answers", "answer"))


def step(task: Needles, length: int) -> int:
    """The smallest haystack: words of prose, or sentences."""
    if task.haystack == "essay":
        return 500
    return 25 if length >= 4096 else 5


def make(task: Needles, given: Texts, size: int, rng: Random, depth: float | None = None) -> Made:
    """A prompt with needles among so many words of prose, or other sentences.

    Args:
        depth: where the needle lies in prose, in percent of its sentences; None: by chance.
    """
    keys = [_word(task.key, rng) for _ in range(task.keys)]
    values = [[_word(task.value, rng) for _ in range(task.values)] for _ in keys]
    needles = [
        NEEDLE.format(type_needle_v=task.value, key=key, value=value)
        for key, own in zip(keys, values, strict=True)
        for value in own
    ]
    rng.shuffle(needles)
    asked = rng.sample(range(len(keys)), task.queries)
    query = _listed([keys[index] for index in asked])
    form, kind = task.form, str(task.value)
    if task.queries * task.values == 1:
        for old, new in SINGULAR:
            form = replace(form, template=form.template.replace(old, new), prefix=form.prefix.replace(old, new))
        kind = kind.removesuffix("s")
    context = _context(task, given, size, needles, rng, depth)
    answers = [value for index in asked for value in values[index]]
    words = {"type_needle_v": kind, "query": query}
    return Made(*form.filled(context, **words), form.prefix.format(**words), answers)


def _context(task: Needles, given: Texts, size: int, needles: list[str], rng: Random, depth: float | None) -> str:
    if task.haystack == "essay":
        words = given.prose * -(-size // len(given.prose))
        parts = sentences(" ".join(words[:size]))
        depths = rng.sample(DEPTHS, len(needles)) if depth is None else [depth] * len(needles)
        places = sorted(int(len(parts) * one / 100) for one in depths)
        pieces, last = [], 0
        for place, needle in zip(places, needles, strict=True):
            pieces += [" ".join(parts[last:place]), needle]
            last = place
        return " ".join([*pieces, " ".join(parts[last:])])
    if task.haystack == "noise":
        lines = [NOISE] * size
    else:
        lines = [
            NEEDLE.format(type_needle_v=task.value, key=_word(task.key, rng), value=_word(task.value, rng))
            for _ in range(size)
        ]
    for place, needle in zip(sorted(rng.sample(range(size), len(needles)), reverse=True), needles, strict=True):
        lines.insert(place, needle)
    return "\n".join(lines)


def _word(kind: Kind, rng: Random) -> str:
    if kind == "numbers":
        return str(rng.randint(10**6, 10**7 - 1))
    if kind == "words":
        return texts.key(rng)
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _listed(keys: list[str]) -> str:
    return keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"
