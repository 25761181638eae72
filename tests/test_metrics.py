"""Scores checked by hand, and prediction files that are not what they should be."""

import json

import pytest

from squeeze import InputError
from squeeze.metrics import dataset_score, read_predictions, rouge_details, rouge_l, sample_scores


def score(dataset, prediction, *answers):
    return dataset_score(sample_scores(dataset, [{"pred": prediction, "answers": list(answers), "all_classes": None}]))


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("Ann forgot the tickets", ["Ann forgot the tickets"], 100.0),
        ("Ann forgot the keys", ["Ann forgot the tickets"], 75.0),  # 3 of 4 words, both ways
        ("Ann forgot", ["Ann forgot the tickets"], 66.67),  # P 1, R 1/2
        ("tickets the forgot Ann", ["Ann forgot the tickets"], 25.0),  # one word in order
        ("PRICE 12.", ["price 12"], 50.0),  # `rouge` minds the case and splits at the full stop
        ("no", ["yes", "no", "perhaps"], 100.0),  # the best answer counts
        ("nothing alike", ["Ann forgot"], 0.0),
        ("\n\nAnn forgot\nDialogue: next", ["Ann forgot"], 100.0),  # leading newlines dropped, then the first line
        ("stone\n\n1998", ["1998"], 0.0),
        ("", ["Ann"], 0.0),
        ("   ", ["Ann"], 0.0),
        ("...", ["Ann"], 0.0),
        ("Ann", [""], 0.0),
    ],
)
def test_samsum(prediction, answers, expected):
    assert score("samsum", prediction, *answers) == expected


def test_only_some_data_sets_are_cut_at_the_first_line():
    assert score("qmsum", "Ann\nforgot", "Ann forgot") == 100.0
    assert score("samsum", "Ann\nforgot", "Ann forgot") == 66.67


def test_the_mean_is_rounded_once():
    rows = [{"pred": text, "answers": ["Ann forgot the tickets"]} for text in ("Ann forgot", "Ann forgot", "")]
    assert dataset_score(sample_scores("samsum", rows)) == 44.44


def test_the_score_of_a_long_text_does_not_depend_on_the_callers_stack():
    prediction = " ".join(f"p{i} same{i}" for i in range(240))
    answer = " ".join(f"a{i} same{i}" for i in range(240))
    hopeless = " ".join(f"p{i}" for i in range(1200)) + " same"

    def deep(frames, text):
        return deep(frames - 1, text) if frames else rouge_l(text, answer)

    assert deep(0, prediction) == deep(700, prediction) == pytest.approx(0.5, abs=1e-6)
    assert deep(0, hopeless) == deep(700, hopeless) == 0.0  # more words than LongBench's recursion goes


def test_rouge_score_beside_it():
    rows = [{"pred": "Ann forgets tickets\nDialogue: next", "answers": ["none", "Ann forgot the ticket"]}]
    assert rouge_details("samsum", rows) == [{"rouge1": 57.14, "rouge2": 0.0, "rougeL": 57.14}]  # stemmed: 2 of 3, 4


LINE = {"pred": "Ann", "answers": ["Ann"], "all_classes": None, "length": 3}


def test_predictions_of_other_longbench_code(tmp_path):
    path = tmp_path / "samsum.jsonl"
    path.write_bytes("\n".join(json.dumps(LINE | {"pred": "a\u2028b"}, ensure_ascii=False) for _ in "12").encode())
    assert [row["pred"] for row in read_predictions(path)] == ["a\u2028b"] * 2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "samsum.jsonl has no rows"),
        (b"\n\n", "samsum.jsonl has no rows"),
        (json.dumps(LINE).encode() + b'\n{"pred": "An', "line 2 is not JSON: the file ends in the middle of a line"),
        (b"{]\n" + json.dumps(LINE).encode(), "line 1 is not JSON"),
        (b'{"pred": "Ann", "answers": ["a"]}\n', "line 1 has no field all_classes"),
        (b'{"answers": ["a"], "all_classes": null}\n', "line 1 has no field pred"),
        (json.dumps(LINE | {"answers": "Ann"}).encode(), "line 1: answers is not a list of texts"),
        (json.dumps(LINE | {"answers": []}).encode(), "line 1: answers is not a list of texts"),
        (json.dumps(LINE | {"pred": None}).encode(), "line 1: pred is not text"),
        (b"[1]\n", "line 1 is not a JSON object"),
        (b"\xff\xfe\n", "line 1 is not UTF-8"),
    ],
)
def test_bad_prediction_files_are_named(tmp_path, content, words):
    path = tmp_path / "samsum.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        read_predictions(path)
    assert words in str(error.value)
    assert str(path) in str(error.value)
