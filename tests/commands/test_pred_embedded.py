"""`pred.py` and `eval.py` on the embedded model: every data set, and an answer that makes sense."""

import json
from pathlib import Path

import pytest
from conftest import ROOT
from tiny import save_rows

import eval
import pred
from squeeze.benchmarks.longbench.data import generation_lengths
from squeeze.models import sources


def test_every_data_set_on_the_embedded_model(tmp_path, monkeypatch):
    """A demo row of each, as pred.py and eval.py run them; only prompts and answers are cut short."""
    for dataset, length in generation_lengths().items():
        monkeypatch.setitem(generation_lengths(), dataset, min(length, 5))
    monkeypatch.setattr(sources, "prompt_limit", lambda source, config: (360, None))
    monkeypatch.chdir(tmp_path)
    flags = ["--model", "SmolLM2-135M", "--pred", "Long", "--ini_size", "0.3", "--KV_class3", "0.2"]
    rows = ["--datasets", "all", "--data_dir", str(ROOT / "data/longbench"), "--sample_num", "1"]
    pred.main([*flags, *rows, "--enable_squeeze", "--device", "cpu", "--chat"])
    eval.main(flags)
    folder = Path("pred_Long/SmolLM2-135M/0.3/20")
    scores = json.loads((folder / "result.json").read_text())
    assert list(scores) == list(generation_lengths())
    assert all(0 <= score <= 100 for score in scores.values())
    detail = json.loads((folder / "result_detail.json").read_text())
    assert detail["left_out"] == {}
    assert "all" in detail["groups"]
    summaries = json.loads((folder / "run.json").read_text())["datasets"]
    for dataset in generation_lengths():
        found = summaries[dataset]
        assert found["prompt_tokens"] > 300
        assert found["kept"] == pytest.approx(0.3, abs=0.01)


def test_the_embedded_model_end_to_end(tmp_path, monkeypatch):
    """The published command on a real model, which answers the third time as it was shown twice, and stops there."""
    assert (ROOT / "models/SmolLM2-135M-Mistral").is_dir(), "the model is missing: bash script/setup.sh makes it"
    dialogue = "Dialogue: Ann: hey, did you get the tickets?\r\nBob: no :( they were sold out\nSummary: "
    shown = f"{dialogue}Bob did not get the tickets.\n"
    save_rows(tmp_path / "data", count=1, context=shown * 2, input=dialogue)
    monkeypatch.chdir(tmp_path)
    flags = ["--model", "SmolLM2-135M-Mistral", "--pred", "Long", "--device", "cpu", "--dtype", "float32"]
    sizes = ["--ini_size", "0.9", "--KV_class3", "0.8"]
    pred.main([*flags, "--data_dir", "data", "--enable_squeeze", "--model_arch", "Mistral", *sizes])
    line = json.loads(Path("pred_Long/SmolLM2-135M-Mistral/0.9/80/samsum.jsonl").read_text())
    assert line["pred"].strip() == "Bob did not get the tickets."
