"""RULER as a benchmark: a data set for every task and length, whose samples are made when they are run."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from random import Random
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar

from tqdm import tqdm

from squeeze.benchmarks.base import Benchmark, DataSet, Options, Workload
from squeeze.benchmarks.encoding import tokens_after
from squeeze.benchmarks.longbench import prompts
from squeeze.benchmarks.prediction_files import PredictionFiles
from squeeze.benchmarks.records import PredictedSample
from squeeze.benchmarks.ruler import chains, niah, questions, words
from squeeze.benchmarks.ruler.made import Counter, Made, Maker, fitting, largest
from squeeze.benchmarks.ruler.tasks import (
    KNOWN,
    TASKS,
    Asked,
    Chain,
    CommonWords,
    FrequentWords,
    Needles,
    Questions,
    Task,
)
from squeeze.benchmarks.ruler.texts import Texts
from squeeze.errors import InputError
from squeeze.ranks import ALONE, Ranks
from squeeze.text import printable, shortened

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from squeeze.generation.generate import Prompt

#: Samples of a task and length that RULER takes, and the most that can be asked for.
SAMPLES, MOST_SAMPLES = 500, 100_000

#: Where nothing else is asked for.
DEFAULT_LENGTHS = "4096"

#: Counted up whenever a sample is made in another way.
VERSION = 1


@dataclass(frozen=True)
class Recipe(DataSet):
    """A task at a length, whose rows are numbers of samples.

    Args:
        asked: the task and the length.
        texts: what its prompts are made of.
        depths: of the needle, in percent, one after another from sample to sample; none: by chance.
    """

    asked: Asked
    texts: Texts
    depths: tuple[float, ...] = ()

    @property
    def settings(self) -> dict[str, Any]:
        return super().settings | ({"depths": list(self.depths)} if self.depths else {})


class Ruler(Benchmark):
    """RULER (Hsieh et al., arXiv 2404.06654)."""

    name, title = "ruler", "RULER"
    flags: ClassVar = ("datasets", "lengths", "data_dir", "haystack", "chat", "temperature", "top_p")
    locations: ClassVar[tuple[str, ...]] = ("data_dir", "haystack")
    sample: ClassVar[type[Any]] = PredictedSample
    sample_num: ClassVar = SAMPLES
    has_context: ClassVar = True

    def asked(self, flags: Mapping[str, Any]) -> list[str]:
        """Every task that is asked for at every length.

        `all` leaves out tasks whose files are not there.
        """
        texts, found = texts_of(flags["data_dir"], flags["haystack"]), []
        for length in parse_lengths(flags["lengths"] or DEFAULT_LENGTHS):
            for task in _tasks(flags["datasets"], texts):
                prose = texts.prose_name if isinstance(task, Needles) and task.haystack == "essay" else ""
                found.append(str(Asked(task, prose, length)))
        if texts.haystack is not None and not any("-" in name for name in found):
            raise InputError(f"--haystack is for tasks with prose, and {', '.join(found)} have none: leave it out")
        return found

    def read(self, dataset: str, *location: str | None) -> Recipe:
        return self.recipe(Asked.read(dataset), texts_of(*location))

    def recipe(self, asked: Asked, texts: Texts, depths: tuple[float, ...] = ()) -> Recipe:
        """A task at a length, known by all that decides on its samples."""
        task = asked.task
        used = [task.file] if isinstance(task, Questions) else []
        if isinstance(task, Needles):
            used += ["words"] * ("words" in (task.key, task.value)) + ["prose"] * (task.haystack == "essay")
        elif isinstance(task, CommonWords):
            used.append("words")
        content = {"version": VERSION, "task": asked.name, "length": asked.length, "texts": texts.identity(*used)}
        content |= {"depths": depths} if depths else {}
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        origin = f"made: {json.dumps(content)}"
        return Recipe(str(asked), range(MOST_SAMPLES), origin, digest, asked, texts, depths)

    def note(self, datasets: Sequence[str], model_name: str, folder: Path, chat: bool) -> str | None:
        if any("-prose_" in dataset for dataset in datasets):
            return (
                "the haystacks of tasks called -prose are made-up sentences: RULER's own are essays, "
                "PaulGrahamEssays.json in --data_dir"
            )
        return None

    def check(self, data: DataSet, max_length: int) -> None:
        assert isinstance(data, Recipe)
        if data.asked.length > max_length:
            raise InputError(
                f"{data.dataset} has prompts and answers of {data.asked.length} tokens, and the model has "
                f"{max_length} positions: take shorter --lengths"
            )

    def facts(self, data: DataSet, options: Options) -> dict[str, Any]:
        return {"data": data.origin, "chat_format": "the tokenizer's own" if options.chat else None}

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase, options: Options) -> None:
        if options.chat:
            prompts.check_chat_template(tokenizer, options.model_name)

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, data: DataSet, total: int, options: Options, ranks: Ranks = ALONE
    ) -> list[Prompt]:
        """Prompts that with their answer have the data set's length, or a little less.

        Raises:
            InputError: the length is too short for the task, or a file lacks what is needed.
        """
        from squeeze.benchmarks.ruler.prompt import SamplePrompt
        from squeeze.generation.generate import greedy

        assert isinstance(data, Recipe)
        task, length = data.asked.task, data.asked.length

        def encoded(made: Made) -> Any:
            text = rendered(tokenizer, options.chat, made)
            # A chat template has written special tokens itself.
            return tokenizer(
                text, truncation=False, add_special_tokens=not options.chat, return_tensors="pt"
            ).input_ids[0]

        samples = maker(data, options.seed, lambda made: len(encoded(made)), length - task.form.new_tokens)
        settings = greedy(task.form.new_tokens)
        found: list[Prompt] = []
        shown: dict[str, Any] = {} if ranks.first else {"disable": True}
        for index in tqdm(range(total), desc=f"{data.dataset}: making", delay=2, leave=False, **shown):
            made = samples(index)
            tokens, asked = encoded(made), 0
            if options.context:
                text = rendered(tokenizer, options.chat, made)
                asked = tokens_after(tokenizer, text, made.after, tokens, not options.chat)
            found.append(SamplePrompt(tokens, settings, kind=asked, asked=asked, answers=tuple(made.answers)))
        return found

    def run_batch(self, workload: Workload, batch: Sequence[int]) -> list[dict[str, Any]]:
        from squeeze.generation.generate import generate
        from squeeze.generation.sampling import generator, sampler

        options, first = workload.options, workload.prompts[batch[0]]
        processors = sampler(options.temperature, options.top_p, [generator(options.seed, index) for index in batch])
        results = generate(
            workload.model, workload.tokens(batch), first.settings, workload.squeezed, processors, asked=first.asked
        )
        samples = []
        for index, output, stats in zip(batch, *results, strict=True):
            prompt: Any = workload.prompts[index]
            text = workload.tokenizer.decode(output, skip_special_tokens=True)
            published = {"pred": text, "answers": list(prompt.answers), "all_classes": None}
            samples.append({"index": index, **published, "length": len(prompt.tokens), "stats": stats})
        return samples

    def find(self, run: Path, datasets: str | None) -> PredictionFiles:
        """Prediction files of a run: all of them, or those of some tasks, or of tasks at a length."""
        if not run.is_dir():
            raise InputError(f"the folder {run} is not there")
        there = sorted({path.name.split(".")[0] for path in run.glob("*.jsonl")}, key=_order)
        wanted = None if datasets in (None, "all") else [text.strip() for text in str(datasets).split(",")]
        spelled = {name: {name, Asked.read(name).name, Asked.read(name).task.name} for name in there}
        for one in wanted or ():
            if not any(one in names for names in spelled.values()):
                raise InputError(f"{run} has no predictions of {shortened(one)}: there are {', '.join(there)}")
        names = [name for name in there if wanted is None or spelled[name] & {*wanted}]
        return super().found(run, names, there)

    def sample_scores(self, dataset: str, rows: Sequence[Any]) -> list[float]:
        """The share of a sample's answers that are in what was written; of `qa`, whether one is."""
        return [score(Asked.read(dataset).task, row["pred"], row["answers"]) for row in rows]

    def group_scores(self, scores: dict[str, float]) -> dict[str, float]:
        """Means over the tasks of each length, and over all, where there are several."""
        by_length: dict[int, list[float]] = {}
        for dataset, value in scores.items():
            by_length.setdefault(Asked.read(dataset).length, []).append(value)
        groups = {f"{length} tokens": round(fmean(own), 2) for length, own in by_length.items() if len(own) > 1}
        return groups | ({"all": round(fmean(scores.values()), 2)} if len(by_length) > 1 else {})


