"""From predictions to tables: first lines, means, buckets, groups, intervals, and files that are not whole."""

import json

import numpy as np
import pytest

from squeeze import InputError
from squeeze.benchmarks.longbench.data import prompt_formats
from squeeze.benchmarks.longbench.scoring import (
    GROUPS,
    bucket_scores,
    group_scores,
    means,
    read_predictions,
    rouge_details,
    sample_scores,
)
from squeeze.benchmarks.scores import dataset_score, difference, interval


def score(dataset, prediction, *answers, classes=None):
    row = {"pred": prediction, "answers": list(answers), "all_classes": classes}
    return dataset_score(sample_scores(dataset, [row]))


@pytest.mark.parametrize(
    ("dataset", "prediction", "answers", "expected"),
    [
        ("samsum", "no", ["yes", "no", "perhaps"], 100.0),  # the best answer counts
        (
            "samsum",
            "\n\nAnn forgot\nDialogue: next",
            ["Ann forgot"],
            100.0,
        ),  # newlines go, then the first line
        ("triviaqa", "Paris\nPassage: the next", ["Paris"], 100.0),
        ("triviaqa", " \nParis", ["Paris"], 0.0),  # a first line that is blank is one
        ("hotpotqa", "Paris\nPassage", ["Paris"], 66.67),  # all of it
        ("qmsum", "Ann\nforgot", ["Ann forgot"], 100.0),
    ],
)
def test_what_is_scored_of_a_prediction(dataset, prediction, answers, expected):
    assert score(dataset, prediction, *answers) == expected


def test_classes_reach_the_metric():
    assert score("lsht", "体育、军事\n新闻", "体育", classes=["体育", "军事"]) == 50.0


def test_the_mean_is_rounded_once():
    rows = [{"pred": text, "answers": ["Ann forgot the tickets"], "all_classes": None} for text in ("Ann forgot",) * 2]
    rows.append({"pred": "", "answers": ["Ann"], "all_classes": None})
    assert dataset_score(sample_scores("samsum", rows)) == 44.44


def test_buckets_are_longbench_es():
    rows = [{"length": length} for length in (0, 3999, 4000, 7999, 8000)]
    assert bucket_scores(rows, [1, 0, 1, 1, 0.3]) == {"0-4k": 50.0, "4-8k": 100.0, "8k+": 30.0}
    assert bucket_scores(rows[:1], [1]) == {"0-4k": 100.0, "4-8k": None, "8k+": None}


def test_groups_are_means_of_what_is_whole():
    assert sorted(one for group in GROUPS.values() for one in group) == sorted(prompt_formats())
    assert group_scores({"lcc": 10.0, "repobench-p": 20.5, "samsum": 3.0}) == {"code": 15.25}
    everything = dict.fromkeys(prompt_formats(), 4.0) | {"lcc": 25.0}
    assert group_scores(everything)["all"] == 5.0  # of the 21 data sets, not of the groups


def test_an_interval_is_that_of_a_slow_bootstrap():
    values = [0.0, 0.2, 0.9, 1.0, 0.4, 0.5, 0.1]
    rng = np.random.default_rng(5)
    resampled = [np.mean(rng.choice(values, len(values))) for _ in range(20_000)]
    assert interval(values) == pytest.approx(np.percentile(resampled, [2.5, 97.5]), abs=0.02)
    assert interval(values) == interval(values)
    assert interval([0.3] * 4) == (0.3, 0.3)
    assert interval([0.3]) == (0.3, 0.3)


def test_a_difference_is_taken_in_pairs():
    first = [0.1, 0.9, 0.3, 0.7, 0.5, 0.2]
    mean, low, high = difference(first, [value + 0.05 for value in first])
    assert (mean, low, high) == pytest.approx((0.05, 0.05, 0.05)), "every sample is better by as much"
    mean, low, high = difference(first, first[::-1])
    assert mean == pytest.approx(0)
    assert low < 0 < high


def test_rouge_score_beside_it():
    rows = [{"pred": "Ann forgets tickets\nDialogue: next", "answers": ["none", "Ann forgot the ticket"]}]
    details = rouge_details("samsum", rows)
    assert details == [{"rouge1": 57.14, "rouge2": 0.0, "rougeL": 57.14}]  # stemmed: 2 of 3, 4
    assert means([*details, {"rouge1": 0, "rouge2": 1, "rougeL": 0}])["rouge1"] == 28.57
    assert rouge_details("vcsum", rows) == rouge_details("lcc", rows) == [{}]


LINE = {"pred": "Ann", "answers": ["Ann"], "all_classes": None, "length": 3}


def test_predictions_of_other_longbench_code(tmp_path):
    path = tmp_path / "samsum.jsonl"
    path.write_bytes("\n".join(json.dumps(LINE | {"pred": "a\u2028b"}, ensure_ascii=False) for _ in "12").encode())
    assert [row["pred"] for row in read_predictions(path)] == ["a\u2028b"] * 2
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(LINE).encode() + b"\r\n" + json.dumps(LINE).encode() + b"\r\n")
    assert len(read_predictions(path)) == 2, "a byte-order mark and Windows' line ends are no harm"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "has no rows"),
        (b"\n\n", "has no rows"),
        (json.dumps(LINE).encode() + b'\n{"pred": "An', "line 2 is not JSON: the file ends in the middle of a line"),
        (b"{]\n" + json.dumps(LINE).encode(), "line 1 is not JSON"),
        (b'{"pred": "Ann", "answers": ["a"]}\n', "line 1 has no field all_classes"),
        (b'{"answers": ["a"], "all_classes": null}\n', "line 1 has no field pred"),
        (json.dumps(LINE | {"answers": "Ann"}).encode(), "line 1: answers is not a list, got"),
        (json.dumps(LINE | {"answers": []}).encode(), "line 1: answers is not a list of length >= 1, got []"),
        (json.dumps(LINE | {"pred": None}).encode(), "line 1: pred is not text"),
        (
            json.dumps(LINE | {"all_classes": "Date"}).encode(),
            "line 1: all_classes is not a list or null, got",
        ),
        (b"[1]\n", "line 1 is not a JSON object"),
        (json.dumps(LINE).encode("utf-16"), "line 1 is not UTF-8"),
        ('{"pred": "é"'.encode("latin-1"), "line 1 is not UTF-8"),
    ],
)
def test_bad_prediction_files_are_named(tmp_path, content, words):
    path = tmp_path / "samsum.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        read_predictions(path)
    assert words in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("dataset", "line", "words"),
    [
        ("trec", LINE, "line 1: all_classes is empty, and trec is scored by it"),
        ("passage_retrieval_en", LINE, "line 1: an answer does not name a paragraph, as in Paragraph 1"),
        ("passage_retrieval_zh", LINE | {"answers": ["Paragraph 1"]}, "as in 段落1"),
    ],
)
def test_what_a_metric_needs(tmp_path, dataset, line, words):
    path = tmp_path / f"{dataset}.jsonl"
    path.write_text(json.dumps(line))
    with pytest.raises(InputError, match=words):
        read_predictions(path)
