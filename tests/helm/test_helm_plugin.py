"""The articles that the plugin's scenarios read."""

import json

import pytest
from helm.benchmark.scenarios.scenario import CORRECT_TAG

from squeeze import InputError
from squeeze.helm.plugin import ArticlesScenario, cnndm_local, xsum_local


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def articles(count):
    return [{"document": f"Article {n}.", "summary": f"Summary {n}."} for n in range(count)]


def test_the_first_five_are_examples(tmp_path):
    found = ArticlesScenario(write(tmp_path / "a.jsonl", articles(8)), "xsum_local").get_instances("")
    assert [one.input.text for one in found] == [f"Article {n}." for n in range(8)]
    assert [one.split for one in found] == ["train"] * 5 + ["test"] * 3
    for n, one in enumerate(found):
        [reference] = one.references
        assert (reference.output.text, reference.tags) == (f"Summary {n}.", [CORRECT_TAG])


def test_an_article_is_512_words_on_one_line(tmp_path):
    long = {"document": "\n\n".join(f"w{n}" for n in range(600)), "summary": "Two\nlines \u2028 here."}
    found = ArticlesScenario(write(tmp_path / "a.jsonl", [*articles(5), long]), "xsum_local").get_instances("")
    assert found[-1].input.text == " ".join(f"w{n}" for n in range(512))
    assert found[-1].references[0].output.text == "Two lines here."


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (articles(5), r"a\.jsonl has 5 articles: 5 are examples, so 6 is the least"),
        ([*articles(6), {"document": "It is."}], r"a\.jsonl line 7 has no field summary"),
        (
            [*articles(6), {"document": " \n", "summary": "It is."}],
            r"a\.jsonl line 7: document or summary is blank",
        ),
        ([*articles(6), {"document": "It is.", "summary": 5}], r"a\.jsonl line 7: summary is not text, got 5"),
        ([*articles(6), ["It is."]], r"a\.jsonl line 7 is not a JSON object"),
    ],
)
def test_articles_that_are_none(tmp_path, rows, said):
    with pytest.raises(InputError, match=said):
        ArticlesScenario(write(tmp_path / "a.jsonl", rows), "xsum_local").get_instances("")


def test_run_specs_are_helms_own_but_for_data_and_metrics():
    from helm.benchmark.run_specs.classic_run_specs import get_cnndm_summarization_spec, get_xsum_summarization_spec

    assert xsum_local("a.jsonl").adapter_spec == get_xsum_summarization_spec().adapter_spec
    assert cnndm_local("a.jsonl").adapter_spec == get_cnndm_summarization_spec().adapter_spec
    for spec in (xsum_local("a.jsonl"), cnndm_local("a.jsonl")):
        names = [name for metric in spec.metric_specs for name in metric.args.get("names", [])]
        assert {"rouge_1", "rouge_2", "rouge_l"} <= set(names)
