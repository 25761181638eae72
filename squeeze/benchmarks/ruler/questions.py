"""Questions about documents, in the files that RULER's own script downloads: SQuAD 2.0 and HotpotQA."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from squeeze.benchmarks.ruler.made import Made
from squeeze.benchmarks.ruler.tasks import Questions
from squeeze.errors import InputError
from squeeze.storage.files import read_json

#: The fewest documents.
STEP = 10


@dataclass(frozen=True)
class Question:
    """A question, its answers, the documents that it needs, and others of the same article, by their numbers."""

    text: str
    answers: list[str]
    needed: list[int]
    near: list[int]


@dataclass(frozen=True)
class Collection:
    """Questions, and the documents that they are about; `path` is their file."""

    path: Path
    questions: list[Question]
    documents: list[str]


def read(path: Path) -> Collection:
    """Questions of a file, and its documents.

    Raises:
        InputError: it is neither SQuAD 2.0's nor HotpotQA's.
    """
    content: Any = read_json(path, Any)  # type: ignore[arg-type]
    try:
        return Collection(path, *(_squad(content["data"]) if isinstance(content, dict) else _hotpotqa(content)))
    except (KeyError, TypeError, ValueError, IndexError):
        raise InputError(f"{path} is not what RULER's download_qa_dataset.sh fetches: fetch it again") from None


def _squad(data: Any) -> tuple[list[Question], list[str]]:
    documents = sorted({part["context"] for article in data for part in article["paragraphs"]})
    number = {document: index for index, document in enumerate(documents)}
    questions = []
    for article in data:
        own = [number[part["context"]] for part in article["paragraphs"]]
        for part in article["paragraphs"]:
            needed = number[part["context"]]
            near = [index for index in own if index != needed]
            questions += [
                Question(asked["question"], [answer["text"] for answer in asked["answers"]], [needed], near)
                for asked in part["qas"]
                if not asked["is_impossible"]
            ]
    return questions, documents


def _hotpotqa(data: Any) -> tuple[list[Question], list[str]]:
    def document(title: str, parts: list[str]) -> str:
        return f"{title}\n{''.join(parts)}"

    documents = sorted({document(*part) for row in data for part in row["context"]})
    number = {text: index for index, text in enumerate(documents)}
    return [
        Question(row["question"], [row["answer"]], [number[document(*part)] for part in row["context"]], [])
        for row in data
    ], documents


def make(task: Questions, given: Collection, index: int, size: int, rng: Random) -> Made:
    """The prompt of a question with so many documents, which are repeated where there are not as many."""
    documents, count = given.documents, len(given.questions)
    if index >= count:
        raise InputError(f"{given.path} has {count} questions: take --sample_num {count} at most")
    asked = given.questions[index]
    if size < len(documents):
        missing = size - len(asked.needed)
        if missing > len(asked.near):
            known = {*asked.needed, *asked.near}
            others = [number for number in range(len(documents)) if number not in known]
            chosen = asked.needed + asked.near + rng.sample(others, max(missing - len(asked.near), 0))
        else:
            chosen = asked.needed + rng.sample(asked.near, max(missing, 0))
        shown = [documents[number] for number in chosen]
    else:
        shown = (documents * -(-size // len(documents)))[:size]
    rng.shuffle(shown)
    context = "\n\n".join(f"Document {number}:\n{text}" for number, text in enumerate(shown, start=1))
    return Made(*task.form.filled(context, query=asked.text), task.form.prefix, asked.answers)
