"""Run folders, and runs that are interrupted at any byte and go on."""

import json
import os
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_runs import measured

from squeeze import InputError, SqueezeConfig
from squeeze.benchmarks.records import PredictedSample
from squeeze.runs.folder import Run, cache_settings, check_count, run_folder, versions
from squeeze.runs.samples import Samples

SETTINGS = {"dtype": "float32", "ini_size": 0.2}
DATA = {"data_sha256": "0"}


def config(ini_size="0.21", kv_class3="0.08", **more):
    return SqueezeConfig(ini_size=ini_size, kv_class3=kv_class3, **more)


@pytest.mark.parametrize(
    ("settings", "model_type", "seed", "folder"),
    [
        (config(), "mistral", 42, "0.21/8"),
        (config(algorithm="sliding_window"), "mistral", 42, "0.21/8"),
        (config(algorithm="sliding_window"), "llama", 42, "sliding_window/0.21/8"),
        (config(algorithm="h2o", allocation="squeeze-log"), "mistral", 42, "h2o/squeeze-log/0.21/8"),
        (config("0.3", "0.126", allocation="paper"), "llama", 7, "paper/seed-7/0.3/12.6"),
        (config("1", "1.0"), "llama", 42, "1/100"),
        (None, "llama", 42, "full"),
        (None, "llama", 1, "seed-1/full"),
    ],
)
def test_run_folder(settings, model_type, seed, folder):
    assert run_folder("Long", "M", settings, model_type, seed) == Path("pred_Long/M") / folder


@given(st.integers(1, 1000).flatmap(lambda ini: st.tuples(st.just(ini), st.integers(1, ini))))
def test_run_folder_prints_the_decimals_that_were_typed(thousandths):
    ini_size, kv_class3 = (f"{value / 1000:.3f}" for value in thousandths)
    folder = run_folder("Long", "M", config(ini_size, kv_class3), "llama")
    assert Fraction(folder.parent.name) == Fraction(ini_size)
    assert Fraction(folder.name) == 100 * Fraction(kv_class3)


def test_settings_name_what_changes_results():
    streaming, window = config(algorithm="streaming"), config(algorithm="sliding_window")
    assert cache_settings(streaming)["start_size"] == 4
    assert "start_size" not in cache_settings(window)
    assert cache_settings(None) == {"cache": "full"}
    assert {"python", "torch", "transformers", "numpy", "scikit-learn", "git"} <= set(versions())


def sample(index):
    return {"pred": f"résumé {index}\u2028\n", "answers": ["a"], "all_classes": None, "length": index}


def record(index):
    return {"index": index, **sample(index), "stats": measured(index)}


def go_on(folder, total, stop=None, **flags):
    """Run the missing ones of `total` samples, all or the first `stop` of them; returns the run and its samples."""
    with Run(folder, flags.pop("settings", SETTINGS), {"command": "pred"}, **flags) as run:
        samples = run.open("samsum", DATA, total)
        if not samples.complete:
            run.start(samples)
            for index in samples.missing[:stop]:
                samples.append([record(index)])
        if not samples.missing and not samples.complete:
            run.finish(samples, lambda stats: {"samples": len(stats)})
    return run, samples


def test_a_finished_run(tmp_path):
    folder = tmp_path / "run"
    go_on(folder, 3)
    lines = (folder / "samsum.jsonl").read_text("utf-8").split("\n")
    assert [json.loads(line) for line in lines[:-1]] == [sample(index) for index in range(3)]
    assert "résumé" in lines[0]
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "run.json", "samples", "samsum.jsonl"]
    manifest = json.loads((folder / "run.json").read_text("utf-8"))
    assert manifest["settings"] == SETTINGS
    assert manifest["datasets"]["samsum"]["samples"] == 3
    check_count(folder, "samsum", 3)
    with pytest.raises(InputError, match=r"samsum\.jsonl has 2 lines, but run\.json counts 3"):
        check_count(folder, "samsum", 2)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_run_cut_at_any_byte_gives_the_same_file(tmp_path_factory, data):
    total = data.draw(st.integers(1, 5))
    folder = tmp_path_factory.mktemp("runs") / "run"
    for _ in range(data.draw(st.integers(0, 3))):
        go_on(folder, total, stop=data.draw(st.integers(0, total)))
        partial = folder / "samsum.partial.jsonl"
        if partial.exists():
            content = partial.read_bytes()
            partial.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    _, samples = go_on(folder, total)
    assert samples.complete
    expected = "".join(json.dumps(sample(index), ensure_ascii=False) + "\n" for index in range(total))
    assert (folder / "samsum.jsonl").read_bytes() == expected.encode()
    assert [record["stats"].decode_seconds for record in samples.records] == list(range(total))


