"""The interface of a benchmark, and of a measure: what is computed on each of a benchmark's prompts.

A new benchmark is a file with a subclass of `Benchmark` and a line in `squeeze.benchmarks.registry`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from squeeze.benchmarks.prediction_files import PredictionFiles, in_folder
from squeeze.benchmarks.records import Prediction
from squeeze.benchmarks.scores import scored
from squeeze.errors import InputError
from squeeze.generation import stats as sample_stats
from squeeze.generation.stats import SampleStats
from squeeze.ranks import ALONE, Ranks
from squeeze.storage.files import read_jsonl

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from squeeze.engine.squeezed_model import SqueezedModel
    from squeeze.generation.generate import Prompt
    from squeeze.models.sources import ModelSource


@dataclass(frozen=True)
class DataSet:
    """Rows of one data set, and which rows they are.

    Args:
        dataset: its name, which is that of its files in a run's folder.
        rows: in order; each is a sample.
        source: the file, or what else it was read from.
        sha256: of the file.
    """

    dataset: str
    rows: Sequence[Any]
    source: str
    sha256: str

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that change the results: a run with others is another run."""
        return {"data_sha256": self.sha256}

    @property
    def origin(self) -> dict[str, Any]:
        """Facts for `run.json` on where the rows come from."""
        return {"source": self.source, "sha256": self.sha256, "rows": len(self.rows)}


@dataclass(frozen=True)
class Options:
    """Settings that prompts are made and run with.

    Args:
        max_length: the most tokens of a prompt; of a request, those of its completion included.
        model_name: decides on LongBench's chat format.
        chat: use the tokenizer's chat template instead.
        context: cut a prompt's context before what follows on it is read.
        batch_size: prompts to run together.
        temperature, top_p: of sampling; temperature 0 is greedy.
        seed: of sampling.
    """

    max_length: int
    model_name: str
    chat: bool = False
    context: bool = False
    batch_size: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 42


