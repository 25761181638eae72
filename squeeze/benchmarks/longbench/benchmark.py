"""LongBench and LongBench-E as benchmarks: rows put to a model as LongBench's own runner does, and its scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from squeeze.benchmarks.base import Benchmark, DataSet, Options, Workload
from squeeze.benchmarks.encoding import tokenizing
from squeeze.benchmarks.longbench import layouts, prompts, scoring
from squeeze.benchmarks.longbench.data import after_context, build_prompt, dataset_names, load_data
from squeeze.benchmarks.prediction_files import PredictionFiles
from squeeze.benchmarks.records import PredictedSample
from squeeze.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from squeeze.generation.generate import Prompt
    from squeeze.models.sources import ModelSource


@dataclass(frozen=True)
class LongBench(Benchmark):
    """LongBench v1 (Bai et al., arXiv 2308.14508)."""

    name: str
    title: str
    flags: ClassVar = ("datasets", "data_dir", "chat", "temperature", "top_p")
    sample: ClassVar = PredictedSample
    has_context: ClassVar = True

    @property
    def scale(self) -> str:
        return "LongBench's score"

    def datasets(self, text: str | None) -> list[str]:
        return dataset_names("samsum" if text is None else text, self.name)

    def read(self, dataset: str, *location: str | None) -> DataSet:
        [folder] = location
        return load_data(dataset, folder, self.name)

    def prompt_limit(self, source: ModelSource, positions: int) -> tuple[int, str | None]:
        from squeeze.models.sources import prompt_limit

        return prompt_limit(source, positions)

    def note(self, datasets: Sequence[str], model_name: str, folder: Path, chat: bool) -> str | None:
        return prompts.chat_note(datasets, model_name, folder, chat)

    def settings(self, data: DataSet, options: Options) -> dict[str, Any]:
        return data.settings | prompts.chat_settings(data.dataset, options.model_name, options.chat)

    def facts(self, data: DataSet, options: Options) -> dict[str, Any]:
        chat_format = prompts.chat_format(data.dataset, options.model_name, options.chat)
        return {"data": data.origin, "chat_format": chat_format}

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase, options: Options) -> None:
        if options.chat:
            prompts.check_chat_template(tokenizer, options.model_name)

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, data: DataSet, total: int, options: Options, ranks: Ranks = ALONE
    ) -> list[Prompt]:
        from squeeze.generation.generate import Prompt

        settings = prompts.generation_settings(tokenizer, data.dataset)
        texts = [build_prompt(data.dataset, row) for row in data.rows[:total]]
        limit, name, chat = options.max_length, options.model_name, options.chat
        found = []
        for row, text in zip(data.rows, tokenizing(texts, data.dataset, ranks), strict=False):
            after = after_context(data.dataset, row) if options.context else ""
            tokens, asked = prompts.encode_parts(tokenizer, data.dataset, text, after, limit, name, chat)
            found.append(Prompt(tokens, settings, kind=asked, asked=asked))
        return found

    def run_batch(self, workload: Workload, batch: Sequence[int]) -> list[dict[str, Any]]:
        from squeeze.generation.generate import generate
        from squeeze.generation.sampling import generator, sampler

        options, first = workload.options, workload.prompts[batch[0]]
        generators = [generator(options.seed, index) for index in batch]
        processors = sampler(options.temperature, options.top_p, generators)
        results = generate(
            workload.model, workload.tokens(batch), first.settings, workload.squeezed, processors, asked=first.asked
        )
        samples = []
        for index, output, stats in zip(batch, *results, strict=True):
            row = workload.data.rows[index]
            text = workload.tokenizer.decode(output, skip_special_tokens=True)
            published = {"pred": prompts.clean(text, options.model_name)}
            published |= {key: row[key] for key in ("answers", "all_classes", "length")}
            samples.append({"index": index, **published, "stats": stats})
        return samples

    def find(self, run: Path, datasets: str | None) -> PredictionFiles:
        return layouts.find(run, datasets, self.name)

    def predictions(self, path: Path, dataset: str) -> list[Any]:
        return layouts.read(path, dataset, self.name)

    def sample_scores(self, dataset: str, rows: Sequence[Any]) -> list[float]:
        return scoring.sample_scores(dataset, rows)

    def score(self, dataset: str, rows: Sequence[Any], details: bool = True) -> dict[str, Any]:
        return scoring.score_rows(dataset, rows, self.name, details)

    def result(self, detail: dict[str, Any]) -> Any:
        return detail.get("buckets", detail["score"])

    def group_scores(self, scores: dict[str, float]) -> dict[str, float]:
        return scoring.group_scores(scores)


class LongBenchE(LongBench):
    """LongBench-E: other rows of 13 data sets, about as many of each length, and a score for each range of lengths."""

    score_columns = scoring.BUCKETS


LONGBENCH = LongBench("Long", "LongBench")