def test_a_finished_run_is_left_alone(tmp_path):
    go_on(tmp_path, 3)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.json*")}
    for total in (3, 2):
        _, samples = go_on(tmp_path, total)
        assert samples.complete
        assert {path: path.read_bytes() for path in tmp_path.rglob("*.json*")} == before


def test_more_samples_extend_a_run_and_drop_its_score(tmp_path):
    go_on(tmp_path, 2)
    (tmp_path / "result.json").write_text("{}")
    go_on(tmp_path, 4, stop=1)
    assert not (tmp_path / "samsum.jsonl").exists()
    assert not (tmp_path / "result.json").exists()
    _, samples = go_on(tmp_path, 4)
    assert [record["length"] for record in samples.records] == [0, 1, 2, 3]


def test_other_settings_are_refused_with_the_difference(tmp_path):
    go_on(tmp_path, 2)
    other = SETTINGS | {"dtype": "bfloat16"}
    with pytest.raises(InputError, match=r"dtype float32 \(now bfloat16\): --overwrite"):
        Run(tmp_path, other, {})
    with pytest.raises(InputError, match=r"samsum with data_sha256 0 \(now 1\): --overwrite"):
        Run(tmp_path, SETTINGS, {}).open("samsum", {"data_sha256": "1"}, 2)
    go_on(tmp_path, 1, settings=other, overwrite=True)
    assert json.loads((tmp_path / "run.json").read_text("utf-8"))["settings"] == other
    assert len((tmp_path / "samsum.jsonl").read_text("utf-8").split("\n")) == 2


def test_overwrite_with_the_same_settings_spares_other_data_sets(tmp_path):
    go_on(tmp_path, 2)
    with Run(tmp_path, SETTINGS, {}) as run:
        qmsum = run.open("qmsum", DATA, 1)
        run.start(qmsum)
        qmsum.append([record(0)])
        run.finish(qmsum, lambda stats: {"samples": len(stats)})
    _, samples = go_on(tmp_path, 1, overwrite=True)
    assert len(samples.records) == 1
    assert qmsum.published.exists()
    assert set(json.loads((tmp_path / "run.json").read_text("utf-8"))["datasets"]) == {"samsum", "qmsum"}


def test_what_was_not_written_by_a_run_is_refused(tmp_path):
    (tmp_path / "samsum.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match=r"run\.json does not know"):
        go_on(tmp_path, 1)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(InputError, match=r"run\.json line 1 is not JSON: --overwrite replaces the run"):
        go_on(tmp_path, 1)
    go_on(tmp_path, 1, overwrite=True)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[" * 100_000, "run.json has lists or objects more than 100 deep"),
        ("{}", "run.json has no field settings"),
        ('{"settings": {}, "datasets": {"samsum": 5}}', "run.json: datasets.samsum is not a JSON object, got 5"),
        (
            '{"settings": {}, "datasets": {"samsum": {"settings": {}, "starts": [5]}}}',
            r"run.json: datasets.samsum.starts\[0\] is not a JSON object, got 5",
        ),
        (
            '{"settings": {"seed": 1e400}, "datasets": {}}',
            "run.json: settings.seed is 1e400, which is out of the range",
        ),
    ],
)
def test_a_damaged_manifest_is_named_and_can_be_replaced(tmp_path, content, said):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(InputError, match=f"{said}.*: --overwrite replaces the run"):
        go_on(tmp_path, 1)
    go_on(tmp_path, 1, overwrite=True)
    check_count(tmp_path, "samsum", 1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"index": "0"}, 'line 1: index is not a whole number, got "0"'),
        ({"index": -1}, "line 1: index is not a whole number >= 0, got -1"),
        ({"index": True}, "line 1: index is not a whole number, got true"),
        ({"stats": []}, r"line 1: stats is not a JSON object, got \[\]"),
        ({"pred": None}, "line 1: pred is not text, got null"),
        ({"answers": []}, r"line 1: answers is not a list of length >= 1, got \[\]"),
    ],
)
def test_a_damaged_sample_is_named(tmp_path, change, said):
    go_on(tmp_path, 2, stop=1)
    partial = tmp_path / "samsum.partial.jsonl"
    partial.write_text(json.dumps(json.loads(partial.read_text()) | change) + "\n")
    with pytest.raises(InputError, match=f"samsum.partial.jsonl {said}"):
        go_on(tmp_path, 2)


