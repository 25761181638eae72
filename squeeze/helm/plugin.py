"""Plugin for `helm-run --plugins squeeze.helm_plugin`: XSum and CNN/DailyMail on articles of your own, offline.

The prompts, settings and ROUGE are those of HELM's own `summarization_xsum` and `summarization_cnndm`
(`helm.benchmark.run_specs.classic_run_specs`), whose data and other metrics have to be downloaded.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypedDict

from helm.benchmark.adaptation.common_adapter_specs import get_summarization_adapter_spec
from helm.benchmark.metrics.common_metric_specs import get_basic_metric_specs
from helm.benchmark.presentation.taxonomy_info import TaxonomyInfo
from helm.benchmark.run_spec import RunSpec, run_spec_function
from helm.benchmark.scenarios.scenario import (
    CORRECT_TAG,
    TEST_SPLIT,
    TRAIN_SPLIT,
    Input,
    Instance,
    Output,
    Reference,
    Scenario,
    ScenarioMetadata,
    ScenarioSpec,
)

from squeeze import threads
from squeeze.errors import InputError
from squeeze.storage.files import read_jsonl

# For `SqueezeClient`, which imports torch in HELM's process after its plugins.
os.environ |= threads.settings()

#: In-context examples, taken from the start of the file.
EXAMPLES = 5

#: Words of an article that HELM keeps.
WORDS = 512

#: HELM's own; a run entry's `temperature=...` replaces it.
TEMPERATURE = 0.3

ROUGE = ("rouge_1", "rouge_2", "rouge_l")


class Article(TypedDict):
    document: str
    summary: str


class ArticlesScenario(Scenario):
    """Summaries of the articles in a JSON Lines file: a `{"document": …, "summary": …}` a line.

    The first five are the in-context examples, the rest are the test.

    Args:
        articles: the file.
        task: HELM's name for it, `xsum_local` or `cnndm_local`.
    """

    description = "Summaries of news articles in a local file"
    tags = ("summarization",)

    def __init__(self, articles: str, task: str) -> None:
        super().__init__()
        self.articles = articles
        self.name = task

    def get_instances(self, output_path: str) -> list[Instance]:
        """The file's articles as HELM instances.

        Raises:
            InputError: a line is not one of them, or there are too few.
        """
        rows = read_jsonl(Path(self.articles), Article)
        if len(rows) <= EXAMPLES:
            raise InputError(f"{self.articles} has {len(rows)} articles: {EXAMPLES} are examples, so 6 is the least")
        instances = []
        for index, (number, row) in enumerate(rows):
            if not (row["document"].strip() and row["summary"].strip()):
                raise InputError(f"{self.articles} line {number}: document or summary is blank")
            summary = Reference(Output(text=" ".join(row["summary"].split())), tags=[CORRECT_TAG])
            article = Input(text=" ".join(row["document"].split()[:WORDS]))
            split = TRAIN_SPLIT if index < EXAMPLES else TEST_SPLIT
            instances.append(Instance(input=article, references=[summary], split=split))
        return instances

    def get_metadata(self) -> ScenarioMetadata:
        """The description that `helm-summarize --auto-generate-schema` shows."""
        return ScenarioMetadata(
            name=self.name,
            display_name=self.name,
            description=f"News articles in {self.articles}, to be summarized.",
            taxonomy=TaxonomyInfo(task="summarization", what="news", when="?", who="?", language="English"),
            main_metric="rouge_2",
            main_split="test",
        )


@run_spec_function("xsum_local")
def xsum_local(articles: str = "data/xsum/articles.jsonl") -> RunSpec:
    """One sentence, 64 tokens, as HELM's XSum."""
    return _run_spec("xsum_local", articles, sentences=1, max_tokens=64)


@run_spec_function("cnndm_local")
def cnndm_local(articles: str) -> RunSpec:
    """Three sentences, 128 tokens, as HELM's CNN/DailyMail."""
    return _run_spec("cnndm_local", articles, sentences=3, max_tokens=128)


def _run_spec(name: str, articles: str, sentences: int, max_tokens: int) -> RunSpec:
    return RunSpec(
        name=f"{name}:articles={articles}",
        scenario_spec=ScenarioSpec(
            class_name="squeeze.helm_plugin.ArticlesScenario", args={"articles": articles, "task": name}
        ),
        adapter_spec=get_summarization_adapter_spec(
            num_sents=sentences, max_tokens=max_tokens, temperature=TEMPERATURE
        ),
        metric_specs=get_basic_metric_specs(list(ROUGE)),
        groups=[name],
    )
