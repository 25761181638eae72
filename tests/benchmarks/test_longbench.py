"""LongBench's data sets, prompts and rows."""

import hashlib
import json
import zipfile

import huggingface_hub
import pytest
from tiny import LISTS, save_rows

from squeeze import InputError
from squeeze.benchmarks.longbench import data as longbench
from squeeze.benchmarks.longbench import download
from squeeze.benchmarks.longbench.data import (
    LONGBENCH_E,
    build_prompt,
    dataset_names,
    generation_lengths,
    load_data,
    prompt_formats,
)
from squeeze.benchmarks.registry import BENCHMARKS

#: For each data set: LongBench's generation length, and the start of the SHA-256 of its prompt, filled in with
#: `<CONTEXT>` and `<INPUT>`.
LONGBENCH = {
    "narrativeqa": (128, "d30e9866fa87e4ff"),
    "qasper": (128, "5f0cb53b41a4f90c"),
    "multifieldqa_en": (64, "f50a0d85cc38fc21"),
    "multifieldqa_zh": (64, "d66a51ab0630a63b"),
    "hotpotqa": (32, "3363c197ba8cd34f"),
    "2wikimqa": (32, "3363c197ba8cd34f"),
    "musique": (32, "3363c197ba8cd34f"),
    "dureader": (128, "00f31b630c79d7f4"),
    "gov_report": (512, "bb61fe287c499bfc"),
    "qmsum": (512, "fbf526aa0d2a0325"),
    "multi_news": (512, "32a90830c9c7c245"),
    "vcsum": (512, "645815e624639a4a"),
    "trec": (64, "6e95ca52cc8a5f71"),
    "triviaqa": (32, "cc3a8fbd62e63354"),
    "samsum": (128, "e98f5abe9f1c7603"),
    "lsht": (64, "8430137648fa6089"),
    "passage_count": (32, "a2dbb2e4c9d9c9ef"),
    "passage_retrieval_en": (32, "258ca81e5762f008"),
    "passage_retrieval_zh": (32, "226ae4c6fda223b5"),
    "lcc": (64, "2d39eeb17c128d30"),
    "repobench-p": (64, "fc7b65c61c556fd1"),
}


def test_all_prompts_and_lengths_are_longbenchs():
    row = {"context": "<CONTEXT>", "input": "<INPUT>", **LISTS}
    found = {
        dataset: (generation_lengths()[dataset], hashlib.sha256(build_prompt(dataset, row).encode()).hexdigest()[:16])
        for dataset in prompt_formats()
    }
    assert found == LONGBENCH


def test_the_samsum_prompt():
    row = {"context": "Dialogue: {A}\nSummary: B", "input": "Dialogue: C\nSummary: ", **LISTS}
    assert build_prompt("samsum", row) == (
        "Summarize the dialogue into a few short sentences. The following are some examples.\n\n"
        "Dialogue: {A}\nSummary: B\n\nDialogue: C\nSummary: "
    )


def test_dataset_names():
    assert dataset_names("samsum, trec,samsum") == ["samsum", "trec"]
    assert len(dataset_names("all")) == 21
    assert dataset_names("all", "e") == list(LONGBENCH_E)
    assert len(LONGBENCH_E) == 13
    with pytest.raises(InputError, match="unknown data set vcsum: LongBench-E has "):
        dataset_names("vcsum", "e")
    with pytest.raises(InputError, match="unknown data set samsun: LongBench has samsum"):
        dataset_names("samsun")
    with pytest.raises(InputError, match="names no data set"):
        dataset_names(" ,")


def test_local_rows(tmp_path):
    save_rows(tmp_path, count=2, context="a\u2028b {not a field}")
    path = tmp_path / "samsum.jsonl"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    data = load_data("samsum", str(tmp_path))
    assert [row["context"] for row in data.rows] == ["a\u2028b {not a field}"] * 2
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert data.origin == {"source": str(path), "revision": None, "sha256": digest, "rows": 2}
    assert data.settings["data_sha256"] == digest
    assert [BENCHMARKS["Long"].count(data, wanted) for wanted in (None, 1, 9)] == [2, 1, 2]


ROW = {"context": "c", "input": "i", **LISTS}


