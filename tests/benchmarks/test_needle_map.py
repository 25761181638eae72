"""The needle map: where its needles lie, what is compared, and the benchmark from end to end."""

import importlib
import json
import re
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT
from tiny import save_tiny, tiny_tokenizer

import pred
from squeeze import InputError
from squeeze.benchmarks.base import Options
from squeeze.benchmarks.registry import BENCHMARKS
from squeeze.benchmarks.ruler.benchmark import maker
from squeeze.benchmarks.ruler.niah import SINGULAR
from squeeze.benchmarks.ruler.tasks import NIAH
from squeeze.report import command as report
from squeeze.sweep import command as sweep

evaluate = importlib.import_module("eval")
MAP = BENCHMARKS["niah"]
FLAGS = ["--model", "tiny", "--pred", "niah", "--device", "cpu", "--dtype", "float32", "--sample_num", "2"]
WANTED = ["--lengths", "600,1200", "--depths", "0,40,100"]
SQUEEZE = ["--enable_squeeze", "--algorithm", "streaming", "--allocation", "uniform", "--ini_size", "0.4"]


def words(made):
    return len((made.question + made.prefix).split())


def samples(length=1024, depths="0,25,50,75,100", seed=42, haystack=None):
    data = MAP.read(f"niah-prose_{length}", None, haystack, depths)
    return maker(data, seed, words, length - data.asked.task.form.new_tokens)


def test_a_needle_lies_at_its_depth_in_the_same_prose():
    made = [samples()(index) for index in range(10)]
    before, after = NIAH.template.split("{context}")[0], "\nWhat is the special"
    for old, new in SINGULAR:
        before = before.replace(old, new)
    before = before.format(type_needle_v="number")
    for first in (0, 5):
        texts = []
        for depth, one in zip((0, 25, 50, 75, 100), made[first : first + 5], strict=True):
            assert one.question.startswith(before)
            context = one.question.removeprefix(before).split(after)[0]
            [needle] = re.findall(r"One of the special magic numbers for \S+ is: \d{7}\.", context)
            place = context.index(needle) / (len(context) - len(needle))
            assert abs(100 * place - depth) < 2
            assert one.answers == made[first].answers and needle.endswith(f" is: {one.answers[0]}.")
            texts.append(" ".join(context.replace(needle, "").split()))
        assert len(set(texts)) == 1, "only the place of the needle differs"


@pytest.mark.parametrize("length", [600, 1024])
def test_the_samples_of_a_round_are_equally_long(length, tokenizer):
    """Also where a tokenizer makes more of one place than of another."""
    data = MAP.read(f"niah-prose_{length}", None, None, "0,25,50,75,100")

    def count(made):
        return len(tokenizer(made.question + made.prefix).input_ids)

    make = maker(data, 42, count, length - 32)
    for number in range(12):
        made = [make(5 * number + place) for place in range(5)]
        assert max(map(count, made)) <= length - 32
        assert len({len(one.question.split()) for one in made}) == 1, number


def test_the_needles_of_rounds_differ():
    made = [samples()(index) for index in range(10)]
    assert made[0].answers != made[5].answers
    assert all(0 <= 1024 - 32 - words(one) < 30 for one in made), "as long as asked"


def test_a_sample_follows_from_length_seed_depths_and_number_alone():
    alone, first = samples()(7), samples()
    assert [first(index) for index in range(8)][7] == alone
    assert samples(seed=7)(7) != alone and samples(length=2048)(7) != alone
    identity = {MAP.read("niah-prose_1024", None, None, depths).sha256 for depths in (None, "0,50", "0,50,100")}
    assert len(identity) == 3 and MAP.read("niah-prose_1024", None, None, "0,25,50,75,100").sha256 in identity


def test_the_number_alone_is_compared():
    tokenizer = tiny_tokenizer()
    data = MAP.read("niah-prose_600", None, None, "50")
    prompts = MAP.encode(tokenizer, data, 3, Options(4096, "tiny"))
    number = max(len(tokenizer(f" {prompt.answers[0]}", add_special_tokens=False).input_ids) for prompt in prompts)
    assert {prompt.compared for prompt in prompts} == {number} and number < 32
    assert all(len(prompt.tokens) + 32 <= 600 for prompt in prompts)


