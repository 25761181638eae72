"""Statistics of a sample: the bytes that files have always had, there and back, and their summary."""

import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
from made_runs import measured

from squeeze.benchmarks.records import PredictedSample
from squeeze.generation.stats import SampleStats, summarize
from squeeze.runs.samples import Samples

#: As `pred.py` wrote them before statistics were a class: of a full and of a squeezed cache, and of an early version.
FULL = (
    '{"prompt_tokens": 1784, "new_tokens": 18, "prefill_seconds": 4.5, "decode_seconds": 1.25, "state_bytes": 0.0, '
    '"kv_bytes": 41103360.0, "full_kv_bytes": 41103360, "peak_memory_bytes": 1776214016}'
)
SQUEEZED = (
    '{"prompt_tokens": 1784, "new_tokens": 18, "prefill_seconds": 4.5, "decode_seconds": 0.75, "kv_bytes": 8220672.0, '
    '"state_bytes": 46080.0, "full_kv_bytes": 41103360, "peak_memory_bytes": 1776402432, '
    '"similarities": [0.607374, 0.843966], "classes": [1, 3], "budgets": [1642, 90], "notes": []}'
)
EARLY = SQUEEZED.replace('"similarities": [0.607374, 0.843966], ', "")


@pytest.mark.parametrize("stats", [FULL, SQUEEZED, EARLY])
def test_what_is_read_is_written_again_byte_by_byte(tmp_path, stats):
    line = '{"index": 0, "pred": "é", "answers": ["a"], "all_classes": null, "length": 5, "of_old": [1], "stats": '
    line += f"{stats}}}\n"
    (tmp_path / "samsum.partial.jsonl").write_text(line, "utf-8")
    samples = Samples(tmp_path, "samsum", {}, 1, PredictedSample)
    samples.read()
    [record] = samples.records
    assert isinstance(record["stats"], SampleStats) and json.dumps(record["stats"].to_json()) == stats
    samples.publish()
    assert Path(tmp_path / "samples/samsum.jsonl").read_text("utf-8") == line
    assert "stats" not in (tmp_path / "samsum.jsonl").read_text("utf-8")


def test_the_summary_is_of_all_samples():
    layers = [([1, 3, 3], [9, 2, 1]), ([1, 2, 3], [8, 3, 1]), ([3, 3, 3], [4, 4, 4])]
    stats = [
        replace(measured(index + 1), new_tokens=index, peak_memory_bytes=7 - index, classes=classes, budgets=budgets)
        for index, (classes, budgets) in enumerate(layers)
    ]
    stats[1] = replace(stats[1], notes=["raised"])
    found = summarize(stats)
    assert found["samples"] == 3 and found["prompt_tokens"] == 27 and found["decode_seconds"] == 6.0
    assert found["tokens_per_second"] == round(1 / 6, 2), "the first token is the prefill's"
    assert found["peak_memory_bytes"] == 7
    assert found["layers_per_class"] == [round(fmean(c.count(k) for c, _ in layers), 2) for k in (1, 2, 3)]
    assert found["budgets"] == {"first": [9, 2, 1], "mean": [7.0, 3.0, 2.0]}
    assert found["classes"]["mean"] == [1.67, 2.67, 3.0]
    assert (found["samples_with_notes"], found["first_notes"]) == (1, ["raised"])
    assert not {"classes", "budgets", "layers_per_class", "first_notes"} & summarize([measured()]).keys()