def score(task: Task, prediction: str, answers: Sequence[str]) -> float:
    """RULER's score of a prediction, in [0, 1]: answers are looked for without regard to case."""
    written = re.sub(r"[\x00-\x1f]", "\n", prediction.strip()).strip().lower()
    found = [answer.lower() in written for answer in answers]
    return float(any(found)) if isinstance(task, Questions) else fmean(found)


def rendered(tokenizer: PreTrainedTokenizerBase, chat: bool, made: Made) -> str:
    """A prompt's text; in the tokenizer's chat template where `chat` asks for it."""
    asked = prompts.in_template(tokenizer, [{"role": "user", "content": made.question}]) if chat else made.question
    return asked + made.prefix


def maker(data: Recipe, seed: int, count: Counter, room: int) -> Callable[[int], Made]:
    """What makes the samples of a data set, each a function of task, length, seed and its number alone.

    Args:
        room: tokens of a prompt.
    """
    task, length, texts = data.asked.task, data.asked.length, data.texts

    def chance(what: object) -> Random:
        return Random(f"{data.dataset} {seed} {what}")

    if isinstance(task, FrequentWords):
        _, size = words.frequent(task, count, room, chance("size"), None)
        return lambda index: words.frequent(task, count, room, chance(index), size)[0]
    if isinstance(task, Questions):
        given = questions.read(texts.questions(task.file))

        def about(index: int) -> Maker:
            return partial(questions.make, task, given, index)

        step = questions.STEP
        size = largest(about(0), count, room, step, chance("size"), data.dataset)
        return lambda index: fitting(about(index), count, room, size, step, chance(index), data.dataset)
    make: Maker
    if isinstance(task, Needles):
        if data.depths:
            return _at_depths(data, partial(niah.make, task, texts), count, room, chance)
        make, step = partial(niah.make, task, texts), niah.step(task, length)
    elif isinstance(task, CommonWords):
        make, step = partial(words.common, task, texts, length), words.STEP
    else:
        assert isinstance(task, Chain)
        shown = chains.example(task, count, chance("example"))
        make, step = partial(chains.make, task, example=shown), chains.step(length)
    most = words.most(texts) if isinstance(task, CommonWords) else None
    size = largest(make, count, room, step, chance("size"), data.dataset, most)
    if size == most:
        raise InputError(
            f"{data.dataset} needs more different words than the {most} that there are: give the folder of RULER's "
            "english_words.json as --data_dir, or take shorter prompts"
        )
    return lambda index: fitting(make, count, room, size, step, chance(index), data.dataset)