@pytest.fixture
def place(tmp_path, monkeypatch):
    save_tiny(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_is_run_scored_and_drawn(place, capsys):
    for more in ([], SQUEEZE, [*SQUEEZE, "--fidelity"]):
        pred.main([*FLAGS, *WANTED, *more])
    folder = Path("pred_niah/tiny/uniform/0.4")
    rows = [json.loads(line) for line in (folder / "niah-prose_1200.jsonl").read_text().splitlines()]
    assert [row["depth"] for row in rows] == [0, 40, 100] * 2
    compared = [json.loads(line) for line in (folder / "fidelity/niah-prose_1200.jsonl").read_text().splitlines()]
    most = len(tiny_tokenizer()(" 1234567", add_special_tokens=False).input_ids)
    assert len(compared) == 6 and all(row["tokens"] <= most for row in compared)
    # More needles go on with what is there.
    pred.main([*FLAGS[:-1], "3", *WANTED, *SQUEEZE])
    assert len((folder / "niah-prose_1200.jsonl").read_text().splitlines()) == 9
    evaluate.main(["--model", "tiny", "--pred", "niah"])
    assert "mean: all" in capsys.readouterr().out
    for row, right in zip(rows, (1, 0, 1, 1, 0, 0), strict=True):
        row["pred"] = f"It is {row['answers'][0]}." if right else "no"
    full = Path("pred_niah/tiny/full")
    (full / "niah-prose_1200.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert report.main(["pred_niah", "--out", "report"]) == 0
    cells = pd.read_csv("report/needles.csv").set_index(["folder", "length", "depth"]).sort_index()
    found = cells.loc[str(full), 1200]
    assert found["score"].to_dict() == {0: 100, 40: 0, 100: 50} and set(found["needles"]) == {2}
    squeezed = cells.loc[str(folder), 1200]
    assert squeezed["kl"][40] == pytest.approx((compared[1]["kl"] + compared[4]["kl"]) / 2)
    assert set(squeezed["compared"]) == {2} and set(squeezed["needles"]) == {3}
    page = Path("report/index.html").read_text()
    assert "Fewest: 0% at 40% of 1200 tokens." in page and "1 broken" not in page
    assert len(list(Path("report").glob("needles-*.svg"))) == 2


def test_a_map_does_not_need_every_length(place, monkeypatch):
    """A length that is under way, or was cut off, leaves the others' maps as they are."""
    pred.main([*FLAGS, *WANTED])
    run = Path("pred_niah/tiny/full/run.json")
    manifest = json.loads(run.read_text())
    manifest["datasets"]["niah-prose_900"] = {"settings": {}, "starts": []}
    run.write_text(json.dumps(manifest))
    assert report.main(["pred_niah", "--out", "report"]) == 0
    assert set(pd.read_csv("report/needles.csv")["length"]) == {600, 1200}


def test_other_depths_are_another_run(place):
    pred.main([*FLAGS, "--lengths", "600", "--depths", "0,100"])
    with pytest.raises(InputError, match=r"holds niah-prose_600 with .*depths \[0.0, 100.0\] \(now \[50.0\]\)"):
        pred.main([*FLAGS, "--lengths", "600", "--depths", "50"])


def test_the_shipped_map_can_be_made(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert sweep.main(["config/needle_map.yaml", "--dry_run"]) == 0
    assert "pred_niah/SmolLM2-135M/snapkv/calibrated/0.2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--depths", "0,101"], "--depths must be percentages such as 0,50,100, got 0,101"),
        (["--depths", "middle"], "--depths must be percentages"),
        (["--depths", "nan"], "--depths must be percentages"),
        (["--lengths", "100"], "niah-prose_100's smallest prompt has .* tokens, and there is room for 68"),
        (["--lengths", "8192"], "niah-prose_8192 has prompts and answers of 8192 tokens, and the model has 4096"),
        (["--haystack", "none.txt"], "--haystack none.txt is not there"),
        (["--data_dir", "none"], "--data_dir none is no folder"),
        (["--datasets", "vt"], "--datasets is for --pred Long or e or ruler"),
    ],
)
def test_bad_input(place, flags, said):
    with pytest.raises(InputError, match=said):
        pred.main([*FLAGS, *flags])


def test_depths_are_for_the_map(place):
    with pytest.raises(InputError, match="--depths is for --pred niah"):
        pred.main(["--model", "tiny", "--pred", "ruler", "--depths", "50"])
