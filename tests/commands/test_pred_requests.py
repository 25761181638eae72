"""`pred.py --pred xsum` and `cnndm` on a tiny model: what it writes, how it goes on, and what bad input gets."""

import json
from pathlib import Path

import pytest
from tiny import TEXT, save_tiny
from transformers import AutoTokenizer

import pred
from squeeze import InputError
from squeeze.runs import folder as runs

SQUEEZE = ["--enable_squeeze", "--ini_size", "0.3", "--KV_class3", "0.126"]
FULL = Path("pred_xsum/tiny/full")
SQUEEZED = Path("pred_xsum/tiny/0.3/12.6")
HOT = {"max_tokens": 12, "temperature": 0.7, "top_p": 0.9, "n": 2, "stop": ["###"], "logprobs": 1}
COLD = {"max_tokens": 9, "temperature": 0, "stop": "e", "model": "gpt-neox-20b"}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with a tiny model and five requests, two of which want other settings than the rest."""
    save_tiny(tmp_path / "tiny", max_position_embeddings=1024)
    requests = [{"prompt": f"{number}. {TEXT * (1 + number % 3)}", **HOT} for number in range(3)]
    requests += [{"prompt": f"{number}. {TEXT}", **COLD} for number in range(3, 5)]
    (tmp_path / "data").mkdir()
    write(tmp_path / "data/xsum.jsonl", requests)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path, requests):
    path.write_text("".join(json.dumps({"request": one}) + "\n" for one in requests), "utf-8")


def predict(*flags, task="xsum"):
    pred.main(["--model", "tiny", "--pred", task, "--device", "cpu", "--dtype", "float32", *flags])


def read(path):
    return [json.loads(line) for line in Path(path).read_text("utf-8").split("\n")[:-1]]


def without_times(path):
    """Lines of a file of predictions, as text, but for how long they took."""
    found = read(path)
    for line in found:
        assert line["result"]["request_time"].pop("batch_time") > 0
        assert line["result"]["request_time"].pop("batch_size") > 0
    return [json.dumps(line) for line in found]


@pytest.mark.parametrize(("flags", "folder"), [([], FULL), (SQUEEZE, SQUEEZED)])
def test_every_request_gets_what_it_asks_for(place, flags, folder):
    predict(*flags)
    asked, found = read("data/xsum.jsonl"), read(folder / "xsum.jsonl")
    assert [line["request"] for line in found] == [line["request"] for line in asked]
    tokenizer = AutoTokenizer.from_pretrained("tiny")
    for line in found:
        request, result = line["request"], line["result"]
        assert set(result) == {"choices", "request_time"}
        assert len(result["choices"]) == request.get("n", 1)
        for choice in result["choices"]:
            logprobs = choice["logprobs"]
            tokens = logprobs["tokens"]
            assert "".join(tokens) == choice["text"]
            assert len(tokens) == len(logprobs["token_logprobs"]) == len(logprobs["top_logprobs"])
            assert all(value <= 0 for value in logprobs["token_logprobs"])
            assert choice["finish_reason"] in ("stop", "length", "endoftext")
            if choice["finish_reason"] == "length":
                assert len(tokens) == request["max_tokens"]
            assert not any(word in choice["text"] for word in request["stop"])
    sampled = [choice["text"] for line in found[:3] for choice in line["result"]["choices"]]
    assert len(set(sampled)) == 6
    stats = read(folder / "samples/xsum.jsonl")
    lengths = [len(tokenizer(line["request"]["prompt"], add_special_tokens=False).input_ids) for line in asked]
    assert [one["stats"]["prompt_tokens"] for one in stats] == [
        length * line["request"].get("n", 1) for length, line in zip(lengths, asked, strict=True)
    ]


def test_requests_of_unequal_settings_never_share_a_batch(place):
    predict()
    FULL.rename("alone")
    predict("--batch_size", "4")
    together = read(FULL / "xsum.jsonl")
    assert [line["result"]["request_time"]["batch_size"] for line in together] == [3, 3, 3, 2, 2]
    for line, alone in zip(together, read("alone/xsum.jsonl"), strict=True):
        for one, other in zip(line["result"]["choices"], alone["result"]["choices"], strict=True):
            assert (one["text"], one["finish_reason"]) == (other["text"], other["finish_reason"])
            assert one["logprobs"]["token_logprobs"] == pytest.approx(other["logprobs"]["token_logprobs"], abs=1e-3)


def test_a_run_that_was_interrupted_goes_on(place, monkeypatch):
    predict(*SQUEEZE, "--batch_size", "2")
    whole = without_times(SQUEEZED / "xsum.jsonl")
    SQUEEZED.rename("whole")
    append = runs.Samples.append

    def append_and_die(self, records):
        append(self, records)
        raise KeyboardInterrupt

    monkeypatch.setattr(runs.Samples, "append", append_and_die)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            predict(*SQUEEZE, "--batch_size", "2")
        assert not (SQUEEZED / "xsum.jsonl").exists()
    with (SQUEEZED / "xsum.partial.jsonl").open("a") as file:
        file.write('{"index": 4, "requ')
    monkeypatch.setattr(runs.Samples, "append", append)
    predict(*SQUEEZE, "--batch_size", "2")
    assert without_times(SQUEEZED / "xsum.jsonl") == whole
    starts = json.loads((SQUEEZED / "run.json").read_text())["datasets"]["xsum"]["starts"]
    assert [start["samples_done"] for start in starts] == [0, 2, 3]


def test_the_order_of_requests_makes_no_difference(place):
    predict()
    before = sorted(without_times(FULL / "xsum.jsonl"))
    FULL.rename("before")
    write(place / "data/xsum.jsonl", [line["request"] for line in read("data/xsum.jsonl")][::-1])
    predict()
    assert sorted(without_times(FULL / "xsum.jsonl")) == before


def test_another_file_of_requests_is_another_run(place):
    predict("--sample_num", "2")
    assert len(read(FULL / "xsum.jsonl")) == 2
    write(place / "mine.jsonl", [{"prompt": "Another", **COLD}])
    with pytest.raises(InputError, match="requests_sha256"):
        predict("--requests", "mine.jsonl")
    predict("--requests", "mine.jsonl", task="cnndm")
    [line] = read("pred_cnndm/tiny/full/cnndm.jsonl")
    assert line["request"]["prompt"] == "Another"


def test_agreement_with_the_full_cache(place):
    predict(*SQUEEZE, "--fidelity")
    found = json.loads((SQUEEZED / "fidelity/run.json").read_text())["datasets"]["xsum"]
    assert found["samples"] == 5
    assert 0 < found["kept"] < 0.4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompt": TEXT * 40}, "data/xsum.jsonl: prompt 1 has .* more than the model's 1024 positions: make the"),
        ({"prompt": ""}, "data/xsum.jsonl line 1 has no prompt"),
        ({"max_tokens": -1}, "data/xsum.jsonl line 1: max_tokens is not a whole number >= 0, got -1"),
    ],
)
def test_a_request_that_cannot_be_answered(place, change, said):
    write(place / "data/xsum.jsonl", [{"prompt": TEXT, **COLD, **change}])
    with pytest.raises(InputError, match=said):
        predict()
    assert not (FULL / "xsum.jsonl").exists()


@pytest.mark.parametrize("line", ["{", '{"prompt": "Hi"}', '{"request": 5}', "[]"])
def test_a_line_that_is_no_request(place, line):
    (place / "data/xsum.jsonl").write_text(line + "\n")
    with pytest.raises(InputError, match=r"data/xsum\.jsonl"):
        predict()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--requests", "none.jsonl"], "none.jsonl are not there: python -m squeeze.helm_requests --scenario xsum"),
        (["--datasets", "samsum"], "--datasets"),
        (["--data_dir", "data"], "--data_dir"),
        (["--temperature", "0.5"], "--temperature"),
        (["--sample_num", "0"], "--sample_num must be"),
    ],
)
def test_bad_flags(place, flags, said):
    with pytest.raises(InputError, match=said):
        predict(*flags)
    assert not list(place.glob("pred_xsum"))