def _at_depths(
    data: Recipe, make: Callable[..., Made], count: Counter, room: int, chance: Callable[[object], Random]
) -> Callable[[int], Made]:
    """Makes samples whose needle lies at each depth in turn; those of a round have the same prose, of one length."""

    def at_each(size: int, rng: Random) -> list[Made]:
        return [make(size, copy(rng), depth=depth) for depth in data.depths]

    def longest(made: list[Made]) -> int:
        return max(map(count, made))

    size = largest(at_each, longest, room, niah.LEAST_PROSE, chance("size"), data.dataset)

    @lru_cache(maxsize=2)
    def fitted(number: int) -> list[Made]:
        return fitting(at_each, longest, room, size, niah.LEAST_PROSE, chance(number), data.dataset)

    return lambda index: fitted(index // len(data.depths))[index % len(data.depths)]


def texts_of(folder: str | None, haystack: str | None) -> Texts:
    """What prompts are made of, as `--data_dir` and `--haystack` say; InputError where the first is no folder."""
    if folder and not Path(folder).is_dir():
        raise InputError(f"--data_dir {printable(folder)} is no folder")
    return Texts(Path(folder) if folder else None, Path(haystack) if haystack else None)


def _order(dataset: str) -> tuple[int, int, str]:
    asked = Asked.read(dataset)
    return asked.length, list(KNOWN).index(asked.task.name), asked.prose


def parse_lengths(text: str) -> list[int]:
    """Lengths in tokens, in their order; InputError where one is none."""
    lengths = []
    for part in text.split(","):
        if not (part.strip().isascii() and part.strip().isdecimal() and 0 < int(part[:12]) < 10**9):
            raise InputError(f"--lengths must be numbers of tokens such as 4096,8192, got {shortened(text)}")
        lengths.append(int(part))
    return list(dict.fromkeys(lengths))


def _tasks(text: str | None, texts: Texts) -> list[Task]:
    if text == "all":
        return [task for task in TASKS.values() if not isinstance(task, Questions) or _is_there(task, texts)]
    names = [name.strip() for name in (text or "niah_single_1").split(",")]
    for name in names:
        if name not in TASKS:
            raise InputError(f"unknown data set {shortened(name)}: RULER has {', '.join(TASKS)}")
    return [TASKS[name] for name in dict.fromkeys(names)]


def _is_there(task: Questions, texts: Texts) -> bool:
    return texts.folder is not None and (texts.folder / task.file).is_file()


RULER = Ruler()
