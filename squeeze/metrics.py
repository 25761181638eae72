"""LongBench's scores, to the digit, and prediction files that are read with care.

ROUGE-L is that of the `rouge` package, as in LongBench's own `metrics.py`; `rouge-score`, which counts differently,
is reported beside it and never in its place.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rouge import Rouge

from squeeze.config import InputError
from squeeze.files import parse_jsonl, read_bytes

ROUGE_VARIANTS = ("rouge1", "rouge2", "rougeL")

#: Only the first line of these predictions is scored: the models go on with the next example of the prompt.
FIRST_LINE = frozenset({"trec", "triviaqa", "samsum", "lsht"})

#: Frames above the metric in LongBench's own `eval.py`.
LONGBENCH_DEPTH = 3


def rouge_l(prediction: str, answer: str) -> float:
    """ROUGE-L F of the `rouge` package, in [0, 1]; 0 where it fails, as on an empty prediction."""
    with _fixed_recursion():
        try:
            return Rouge().get_scores([prediction], [answer], avg=True)["rouge-l"]["f"]
        except Exception:  # LongBench takes whatever goes wrong in `rouge` for a score of 0
            return 0.0


@contextmanager
def _fixed_recursion() -> Iterator[None]:
    """Allow as many frames as LongBench has left: `rouge` recurses once a word, so the limit decides some scores."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(1000 + sum(1 for _ in traceback.walk_stack(None)) - LONGBENCH_DEPTH)
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)


METRICS: dict[str, Callable[[str, str], float]] = {
    "gov_report": rouge_l,
    "qmsum": rouge_l,
    "multi_news": rouge_l,
    "samsum": rouge_l,
}


def check_scored(dataset: str) -> None:
    """Raises InputError if there is no metric for this data set yet."""
    if dataset not in METRICS:
        raise InputError(f"{dataset} cannot be scored: --datasets can name {', '.join(METRICS)} so far")


def read_predictions(path: Path) -> list[dict[str, Any]]:
    """Read a prediction file, this project's or another's that LongBench's `eval.py` reads.

    Raises:
        InputError: the file is empty, ends in the middle of a line, or has a line that is not a prediction.
    """
    rows = parse_jsonl(read_bytes(path), path, ("pred", "answers", "all_classes"))
    for number, row in rows:
        if not isinstance(row["pred"], str):
            raise InputError(f"{path} line {number}: pred is not text")
        answers = row["answers"]
        if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
            raise InputError(f"{path} line {number}: answers is not a list of texts")
    return [row for _, row in rows]


def scored_text(dataset: str, prediction: str) -> str:
    """The part of a prediction that LongBench scores."""
    return prediction.lstrip("\n").split("\n")[0] if dataset in FIRST_LINE else prediction


def sample_scores(dataset: str, rows: Sequence[dict[str, Any]]) -> list[float]:
    """LongBench's score of each prediction, the best over its answers, in [0, 1]."""
    metric = METRICS[dataset]
    return [max(metric(scored_text(dataset, row["pred"]), answer) for answer in row["answers"]) for row in rows]


def dataset_score(scores: Sequence[float]) -> float:
    """LongBench's number for a data set: the mean in percent, rounded to two decimals."""
    return round(100 * sum(scores) / len(scores), 2)


def rouge_details(dataset: str, rows: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """F of ROUGE-1, 2 and L by `rouge-score`, with stemming, in percent: per prediction the best over its answers."""
    from rouge_score.rouge_scorer import RougeScorer  # a second to import, of which --help knows nothing

    scorer = RougeScorer(list(ROUGE_VARIANTS), use_stemmer=True)
    details = []
    for row in rows:
        text = scored_text(dataset, row["pred"])
        best = scorer.score_multi(row["answers"], text)
        details.append({variant: round(100 * best[variant].fmeasure, 2) for variant in ROUGE_VARIANTS})
    return details
