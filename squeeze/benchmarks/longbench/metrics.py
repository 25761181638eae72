"""LongBench's metrics, to the digit: a prediction and an answer to a score in [0, 1].

Bai et al., LongBench (arXiv 2308.14508), section 3. What its own `metrics.py` computes is kept to the letter, also
where one would do it otherwise: published tables were made that way.
"""

from __future__ import annotations

import logging
import re
import string
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import SequenceMatcher
from functools import cache

from rouge import Rouge

#: Of a prediction, one of its answers, and the data set's classes (none but for classification).
Metric = Callable[[str, str, Sequence[str]], float]

ARTICLES = re.compile(r"\b(a|an|the)\b")
CHINESE_PUNCTUATION = "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃"
CHINESE_PUNCTUATION += "》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)
WITHOUT_ANY_PUNCTUATION = str.maketrans("", "", string.punctuation + CHINESE_PUNCTUATION)

#: Frames above `rouge_l` in LongBench's own `eval.py`.
LONGBENCH_DEPTH = 3


def normalize(text: str) -> str:
    """Lower case, no ASCII punctuation, no articles, single blanks."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(WITHOUT_PUNCTUATION)).split())


def normalize_zh(text: str) -> str:
    """Lower case, no punctuation of either script, no blanks."""
    return "".join(text.lower().translate(WITHOUT_ANY_PUNCTUATION).split())


@cache
def _segmenter():
    import jieba  # a second to load its dictionary, which only Chinese needs

    jieba.setLogLevel(logging.ERROR)
    return jieba


def words_zh(text: str) -> list[str]:
    """Chinese text as words."""
    return list(_segmenter().cut(text, cut_all=False))


def _f1(prediction: Sequence[str], answer: Sequence[str]) -> float:
    same = sum((Counter(prediction) & Counter(answer)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(prediction), same / len(answer)
    return 2 * precision * recall / (precision + recall)


def qa_f1(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """F1 of the bags of normalized words."""
    return _f1(normalize(prediction).split(), normalize(answer).split())


def qa_f1_zh(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """F1 of the bags of normalized Chinese words."""
    bags = [[word for word in map(normalize_zh, words_zh(text)) if word] for text in (prediction, answer)]
    return _f1(*bags)


def rouge_l(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """ROUGE-L F of the `rouge` package; 0 where it fails, as on an empty prediction."""
    with _fixed_recursion():
        try:
            return Rouge().get_scores([prediction], [answer], avg=True)["rouge-l"]["f"]
        except Exception:  # LongBench takes whatever goes wrong in `rouge` for a score of 0
            return 0.0


def rouge_l_zh(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """`rouge_l` of Chinese words."""
    return rouge_l(" ".join(words_zh(prediction)), " ".join(words_zh(answer)))


@contextmanager
def _fixed_recursion() -> Iterator[None]:
    """Allow as many frames as LongBench has left: `rouge` recurses once a word, so the limit decides some scores."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(1000 + sum(1 for _ in traceback.walk_stack(None)) - LONGBENCH_DEPTH)
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)


def classification(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """1 over the number of classes that the prediction names, if the answer is one of them.

    A class whose name is part of the answer's does not count. LongBench drops such names from the list that it is
    walking, so that the name after a dropped one is passed over; so does this.
    """
    named = [name for name in classes if name in prediction]
    for name in named:
        if name in answer and name != answer:
            named.remove(name)
    return 1 / len(named) if answer in named else 0.0


def count(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """The share of the numbers in the prediction that are the answer's."""
    return _share(re.findall(r"\d+", prediction), answer)


def retrieval(prediction: str, answer: str, classes: Sequence[str] = (), word: str = "Paragraph ") -> float:
    """The share of the numbers in the prediction that are that of the answer's paragraph."""
    return _share(re.findall(r"\d+", prediction), re.findall(rf"{word}(\d+)", answer)[0])


def retrieval_zh(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """`retrieval` with `段落` before the number."""
    return retrieval(prediction, answer, word="段落")


def _share(numbers: Sequence[str], wanted: str) -> float:
    return numbers.count(wanted) / len(numbers) if numbers else 0.0


def code_similarity(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Similarity of the prediction's first line that has no comment or fence, as `fuzzywuzzy` rounds it.

    `fuzzywuzzy.fuzz.ratio` without its C extension is difflib's ratio in whole percent, by which LongBench's tables
    were made; the extension, and libraries that replace it, differ from it by some points.
    """
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return 1.0 if line == answer else round(100 * SequenceMatcher(None, line, answer).ratio()) / 100


METRICS: dict[str, Metric] = {
    **dict.fromkeys(
        ("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique", "triviaqa"), qa_f1
    ),
    "multifieldqa_zh": qa_f1_zh,
    **dict.fromkeys(("gov_report", "qmsum", "multi_news", "samsum"), rouge_l),
    **dict.fromkeys(("dureader", "vcsum"), rouge_l_zh),
    **dict.fromkeys(("trec", "lsht"), classification),
    "passage_count": count,
    "passage_retrieval_en": retrieval,
    "passage_retrieval_zh": retrieval_zh,
    **dict.fromkeys(("lcc", "repobench-p"), code_similarity),
}
