"""HELM's summarization scenarios as benchmarks: requests that say how they are completed, scored by HELM itself.

Liang et al., Holistic Evaluation of Language Models (arXiv 2211.09110).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypedDict

from msgspec import Meta

from squeeze.benchmarks.base import Benchmark, DataSet, Options, Workload
from squeeze.benchmarks.encoding import tokenizing
from squeeze.benchmarks.records import Answered, AnsweredSample
from squeeze.benchmarks.requests import SAMPLE_NUM, Requests, read_requests
from squeeze.errors import InputError
from squeeze.ranks import ALONE, Ranks
from squeeze.storage.files import read_object
from squeeze.storage.schema import check

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from squeeze.generation.generate import Prompt

#: HELM's main metric of its summarization tasks, among those that `script/helm.sh` writes, in percent.
MAIN_SCORE, SCORES = "ROUGE-2", ("ROUGE-1", "ROUGE-2", "ROUGE-L")
Percent = Annotated[float, Meta(ge=0, le=100)]
Rouge = TypedDict("Rouge", {"ROUGE-1": Percent, "ROUGE-2": Percent, "ROUGE-L": Percent})


@dataclass(frozen=True)
class HelmRequests(Benchmark):
    """A file of HELM's requests, whose one data set is called as the benchmark is."""

    name: str
    title: str
    score_columns: ClassVar = SCORES
    flags: ClassVar = ("requests",)
    locations: ClassVar = ("requests",)
    sample_num: ClassVar = SAMPLE_NUM
    sample: ClassVar = AnsweredSample
    prediction: ClassVar = Answered
    scorer: ClassVar = "sh script/helm.sh"
    scored_by: ClassVar = "HELM itself"
    score_label: ClassVar = f"{MAIN_SCORE} by HELM, %"

    @property
    def scale(self) -> str:
        return "ROUGE-1/2/L by HELM"

    def refusal(self, flag: str, takers: Sequence[str]) -> str:
        titles = "LongBench" if "Long" in takers else f"--pred {' or '.join(takers)}"
        return f"--{flag} is for {titles}: with --pred {self.name} the requests say what is run and how"

    def read(self, dataset: str, *location: str | None) -> Requests:
        [file] = location
        return read_requests(dataset, file)

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, data: DataSet, total: int, options: Options, ranks: Ranks = ALONE
    ) -> list[Prompt]:
        """Prompts without special tokens, as published.

        Raises:
            InputError: a prompt and its completion do not fit into the model's window.
        """
        from squeeze.generation.generate import Prompt, greedy

        prompts = []
        requests = data.rows[:total]
        texts = tokenizing([request.prompt for request in requests], data.dataset, ranks)
        for number, (request, text) in enumerate(zip(requests, texts, strict=True), start=1):
            tokens = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
            new = request.decoding.max_tokens
            if len(tokens) + new > options.max_length:
                raise InputError(
                    f"{data.source}: prompt {number} has {len(tokens)} tokens, which with {new} new ones is "
                    f"more than the model's {options.max_length} positions: make the requests again with --model "
                    f"{options.model_name}"
                )
            prompts.append(Prompt(tokens, greedy(new), request.decoding.stop, request.decoding))
        return prompts

    def run_batch(self, workload: Workload, batch: Sequence[int]) -> list[dict[str, Any]]:
        from squeeze.benchmarks.completions import complete, published

        requests = [workload.data.rows[index] for index in batch]
        completions, stats = complete(
            workload.model,
            workload.tokenizer,
            workload.tokens(batch),
            [request.prompt for request in requests],
            requests[0].decoding,
            workload.squeezed,
            workload.options.seed,
        )
        seconds = sum(sample.prefill_seconds + sample.decode_seconds for sample in stats)
        time = {"batch_time": seconds, "batch_size": len(batch)}
        samples = []
        for index, request, choices, measured in zip(batch, requests, completions, stats, strict=True):
            result = {"choices": [published(choice) for choice in choices], "request_time": time}
            samples.append({"index": index, "request": request.raw, "result": result, "stats": measured})
        return samples

    def owns(self, folder: Path, dataset: str | None) -> bool:
        return dataset == self.name

    def read_scores(self, folder: Path, dataset: str) -> tuple[int, dict[str, Any]]:
        """Number of answers, and the ROUGE that `script/helm.sh` wrote beside them."""
        count = len(self.predictions(folder / f"{dataset}.jsonl", dataset))
        result = folder / "result.json"
        if not result.exists():
            return count, {}
        try:
            rouge: dict[str, Any] = {**check(read_object(result).get(dataset), Rouge, f"{result}: {dataset}")}
        except InputError as error:
            raise InputError(f"{error}: {self.scorer} scores it") from None
        return count, {name: rouge[name] for name in SCORES} | {"score": rouge[MAIN_SCORE]}


HELM = (HelmRequests("xsum", "HELM's XSum"), HelmRequests("cnndm", "HELM's CNN/DailyMail"))
