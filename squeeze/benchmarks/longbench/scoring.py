"""From prediction files to LongBench's tables: scores of samples, data sets, length buckets and task groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from squeeze.benchmarks.longbench.data import check_lists
from squeeze.benchmarks.longbench.metrics import METRICS, rouge_l
from squeeze.benchmarks.prediction_files import dataset_of
from squeeze.benchmarks.records import Prediction, PredictionByLength
from squeeze.benchmarks.scores import dataset_score, scored
from squeeze.storage.files import read_jsonl

ROUGE_VARIANTS = ("rouge1", "rouge2", "rougeL")

#: Only the first line of these predictions is scored: the models go on with the next example of the prompt.
FIRST_LINE = frozenset({"trec", "triviaqa", "samsum", "lsht"})

#: LongBench's tasks; a group's score is the mean of its data sets'.
GROUPS = {
    "single-document QA": ("narrativeqa", "qasper", "multifieldqa_en", "multifieldqa_zh"),
    "multi-document QA": ("hotpotqa", "2wikimqa", "musique", "dureader"),
    "summarization": ("gov_report", "qmsum", "multi_news", "vcsum"),
    "few-shot learning": ("trec", "triviaqa", "samsum", "lsht"),
    "synthetic": ("passage_count", "passage_retrieval_en", "passage_retrieval_zh"),
    "code": ("lcc", "repobench-p"),
}

#: LongBench-E's buckets, by a row's length: below 4,000, below 8,000, and the rest.
BUCKETS = ("0-4k", "4-8k", "8k+")


def read_predictions(path: Path, task: str = "Long", dataset: str | None = None) -> list[Any]:
    """Read a prediction file, this project's or another's that LongBench's `eval.py` reads.

    Args:
        task: `Long`, or `e`, whose lines must have the row's length, too.
        dataset: whose predictions they are; None: the one that the file is named after.
    Returns:
        `squeeze.benchmarks.records.Prediction` of each line.
    Raises:
        InputError: the file is empty, ends in the middle of a line, or has a line that is not a prediction.
    """
    kind: type[Any] = PredictionByLength if task == "e" else Prediction
    rows = read_jsonl(path, kind)
    for number, row in rows:
        check_lists(row, dataset or dataset_of(path), f"{path} line {number}")
    return [row for _, row in rows]


def score_rows(dataset: str, rows: Sequence[Any], task: str, rouge: bool = True) -> dict[str, Any]:
    """One data set's part of `result_detail.json`: its score, and every sample's, in percent.

    Args:
        rows: `squeeze.benchmarks.records.Prediction`.
        task: `Long`, or `e` for the score of each range of lengths as well.
        rouge: also ROUGE-1, 2 and L by `rouge-score`, which take longer than all the rest.
    """
    each = sample_scores(dataset, rows)
    detail = scored(each)
    per_sample = detail.pop("per_sample")
    details = rouge_details(dataset, rows) if rouge else [{} for _ in rows]
    if task == "e":
        detail["buckets"] = bucket_scores(rows, each)
    if details[0]:
        detail["rouge_score"] = means(details)
    return detail | {"per_sample": [score | more for score, more in zip(per_sample, details, strict=True)]}


def scored_text(dataset: str, prediction: str) -> str:
    """The part of a prediction that LongBench scores."""
    return prediction.lstrip("\n").split("\n")[0] if dataset in FIRST_LINE else prediction


def sample_scores(dataset: str, rows: Sequence[dict[str, Any]]) -> list[float]:
    """LongBench's score of each prediction, the best over its answers, in [0, 1]."""
    metric = METRICS[dataset]
    return [
        max(metric(scored_text(dataset, row["pred"]), answer, row["all_classes"] or ()) for answer in row["answers"])
        for row in rows
    ]


def bucket_scores(rows: Sequence[dict[str, Any]], scores: Sequence[float]) -> dict[str, float | None]:
    """LongBench-E's three numbers for a data set; None where no row is of that length."""
    buckets: dict[str, list[float]] = {bucket: [] for bucket in BUCKETS}
    for row, score in zip(rows, scores, strict=True):
        buckets[BUCKETS[(row["length"] >= 4000) + (row["length"] >= 8000)]].append(score)
    return {bucket: dataset_score(values) if values else None for bucket, values in buckets.items()}


def group_scores(scores: Mapping[str, float]) -> dict[str, float]:
    """The mean of each task group that is whole, and `all` where every data set of LongBench is there."""
    groups = {
        group: round(fmean(scores[member] for member in members), 2)
        for group, members in GROUPS.items()
        if all(member in scores for member in members)
    }
    if len(groups) == len(GROUPS):
        groups["all"] = round(fmean(scores[member] for members in GROUPS.values() for member in members), 2)
    return groups


def rouge_details(dataset: str, rows: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """F of ROUGE-1, 2 and L by `rouge-score`, with stemming, in percent: per prediction the best over its answers.

    Beside LongBench's own ROUGE-L of English text, never in its place; nothing for other metrics.
    """
    from rouge_score.rouge_scorer import RougeScorer  # a second to import

    if METRICS[dataset] is not rouge_l:
        return [{} for _ in rows]
    scorer = RougeScorer(list(ROUGE_VARIANTS), use_stemmer=True)
    details = []
    for row in rows:
        best = scorer.score_multi(row["answers"], scored_text(dataset, row["pred"]))
        details.append({variant: round(100 * best[variant].fmeasure, 2) for variant in ROUGE_VARIANTS})
    return details


def means(details: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The mean of every number in `details`, rounded to two decimals."""
    rows = list(details)
    return {name: round(fmean(row[name] for row in rows), 2) for name in rows[0]}