@dataclass(frozen=True)
class Workload:
    """A data set's prompts on a loaded model.

    Args:
        data: the data set.
        prompts: of its first rows, by their index.
        squeezed: the model with a squeezed cache; None for the full cache.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    data: DataSet
    prompts: Sequence[Prompt]
    squeezed: SqueezedModel | None
    options: Options

    def tokens(self, batch: Sequence[int]) -> list[torch.Tensor]:
        """Token ids of each prompt of a batch, (tokens,)."""
        return [self.prompts[index].tokens for index in batch]


Stats = TypeVar("Stats")


class Measure(ABC, Generic[Stats]):
    """A computation on a benchmark's prompts, batch by batch: answers, or a comparison with the full cache.

    Attributes:
        sample: the kind of a finished sample, a `TypedDict` (see `squeeze.benchmarks.records`): `index`, then the
            fields that are published, in their order, then `stats`, a dataclass with `notes` and `to_json`.
    """

    sample: ClassVar[type[Any]]

    @abstractmethod
    def run_batch(self, workload: Workload, batch: Sequence[int]) -> list[dict[str, Any]]:
        """Work on some prompts together.

        Args:
            batch: indices of prompts that are equal in `kind`; for a squeezed model in several configurations
                (`SqueezedModel.use`) the same prompts once for each of them, one after the other: `a, b, a, b`.
        Returns:
            A `sample` for each.
        """

    @abstractmethod
    def summarize(self, stats: Sequence[Stats]) -> dict[str, Any]:
        """Summary of all samples of a data set, for `run.json`."""

    @abstractmethod
    def describe(self, stats: Sequence[Stats]) -> str:
        """The samples so far in a few words, for the progress bar."""


class Benchmark(Measure[SampleStats]):
    """Data sets, the prompts made of them, and the answers to them with their scores.

    Attributes:
        name: what `--pred` calls it, and the folder of its runs, `pred_<name>`.
        title: what tables call it.
        flags: which of `pred.py`'s flags for some benchmarks it takes, see `squeeze.runs.flags`.
        locations: the flags that say where its data lie.
        sample_num: samples of a data set that a run takes if it does not say; None: all.
        has_context: whether something follows on a context in its prompts, which can be cut before that is read.
        prediction: the kind of a line of its prediction files, as far as scores need it.
        scorer: the command that scores its runs, where `eval.py` does not; None where it does.
        scored_by: whose scores that command gives.
        score_columns: scores of a data set that tables show in place of its one score.
        score_label: the axis of its scores.
    """

    name: str
    title: str
    flags: ClassVar[tuple[str, ...]] = ("data_dir",)
    locations: ClassVar[tuple[str, ...]] = ("data_dir",)
    sample_num: ClassVar[int | None] = None
    has_context: ClassVar[bool] = False
    prediction: ClassVar[type[Any]] = Prediction
    scorer: ClassVar[str | None] = None
    scored_by: ClassVar[str] = "eval.py"
    score_columns: ClassVar[tuple[str, ...]] = ()
    score_label: ClassVar[str] = "score"

    def refusal(self, flag: str, takers: Sequence[str]) -> str:
        """A sentence on a flag that it does not take and other benchmarks do."""
        return f"--{flag} is for --pred {' or '.join(takers)}"

    def datasets(self, text: str | None) -> list[str]:
        """Names of data sets, as `--datasets` has them: one, called as the benchmark is, unless there are more.

        Args:
            text: separated by commas, or `all`; None where the flag was not given.
        Raises:
            InputError: a name is none of the benchmark's.
        """
        return [self.name]

    def asked(self, flags: Mapping[str, Any]) -> list[str]:
        """Names of the data sets that a run's flags ask for; InputError for a name that is none."""
        return self.datasets(flags["datasets"])

    @abstractmethod
    def read(self, dataset: str, *location: str | None) -> DataSet:
        """Read a data set.

        Args:
            location: what the flags `locations` say; None where one was not given.
        Raises:
            InputError: the data are not there, or damaged.
        """

    def count(self, data: DataSet, sample_num: int | None) -> int:
        """Samples that a run takes which asked for `sample_num` of them, or for the benchmark's own number."""
        return min(sample_num or self.sample_num or len(data.rows), len(data.rows))

    def prompt_limit(self, source: ModelSource, positions: int) -> tuple[int, str | None]:
        """The most tokens of a prompt for a model of so many positions, and a sentence where that needs one."""
        return positions, None

    def note(self, datasets: Sequence[str], model_name: str, folder: Path, chat: bool) -> str | None:
        """A sentence for the user about the prompts that the model in `folder` is going to get."""
        return None

    def check(self, data: DataSet, max_length: int) -> None:
        """Raises InputError where a data set cannot be run with prompts of so many tokens at most."""

    def settings(self, data: DataSet, options: Options) -> dict[str, Any]:
        """Settings that change the results of one data set, for `squeeze.runs.folder.Run`."""
        return data.settings

    def facts(self, data: DataSet, options: Options) -> dict[str, Any]:
        """Facts for `run.json` about one data set, beside its settings."""
        return {"data": data.origin}

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase, options: Options) -> None:
        """Raises InputError for a tokenizer that cannot make the prompts."""

    @abstractmethod
    def encode(
        self, tokenizer: PreTrainedTokenizerBase, data: DataSet, total: int, options: Options, ranks: Ranks = ALONE
    ) -> list[Prompt]:
        """Prompts of the first `total` rows.

        Args:
            ranks: this process among those of the run, of which the first shows what takes long.
        Raises:
            InputError: one of them cannot be run.
        """

    def summarize(self, stats: Sequence[SampleStats]) -> dict[str, Any]:
        return sample_stats.summarize(stats)

    def describe(self, stats: Sequence[SampleStats]) -> str:
        return sample_stats.progress(stats)

    @property
    def scale(self) -> str:
        """Name of the scores that a table of text shows."""
        return f"{self.title}'s score"

    def owns(self, folder: Path, dataset: str | None) -> bool:
        """Whether a run's folder, or a data set in it, is of this benchmark."""
        return f"pred_{self.name}" in folder.absolute().parts

    def find(self, run: Path, datasets: str | None) -> PredictionFiles:
        """Prediction files of a run, or those that `--datasets` names; InputError for none or a half-written one."""
        known = self.datasets("all")
        wanted = self.datasets(datasets) if datasets not in (None, "all") else None
        if not run.is_dir():
            raise InputError(f"the folder {run} is not there")
        return self.found(run, wanted, known)

    def found(self, run: Path, wanted: Sequence[str] | None, known: Sequence[str]) -> PredictionFiles:
        """Prediction files in a run's folder that are wanted (None: all), of those that are known."""
        predictions = in_folder(run, wanted, known).only(wanted, known)
        if not predictions.files:
            raise InputError(f"{run} has no prediction file" + (f" such as {known[0]}.jsonl" if known else ""))
        return predictions

    def predictions(self, path: Path, dataset: str) -> list[Any]:
        """Lines of a prediction file, of the kind `prediction`; InputError where it is damaged."""
        return [row for _, row in read_jsonl(path, self.prediction)]

    def sample_scores(self, dataset: str, rows: Sequence[Any]) -> list[float]:
        """Score of each prediction, in [0, 1]; only where there is no `scorer`."""
        raise NotImplementedError

    def score(self, dataset: str, rows: Sequence[Any], details: bool = True) -> dict[str, Any]:
        """A data set's part of `result_detail.json`, in percent; `details`: also what the report does not show."""
        return scored(self.sample_scores(dataset, rows))

    def result(self, detail: dict[str, Any]) -> Any:
        """A data set's part of `result.json`: its score, or several by name."""
        return detail["score"]

    def group_scores(self, scores: dict[str, float]) -> dict[str, float]:
        """Means over groups of data sets that are whole, by their names."""
        return {}

    def read_scores(self, folder: Path, dataset: str) -> tuple[int, dict[str, Any]]:
        """Number of predictions in a run's folder, and what the report shows of their scores, in percent.

        Returns:
            Under `score`, `low` and `high` the score and its interval, and under `score_columns` the others; nothing
            where the run is not scored yet.
        Raises:
            InputError: the predictions are damaged.
        """
        rows = self.predictions(folder / f"{dataset}.jsonl", dataset)
        detail = self.score(dataset, rows, details=False)
        low, high = detail["interval"]
        columns = self.result(detail) if self.score_columns else {}
        return len(rows), {"score": detail["score"], "low": low, "high": high, **columns}
