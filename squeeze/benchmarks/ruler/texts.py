"""What prompts of RULER are made of: words, sentences without meaning, prose, and files of its own."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from random import Random
from typing import Any

from squeeze.benchmarks.ruler.tasks import ESSAYS
from squeeze.errors import InputError
from squeeze.storage.files import read_bytes, read_object
from squeeze.text import printable

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."

#: What made-up sentences say, none of which a needle has: who did what to which thing, where and when.
WHO = ["The baker", "A young sailor", "My neighbour", "The old teacher", "Our guide", "A tired clerk", "The gardener"]
DID = ["carried", "forgot", "painted", "described", "sold", "mended", "found", "hid", "borrowed", "remembered", "lost"]
WHAT = ["the lamp", "a wooden box", "two letters", "the long road", "a silver coin", "the broken clock", "the map"]
WHERE = ["near the harbour", "behind the mill", "on the third floor", "in the rain", "under the bridge"]
WHEN = ["before noon", "after the storm", "every winter", "on a quiet evening", "as the bells rang", "without a word"]


@cache
def lists() -> dict[str, list[str]]:
    """The nouns, adjectives and verbs of the package wonderwords, in its order."""
    found = {}
    for kind in ("noun", "adjective", "verb"):
        text = (files("wonderwords.assets") / f"{kind}list.txt").read_text("utf-8")
        found[kind] = text.split("\n") if not text.endswith("\n") else text.split("\n")[:-1]
    return found


def key(rng: Random) -> str:
    """An adjective with a noun, by chance: what a needle is found by."""
    words = lists()
    return f"{rng.choice(words['adjective'])}-{rng.choice(words['noun'])}"


@cache
def single_words() -> list[str]:
    """All words, sorted."""
    return sorted({word for words in lists().values() for word in words})


@cache
def prose() -> list[str]:
    """Words of 5,000 made-up sentences; always the same."""
    rng = Random("prose")
    sentences = [
        f"{rng.choice(WHO)} {rng.choice(DID)} {rng.choice(WHAT)} {rng.choice(WHERE)} {rng.choice(WHEN)}."
        for _ in range(5000)
    ]
    return " ".join(sentences).split(" ")


def sentences(text: str) -> list[str]:
    """A text's sentences, each up to its full stop, exclamation or question mark."""
    return re.split(r"(?<=[.!?])\s+", text.strip())


@dataclass(frozen=True)
class Texts:
    """Where texts come from that the project does not have.

    Args:
        folder: with RULER's own files, as its download scripts call them; None: there is none.
        haystack: a file of prose, text or RULER's JSON; None: the folder's essays, or made-up sentences.
    """

    folder: Path | None = None
    haystack: Path | None = None

    @property
    def prose_file(self) -> Path | None:
        """The file of prose; None where sentences are made up.

        Raises:
            InputError: the one that was asked for is not there.
        """
        if self.haystack is not None:
            if not self.haystack.is_file():
                raise InputError(f"--haystack {printable(self.haystack)} is not there")
            return self.haystack
        essays = None if self.folder is None else self.folder / ESSAYS
        return essays if essays is not None and essays.is_file() else None

    @property
    def prose_name(self) -> str:
        """What tasks with prose add to their names."""
        file = self.prose_file
        if file is None:
            return "prose"
        return "" if file.name == ESSAYS else re.sub(r"[^A-Za-z0-9]+", "", file.stem) or "own"

    @cached_property
    def prose(self) -> list[str]:
        """The words of the prose, in order."""
        file = self.prose_file
        if file is None:
            return prose()
        if file.suffix == ".json":
            text = read_object(file).get("text")
        else:
            text = read_bytes(file).decode("utf-8", errors="replace")
        words = re.sub(r"\s+", " ", text).strip().split(" ") if isinstance(text, str) else []
        if len(words) < 100:
            raise InputError(f"{printable(file)} is no haystack: it has {len(words)} words, and 100 are the least")
        return words

    @cached_property
    def more_words(self) -> list[str]:
        """RULER's English words, for lists that are longer than the package's words; none where they are not there."""
        path = None if self.folder is None else self.folder / "english_words.json"
        return [] if path is None or not path.is_file() else [str(word) for word in read_object(path).values()]

    def questions(self, file: str) -> Path:
        """A file of questions and documents; InputError where it is not there."""
        path = None if self.folder is None else self.folder / file
        if path is None or not path.is_file():
            raise InputError(
                f"{file} is not there: RULER's download_qa_dataset.sh fetches it; give its folder as --data_dir, or "
                "leave qa_1 and qa_2 out"
            )
        return path

    def identity(self, *used: str) -> dict[str, Any]:
        """What decides on the texts that are used (`words`, `prose`, or the name of a file), for a run's settings."""
        found: dict[str, Any] = {}
        for one in used:
            if one == "words":
                found["wonderwords"] = version("wonderwords")
                if self.more_words:
                    found["more words"] = hashlib.sha256(" ".join(self.more_words).encode()).hexdigest()
                continue
            path = self.prose_file if one == "prose" else self.questions(one)
            found[one] = "made up" if path is None else hashlib.sha256(read_bytes(path)).hexdigest()
        return found