def test_samples_of_other_layers_are_refused(tmp_path):
    layers = {"classes": [1, 3], "budgets": [9, 5], "notes": []}
    numbers = dict.fromkeys(("prompt_tokens", "new_tokens", "prefill_seconds", "decode_seconds"), 1)
    numbers |= dict.fromkeys(("kv_bytes", "full_kv_bytes", "state_bytes", "peak_memory_bytes"), 1)
    for other in ({}, {"classes": [1], "budgets": [9], "notes": []}, layers | {"budgets": [9]}):
        rows = [record(0) | {"stats": numbers | layers}, record(1) | {"stats": numbers | other}]
        (tmp_path / "samsum.partial.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        samples = Samples(tmp_path, "samsum", {}, 2, PredictedSample)
        with pytest.raises(InputError, match=r"samsum\.partial\.jsonl has samples of [01] and 2 layers"):
            samples.read()


def test_samples_beyond_those_asked_for_are_kept(tmp_path):
    go_on(tmp_path, 4, stop=3)
    _, samples = go_on(tmp_path, 2)
    assert [one["index"] for one in samples.records] == [0, 1, 2] and samples.complete


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    go_on(tmp_path, 3, stop=2)
    partial = tmp_path / "samsum.partial.jsonl"
    partial.write_bytes(b"{broken\n" + partial.read_bytes())
    with pytest.raises(InputError, match=r"samsum\.partial\.jsonl line 1 is not JSON"):
        go_on(tmp_path, 3)


def test_a_second_process_is_told_who_writes(tmp_path):
    with Run(tmp_path, SETTINGS, {}) as first:
        samples = first.open("samsum", DATA, 2)
        late = Run(tmp_path, SETTINGS, {})
        late_samples = late.open("samsum", DATA, 2)
        first.start(samples)
        with pytest.raises(InputError, match=f"is being written by process {os.getpid()} on "):
            late.start(late_samples)
        samples.append([record(0)])
    late.start(late_samples)  # the first was killed, and what it wrote meanwhile counts
    assert late_samples.missing == [1]
    late.close()


def test_a_sample_that_is_there_twice_is_refused(tmp_path):
    go_on(tmp_path, 2, stop=1)
    partial = tmp_path / "samsum.partial.jsonl"
    partial.write_bytes(partial.read_bytes() * 2)
    with pytest.raises(InputError, match="has a sample twice"):
        go_on(tmp_path, 2)


def test_nothing_is_written_before_the_start(tmp_path):
    folder = tmp_path / "run"
    Run(folder, SETTINGS, {}).open("samsum", DATA, 3)
    assert not folder.exists()


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write into"):
        go_on(tmp_path / "file" / "run", 1)


def test_a_chat_template_that_an_earlier_version_did_not_note(tmp_path):
    """Such a run goes on, and notes it from then on; one that did note it is another run with another template."""
    go_on(tmp_path, 3, stop=1, settings={"chat": True})
    go_on(tmp_path, 3, stop=2, settings={"chat": True, "chat_template": "a"})
    with pytest.raises(InputError, match=r"chat_template a \(now b\)"):
        Run(tmp_path, {"chat": True, "chat_template": "b"}, {})
