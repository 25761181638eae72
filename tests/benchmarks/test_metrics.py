"""LongBench's metrics on cases checked by hand, hostile ones among them."""

import pytest

from squeeze.benchmarks.longbench.data import prompt_formats
from squeeze.benchmarks.longbench.metrics import METRICS, classification, normalize, normalize_zh, rouge_l


def test_every_data_set_has_a_metric():
    assert METRICS.keys() == prompt_formats().keys()


def check(dataset, prediction, answer, expected, classes=()):
    assert METRICS[dataset](prediction, answer, classes) == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("Paris", "Paris", 1),
        ("The city of Paris.", "paris", 0.5),  # city, of, paris: P 1/3, R 1
        ("a an the", "the", 0),  # nothing is left of either
        ("", "Paris", 0),
        ("?!", "Paris", 0),
        ("Paris", "", 0),
        ("yes yes no", "yes", 0.5),  # a word counts as often as in the answer
        ("U.S.A.", "usa", 1),  # points go without leaving a blank
        ("well-known theorem", "wellknown theorem", 1),
        ("the theatre", "theatre", 1),  # an article is a whole word
        ("Ann  \t\n Lee", "ann lee", 1),
        ("“Paris”", "Paris", 0),  # quotation marks beyond ASCII stay
        ("答案 is Paris", "Paris", 0.5),  # of three words
        ("café", "cafe", 0),
        ("x " * 20000, "x", 2 / 20001),
    ],
)
def test_qa_f1(prediction, answer, expected):
    check("hotpotqa", prediction, answer, expected)


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("北京", "北京", 1),
        ("北京。", "北京", 1),
        ("在北京", "北京", 2 / 3),  # two words, one of them right
        ("北京 BEIJING", "beijing北京", 1),
        ("，。！", "北京", 0),
        ("", "北京", 0),
        ("上海", "北京", 0),
        ("1998年", "1998", 2 / 3),
    ],
)
def test_qa_f1_of_chinese(prediction, answer, expected):
    check("multifieldqa_zh", prediction, answer, expected)


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("Ann forgot the tickets", "Ann forgot the tickets", 1),
        ("Ann forgot the keys", "Ann forgot the tickets", 0.75),  # 3 of 4 words, both ways
        ("Ann forgot", "Ann forgot the tickets", 2 / 3),  # P 1, R 1/2
        ("tickets the forgot Ann", "Ann forgot the tickets", 0.25),  # one word in order
        ("PRICE 12.", "price 12", 0.5),  # `rouge` minds the case and splits at the full stop
        ("nothing alike", "Ann forgot", 0),
        ("", "Ann", 0),
        ("   ", "Ann", 0),
        ("...", "Ann", 0),
        ("Ann", "", 0),
    ],
)
def test_rouge_l(prediction, answer, expected):
    check("samsum", prediction, answer, expected)


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("会议讨论了预算", "会议讨论了预算", 1),
        ("预算", "会议讨论了预算", 0.4),  # one of four words
        ("", "会议", 0),
        ("。", "会议", 0),
        ("meeting 会议", "会议", 2 / 3),
    ],
)
def test_rouge_l_of_chinese_words(prediction, answer, expected):
    check("vcsum", prediction, answer, expected)


@pytest.mark.parametrize(
    ("prediction", "answer", "classes", "expected"),
    [
        ("Date", "Date", ["Date", "Reason"], 1),
        ("It is a Date or a Reason", "Date", ["Date", "Reason"], 0.5),
        ("date", "Date", ["Date", "Reason"], 0),
        ("", "Date", ["Date"], 0),
        ("Reason", "Date", ["Date", "Reason"], 0),
        ("Other location", "Other location", ["location", "Other location"], 1),  # a part of the answer's own name
        ("Other location", "location", ["location", "Other location"], 0.5),  # the other way round it is a second name
        ("a b c d", "a b c", ["a", "b", "c", "a b c"], 0.5),  # b is passed over once a is dropped: not a mistake here
        ("体育新闻", "体育", ["体育", "军事"], 1),
    ],
)
def test_classification(prediction, answer, classes, expected):
    check("trec", prediction, answer, expected, classes)


def test_classification_leaves_the_classes_alone():
    classes = ["location", "Other location"]
    classification("Other location", "Other location", classes)
    assert classes == ["location", "Other location"]


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("8", "8", 1),
        ("There are 8 of 11", "8", 0.5),
        ("8, 8, 9", "8", 2 / 3),
        ("08", "8", 0),
        ("8.0", "8", 0.5),
        ("eight", "8", 0),
        ("", "8", 0),
        ("٨", "٨", 1),  # any script's digits
    ],
)
def test_count(prediction, answer, expected):
    check("passage_count", prediction, answer, expected)


@pytest.mark.parametrize(
    ("dataset", "prediction", "answer", "expected"),
    [
        ("passage_retrieval_en", "Paragraph 3", "Paragraph 3", 1),
        ("passage_retrieval_en", "3", "Paragraph 3", 1),
        ("passage_retrieval_en", "Paragraph 3 or 4", "Paragraph 3", 0.5),
        ("passage_retrieval_en", "Paragraph 30", "Paragraph 3", 0),
        ("passage_retrieval_en", "three", "Paragraph 3", 0),
        ("passage_retrieval_zh", "段落3", "段落3", 1),
        ("passage_retrieval_zh", "第3段，共5段", "段落3", 0.5),
        ("passage_retrieval_zh", "", "段落3", 0),
    ],
)
def test_retrieval(dataset, prediction, answer, expected):
    check(dataset, prediction, answer, expected)


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("return x", "return x", 1),
        ("\n\nreturn x\nmore", "return x", 1),
        ("# comment\nreturn x", "return x", 1),  # the first line without a comment
        ("// comment\n```\nreturn x", "return x", 1),
        ("return y", "return x", 0.88),  # 2 * 7 / 16 = 0.875, and Python rounds a half to the even digit
        ("return x  # why", "return x", 0),  # no line is left
        ("", "", 1),
        ("", "return x", 0),
        ("a" * 300, "b" + "a" * 299, 0),  # difflib takes what is frequent in a long text for junk
        ("x = a // b", "x = a", 0),
    ],
)
def test_code_similarity(prediction, answer, expected):
    check("lcc", prediction, answer, expected)


def test_normalizing():
    assert normalize(" The  Cat, a DOG; an owl's ") == "cat dog owls"
    assert normalize_zh("Ａ，b 。「C」…") == "ａbc"


def test_the_score_of_a_long_text_does_not_depend_on_the_callers_stack():
    prediction = " ".join(f"p{i} same{i}" for i in range(240))
    answer = " ".join(f"a{i} same{i}" for i in range(240))
    hopeless = " ".join(f"p{i}" for i in range(1200)) + " same"

    def deep(frames, text):
        return deep(frames - 1, text) if frames else rouge_l(text, answer)

    assert deep(0, prediction) == deep(700, prediction) == pytest.approx(0.5, abs=1e-6)
    assert deep(0, hopeless) == deep(700, hopeless) == 0.0  # more words than LongBench's recursion goes
