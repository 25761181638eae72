"""Lists of words of which some are in it more often than others, as English words and as a coded text."""

from __future__ import annotations

import string
from random import Random

import numpy as np

from squeeze.benchmarks.ruler import texts
from squeeze.benchmarks.ruler.made import Counter, Made
from squeeze.benchmarks.ruler.tasks import CommonWords, FrequentWords
from squeeze.benchmarks.ruler.texts import Texts
from squeeze.errors import InputError

#: The fewest words of a list beside the common ones.
STEP = 10

#: Letters of a coded word.
CODED = 6


def common(task: CommonWords, given: Texts, length: int, size: int, rng: Random) -> Made:
    """A prompt with a list of so many different words, after a short solved one."""
    long = length >= 4096
    shown, solution = _list(task, given, *((40, 10, 3) if long else (20, 3, 1)), rng)
    context, answers = _list(task, given, size, *((30, 3) if long else (6, 1)), rng)
    prefix = task.form.prefix
    solved = " ".join(f"{number}. {word}" for number, word in enumerate(solution, start=1))
    example = f"{task.form.filled(shown)[0]}{prefix} {solved}"
    question, after = task.form.filled(context)
    return Made(f"{example}\n{question}", after, prefix, answers)


def most(given: Texts) -> int:
    """The most different words that a list can have."""
    return max(len(texts.single_words()), len(given.more_words))


def _list(task: CommonWords, given: Texts, size: int, often: int, seldom: int, rng: Random) -> tuple[str, list[str]]:
    """A numbered list, and the words that are in it more often."""
    known = texts.single_words()
    chosen = rng.sample(known if size <= len(known) else given.more_words, size)
    words = chosen[: task.common] * often + chosen[task.common :] * seldom
    rng.shuffle(words)
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, start=1)), chosen[: task.common]


def frequent(task: FrequentWords, count: Counter, room: int, rng: Random, words: int | None) -> tuple[Made, int]:
    """A prompt with a coded text of so many words, or of fewer that fit; None: of as many as fit.

    Returns:
        The prompt, and how many words it was made for.
    """
    from scipy.special import zeta

    vocabulary: list[str] = []
    while len(vocabulary) < room // 50:
        word = "".join(rng.choices(string.ascii_lowercase, k=CODED))
        vocabulary += [word] if word not in vocabulary else []
    if len(vocabulary) <= task.asked:
        raise InputError(f"{task.name} needs room for {50 * (task.asked + 1)} tokens, and there are {max(room, 0)}")
    vocabulary[0] = "..."  # the most frequent one says nothing
    ranks = np.arange(1, len(vocabulary) + 1)
    order = rng.getrandbits(64)

    def made(size: int) -> Made:
        counts = (size * ranks**-task.alpha / zeta(task.alpha)).astype(int).tolist()
        text = [word for word, times in zip(vocabulary, counts, strict=True) for _ in range(times)]
        Random(order).shuffle(text)
        return Made(*task.form.filled(" ".join(text)), task.form.prefix, vocabulary[1 : 1 + task.asked])

    step = max(room // 32, 1)
    if words is None:
        words = room // CODED
        while count(made(words)) < room:
            words += step
        words -= step
    while count(made(words)) > room and words > step:
        words -= step
    found = made(words)
    if count(found) > room:
        raise InputError(f"{task.name}'s smallest prompt has {count(found)} tokens, and there is room for {room}")
    return found, words
