"""The thirteen tasks of RULER: what their prompts say, and how they are made.

Templates, answer prefixes, numbers of new tokens and sizes are those of RULER's own `scripts/synthetic.yaml` and
`scripts/data/synthetic/constants.py`, to the character (NVIDIA, Apache License 2.0).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from squeeze.errors import InputError
from squeeze.text import shortened

Kind = Literal["words", "numbers", "uuids"]


@dataclass(frozen=True)
class Form:
    """What the prompts of a family of tasks say.

    Args:
        template: with `{context}`, and what else is asked.
        prefix: how the answer begins; it is part of the prompt.
        new_tokens: that the answer has.
    """

    template: str
    prefix: str
    new_tokens: int

    def filled(self, context: str, **asked: object) -> tuple[str, str]:
        """The template with a context, and the part of it that follows on the context."""
        before, after = self.template.split("{context}")
        after = after.format(**asked)
        return before.format(**asked) + context + after, after


@dataclass(frozen=True)
class Task:
    """One task.

    Args:
        name: RULER's.
        form: of its family.
    """

    name: str
    form: Form


@dataclass(frozen=True)
class Needles(Task):
    """Needles in a haystack.

    Args:
        haystack: what they lie in: sentences without meaning, prose, or other needles.
        key, value: what they say.
        keys, values, queries: how many keys there are, values of each, and keys that are asked for.
    """

    haystack: Literal["noise", "essay", "needle"] = "essay"
    key: Kind = "words"
    value: Kind = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1


@dataclass(frozen=True)
class Chain(Task):
    """Variables that are assigned to one another, hidden in sentences without meaning."""

    hops: int = 4


@dataclass(frozen=True)
class CommonWords(Task):
    """The words of a list that are in it more often than others."""

    common: int = 10


@dataclass(frozen=True)
class FrequentWords(Task):
    """The most frequent words of a coded text, whose frequencies fall as `rank ** -alpha`."""

    alpha: float = 2.0
    asked: int = 3


@dataclass(frozen=True)
class Questions(Task):
    """Questions about some of many documents.

    Args:
        file: that has them, as RULER's own download calls it.
    """

    file: str = ""


NIAH = Form(
    "Some special magic {type_needle_v} are hidden within the following text. Make sure to memorize it. I will quiz "
    "you about the {type_needle_v} afterwards.\n{context}\nWhat are all the special magic {type_needle_v} for {query} "
    "mentioned in the provided text?",
    " The special magic {type_needle_v} for {query} mentioned in the provided text are",
    128,
)
CHAIN = Form(
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: "
    "Find all variables that are assigned the value {query} in the text above.",
    " Answer: According to the chain(s) of variable assignment in the text above, {num_v} variables are assigned the "
    "value {query}, they are: ",
    30,
)
COMMON = Form(
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list?",
    " Answer: The top 10 words that appear most often in the list are:",
    120,
)
FREQUENT = Form(
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
    "appeared coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What "
    "are the three most frequently appeared words in the above coded text?",
    " Answer: According to the coded text above, the three most frequently appeared words are:",
    50,
)
ASKED = "Answer the question based on the given documents. Only give me the answer and do not output any other words."
QUESTIONS = Form(
    f"{ASKED}\n\nThe following are given documents.\n\n{{context}}\n\n{ASKED}\n\nQuestion: {{query}}", " Answer:", 32
)

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Needles("niah_single_1", NIAH, "noise"),
        Needles("niah_single_2", NIAH),
        Needles("niah_single_3", NIAH, value="uuids"),
        Needles("niah_multikey_1", NIAH, keys=4),
        Needles("niah_multikey_2", NIAH, "needle"),
        Needles("niah_multikey_3", NIAH, "needle", "uuids", "uuids"),
        Needles("niah_multivalue", NIAH, values=4),
        Needles("niah_multiquery", NIAH, keys=4, queries=4),
        Chain("vt", CHAIN),
        CommonWords("cwe", COMMON),
        FrequentWords("fwe", FREQUENT),
        Questions("qa_1", QUESTIONS, "squad.json"),
        Questions("qa_2", QUESTIONS, "hotpotqa.json"),
    )
}

#: The needle of the map: one number in prose. Its answer is that number, so that RULER's 128 tokens would be idle.
MAPPED = Needles("niah", replace(NIAH, new_tokens=32))

#: Tasks by name, the map's included.
KNOWN = TASKS | {MAPPED.name: MAPPED}

#: What the prose of RULER's own download is called; with other prose a task has another name.
ESSAYS = "PaulGrahamEssays.json"


@dataclass(frozen=True)
class Asked:
    """A task at a length, as a data set's name has it: `vt_4096`, or `niah_single_2-prose_4096`.

    Args:
        prose: what an essay task's needles lie in; empty for RULER's own essays, and for other tasks.
        length: tokens of prompt and answer together.
    """

    task: Task
    prose: str
    length: int

    def __str__(self) -> str:
        return f"{self.name}_{self.length}"

    @property
    def name(self) -> str:
        """The task's, with the prose that is not RULER's own."""
        return f"{self.task.name}-{self.prose}" if self.prose else self.task.name

    @classmethod
    def read(cls, text: str) -> Asked:
        """A data set by its name; InputError for one that is none."""
        name, _, length = text.rpartition("_")
        task, _, prose = name.partition("-")
        if task not in KNOWN or not length.isdecimal() or not length.isascii() or len(length) > 9:
            raise InputError(f"unknown data set {shortened(text)}: RULER's are called as vt_4096, a task and a length")
        return cls(KNOWN[task], prose, int(length))