@pytest.mark.parametrize(
    ("second", "words"),
    [
        ("{", "line 2 is not JSON"),
        ('"text"', "line 2 is not a JSON object"),
        *[(json.dumps({k: v for k, v in ROW.items() if k != f}), f"line 2 has no field {f}") for f in ROW],
        (json.dumps(ROW | {"answers": "a"}), 'line 2: answers is not a list, got "a"'),
        (json.dumps(ROW | {"answers": [1]}), "line 2: answers[0] is not text, got 1"),
        (json.dumps(ROW | {"answers": []}), "line 2: answers is not a list of length >= 1, got []"),
        (json.dumps(ROW | {"all_classes": "a"}), 'line 2: all_classes is not a list or null, got "a"'),
        (json.dumps(ROW | {"all_classes": [1]}), "line 2: all_classes[0] is not text, got 1"),
        (json.dumps(ROW | {"dataset": "trec"}), "line 2 is a row of trec, not of samsum"),
        (json.dumps(ROW | {"dataset": []}), "line 2: dataset is not text or null, got []"),
        (json.dumps(ROW | {"length": "12"}), "line 2: length is not a whole number"),
        (json.dumps(ROW | {"context": None}), "line 2: context is not text"),
        (json.dumps(ROW | {"context": " \n", "input": ""}), "line 2: the prompt is empty"),
    ],
)
def test_bad_rows_are_named(tmp_path, second, words):
    path = tmp_path / "samsum.jsonl"
    path.write_text(f"{json.dumps(ROW)}\n{second}\n", encoding="utf-8")
    with pytest.raises(InputError) as error:
        load_data("samsum", str(tmp_path))
    assert str(error.value).startswith(str(path))
    assert words in str(error.value)


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(InputError, match=r"samsum\.jsonl is not there: .* has no \.jsonl file"):
        load_data("samsum", str(tmp_path))
    (tmp_path / "trec.jsonl").write_text("")
    with pytest.raises(InputError, match=r"is not there: .* has trec"):
        load_data("samsum", str(tmp_path))
    with pytest.raises(InputError, match=r"trec\.jsonl has no rows"):
        load_data("trec", str(tmp_path))


def test_rows_from_the_hub_are_read_from_its_zip(tmp_path, monkeypatch):
    archive = tmp_path / "f00d" / "data.zip"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("data/samsum.jsonl", json.dumps(ROW) + "\n")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda **file: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda **file: str(archive))
    data = load_data("samsum", None)
    assert data.rows == [ROW]
    assert (data.source, data.revision) == ("THUDM/LongBench/data/samsum.jsonl", "f00d")
    with pytest.raises(InputError, match=r"has no data/trec\.jsonl"):
        load_data("trec", None)


def test_longbench_e_has_files_of_its_own(tmp_path):
    save_rows(tmp_path, "samsum_e", count=1)
    assert load_data("samsum", str(tmp_path), "e").source == str(tmp_path / "samsum_e.jsonl")
    with pytest.raises(InputError, match=r"samsum\.jsonl is not there"):
        load_data("samsum", str(tmp_path))


def whole_archive(path, rows):
    """LongBench's zip file: `rows` of every data set, as many as published, or as many as `rows` says."""
    with zipfile.ZipFile(path, "w") as file:
        for name in [*prompt_formats(), *(f"{name}_e" for name in LONGBENCH_E)]:
            dataset = name.removesuffix("_e")
            row = ROW | ({"all_classes": ["a"]} if dataset in longbench.CLASSIFICATION else {})
            row |= {"answers": [longbench.PARAGRAPH.get(dataset, "answer ") + "1"]}
            count = rows.get(name, download.ROWS.get(dataset, 200))
            file.writestr(f"data/{name}.jsonl", (json.dumps(row) + "\n") * count)
    return path


def test_download_checks_every_row(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda **file: str(tmp_path / "data.zip"))
    whole_archive(tmp_path / "data.zip", {"samsum_e": 7})
    download.main(["download"])
    shown = capsys.readouterr().out
    assert shown.count(" rows, sha256 ") == 34
    assert "THUDM/LongBench/data/samsum_e.jsonl: 7 rows" in shown
    assert sum(download.ROWS.get(dataset, 200) for dataset in prompt_formats()) == 4750
    whole_archive(tmp_path / "data.zip", {"lcc": 499})
    with pytest.raises(InputError, match=r"lcc\.jsonl has 499 rows, and LongBench published 500"):
        download.main(["download"])
    with pytest.raises(InputError, match="invalid choice: 'upload'"):
        download.main(["upload"])


def test_demo_rows_are_of_every_data_set():
    for dataset in prompt_formats():
        data = load_data(dataset, "data/longbench")
        assert len(data.rows) >= 2
        assert all(row["_id"].startswith(f"demo-{dataset}-") for row in data.rows)


def test_without_network_and_local_data_it_says_how_to_get_them(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda **file: None)
    with pytest.raises(InputError, match=r"--data_dir FOLDER .*--data_dir data/longbench has"):
        load_data("samsum", None)
