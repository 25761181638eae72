"""RULER: prompts as RULER's own code makes them, its scores, and the benchmark from end to end.

Numbers and hashes of prompts were written down from what RULER's own scripts gave with a tokenizer that takes words
for tokens. What chance decides on (names, values, places) is taken out of a prompt before it is hashed.
"""

import hashlib
import importlib
import json
import re
from collections import Counter
from pathlib import Path

import pytest
from tiny import save_tiny, tiny_tokenizer

import pred
from squeeze import InputError
from squeeze.benchmarks.base import Options
from squeeze.benchmarks.registry import BENCHMARKS
from squeeze.benchmarks.ruler.benchmark import maker, score
from squeeze.benchmarks.ruler.tasks import TASKS, Asked
from squeeze.benchmarks.ruler.texts import Texts

evaluate = importlib.import_module("eval")
RULER = BENCHMARKS["ruler"]
OFFLINE = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe")

#: Of RULER's own prompts, by task and length.
HASHES = {
    "niah_single_1": {1024: "a7250fafd09d0d1a", 4096: "a09cab467a2119fd", 8192: "4194faaa5bce7f19"},
    "niah_multikey_3": {1024: "b7dcb9202ebdc674", 4096: "2cdf3d81b85f131c", 8192: "09ebe074bdd54e89"},
    "vt": {1024: "a28bdf08078f117a", 4096: "4c73d927d6a32b61", 8192: "0f0a86466a18b4a6"},
    "fwe": {1024: "b9dbec070eed5648", 4096: "bd39bfb4aa8b009e", 8192: "dca4f1b374d8ac61"},
}
#: SHA-256 of each family's template, answer prefix and number of new tokens in RULER's constants.py.
FORMS = {
    "niah_single_1": "3e434381858ad2d1",
    "vt": "f7fba7cf687bbfca",
    "cwe": "b06b6a24b79e6df7",
    "fwe": "fa18bb8299a73812",
    "qa_1": "cf78291f1c925319",
}


def words(made):
    return len((made.question + made.prefix).split())


def samples(name, length, seed=42, count=words, **location):
    data = RULER.read(f"{name}_{length}", location.get("data_dir"), location.get("haystack"))
    return maker(data, seed, count, length - data.asked.task.form.new_tokens)


def without_chance(task, text):
    """A prompt's hash without names, values and places."""
    if task.startswith("niah"):
        text = re.sub(
            r"One of the special magic (\w+) for .+ is: .+\.", r"One of the special magic \1 for K is: V.", text
        )
        text = re.sub(r"(special magic \w+) for [^\n]+? mentioned", r"\1 for K mentioned", text)
        lines = text.split("\n")
        needles = [line for line in lines if line.startswith("One of")]
        text = "\n".join([line for line in lines if line not in needles] + needles)
    elif task == "vt":
        text = re.sub(r"\b[A-Z]{5}\b", "X", re.sub(r"\b[A-Z]{3}\b(?! [A-Z]+ =)", "X", text.replace("VAR", "var")))
        text = re.sub(r"[0-9]{5}", "N", text)
        text = "\n".join(line for line in text.split("\n") if not line.startswith("var "))
    else:
        coded = re.search(r"coded words\. (.*)\n", text)[1]
        text = text.replace(coded, "W") + str(sorted(Counter(coded.split()).values()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@pytest.mark.parametrize("name", FORMS)
def test_templates_are_rulers_to_the_character(name):
    form = TASKS[name].form
    whole = json.dumps([form.template, form.prefix, form.new_tokens])
    assert hashlib.sha256(whole.encode()).hexdigest()[:16] == FORMS[name]


@pytest.mark.parametrize(("name", "length"), [(name, length) for name in HASHES for length in HASHES[name]])
def test_prompts_have_rulers_parts_and_lengths(name, length):
    made = samples(name, length)(0)
    assert without_chance(name, made.question + made.prefix) == HASHES[name][length]


@pytest.mark.parametrize(("length", "listed"), [(1024, 354), (4096, 1740), (8192, 3786)])
def test_a_list_of_common_words_is_as_long_as_rulers(length, listed):
    """Some words of the package are two, so that lists differ by a few."""
    made = samples("cwe", length)(0)
    shown = made.question.split("Below is a numbered list")[-1].split("\nQuestion:")[0]
    items = re.findall(r"(?:(?<=\s))\d+\. ([^0-9]+?)(?= \d+\. |$)", shown)
    assert abs(len(items) - listed) <= 0.02 * listed
    counts = Counter(items)
    often, seldom = (30, 3) if length >= 4096 else (6, 1)
    assert len(made.answers) == 10 and all(counts[word] == often for word in made.answers)
    assert {counts[word] for word in counts if word not in made.answers} == {seldom}
    assert words(made) + 120 <= length


def test_scores_are_rulers():
    """240 predictions with what RULER's own functions give: case, control characters, digits and letters of others."""
    cases = json.loads(Path(__file__).with_name("ruler_scores.json").read_text("utf-8"))
    assert len(cases) >= 200
    for case in cases:
        assert round(100 * score(TASKS[case["task"]], case["pred"], case["answers"]), 2) == case["score"], case


@pytest.mark.parametrize("name", OFFLINE)
def test_a_sample_follows_from_task_length_seed_and_number_alone(name):
    first, again, other = samples(name, 1024), samples(name, 1024), samples(name, 1024, seed=7)
    third = again(3)  # before the others were made
    assert first(3) == third and first(0) != third and other(3) != third
    assert samples(name, 2048)(3) != third


@pytest.mark.parametrize("name", [name for name in TASKS if name.startswith("niah")])
def test_the_answers_are_in_the_text_and_the_question_asks_for_them(name):
    task = TASKS[name]
    for number in range(3):
        made = samples(name if task.haystack != "essay" else f"{name}-prose", 2048)(number)
        assert len(made.answers) == task.values * task.queries
        for answer in made.answers:
            [line] = re.findall(rf"One of the special magic {task.value} for ([^.]+) is: {answer}\.", made.question)
            assert re.search(rf"(for|,|and) {re.escape(line)}(,| mentioned)", made.question.rsplit("\n", 1)[1])
        several = task.values * task.queries > 1
        assert made.question.startswith("Some special magic" if several else "A special magic")
        assert made.prefix.endswith(" are" if several else " is")
        assert 2048 - 700 < words(made) + 128 <= 2048


def test_a_chain_is_followed_to_its_end():
    made = samples("vt", 2048)(1)
    text = made.question.split("Memorize and track")[-1]
    value = re.search(r"assigned the value (\d+) in", text)[1]
    names = re.findall(rf"VAR ([A-Z]+) = {value}", text)
    for name, before in re.findall(r"VAR ([A-Z]+) = VAR ([A-Z]+)", text):
        assert before == names[-1]
        names.append(name)
    assert names == made.answers and len(names) == 5
    example = made.question.split("Memorize and track")[1]
    assert example.rstrip().split()[-5:] == re.findall(r"VAR ([A-Z]+) = ", example), "solved"


@pytest.mark.parametrize("seed", range(6))
def test_lengths_are_found_whatever_chance_brings(seed):
    """A list of common words is long beside its parts, and two that were drawn differ: no line goes through them."""
    made = samples("cwe", 8192, seed, count=lambda made: len(made.question + made.prefix) // 4)(0)
    assert 0.9 * 8192 < len(made.question + made.prefix) // 4 + 120 <= 8192


def test_coded_words_are_the_most_frequent():
    made = samples("fwe", 2048)(0)
    counts = Counter(re.search(r"coded words\. (.*)\n", made.question)[1].split())
    assert [word for word, _ in counts.most_common(4)] == ["...", *made.answers]


def test_questions_are_read_from_rulers_files(tmp_path):
    documents = [f"Article {number} is about the colour {number}. " * 6 for number in range(40)]
    squad = {"data": [{"paragraphs": []}, {"paragraphs": []}]}
    for number, text in enumerate(documents):
        asked = {
            "question": f"Which colour is {number}?",
            "answers": [{"text": f"colour {number}"}],
            "is_impossible": False,
        }
        never = {"question": "?", "answers": [], "is_impossible": True}
        squad["data"][number % 2]["paragraphs"].append({"context": text, "qas": [never, asked]})
    (tmp_path / "squad.json").write_text(json.dumps(squad))
    made = samples("qa_1", 1024, data_dir=str(tmp_path))(3)
    assert made.answers == ["colour 6"] and "Question: Which colour is 6?" in made.question
    assert documents[6] in made.question and made.question.count("Document ") > 10
    assert (
        RULER.asked({"datasets": "all", "lengths": None, "data_dir": str(tmp_path), "haystack": None})[-1]
        == "qa_1_4096"
    )
    hotpot = [
        {"question": "Who?", "answer": "Ann", "context": [["Ann", ["She ", "sings."]], ["Bob", ["He does not."]]]}
    ]
    (tmp_path / "hotpotqa.json").write_text(json.dumps(hotpot))
    made = samples("qa_2", 1024, data_dir=str(tmp_path))(0)
    assert made.answers == ["Ann"] and "Ann\nShe sings." in made.question
    with pytest.raises(InputError, match="has 1 questions: take --sample_num 1 at most"):
        samples("qa_2", 1024, data_dir=str(tmp_path))(1)
    (tmp_path / "squad.json").write_text('{"data": 3}')
    with pytest.raises(InputError, match=r"squad\.json is not what RULER's"):
        samples("qa_1", 1025, data_dir=str(tmp_path))


def test_prose_of_ones_own_is_in_the_name(tmp_path):
    (tmp_path / "my book.txt").write_text("It was a day. " * 40 + "And then it ended! " * 200)
    asked = {"datasets": "niah_single_2,vt", "lengths": "2048,4096", "data_dir": None}
    haystack = str(tmp_path / "my book.txt")
    names = RULER.asked(asked | {"haystack": haystack})
    assert names == ["niah_single_2-mybook_2048", "vt_2048", "niah_single_2-mybook_4096", "vt_4096"]
    assert "And then it ended!" in samples("niah_single_2-mybook", 2048, haystack=haystack)(0).question
    (tmp_path / "PaulGrahamEssays.json").write_text(json.dumps({"text": "Essays have words. " * 300}))
    assert RULER.asked(asked | {"haystack": None, "data_dir": str(tmp_path)})[0] == "niah_single_2_2048"
    identities = {
        RULER.read(names[0], None, path).sha256 for path in (haystack, str(tmp_path / "PaulGrahamEssays.json"))
    }
    assert len(identities) == 2, "other prose is another run"


@pytest.fixture
def place(tmp_path, monkeypatch):
    save_tiny(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    return tmp_path


FLAGS = ["--model", "tiny", "--pred", "ruler", "--device", "cpu", "--dtype", "float32", "--sample_num", "2"]
SQUEEZE = ["--enable_squeeze", "--ini_size", "0.4", "--KV_class3", "0.4"]


def test_it_is_run_scored_and_compared(place, capsys):
    wanted = ["--datasets", "niah_single_1,fwe", "--lengths", "1500,2000", "--batch_size", "2"]
    for more in ([], SQUEEZE, [*SQUEEZE, "--fidelity"]):
        pred.main([*FLAGS, *wanted, *more])
    tokenizer = tiny_tokenizer()
    for path in Path("pred_ruler/tiny/full").glob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        asked = Asked.read(path.stem)
        assert all(asked.length - 250 < row["length"] + asked.task.form.new_tokens <= asked.length for row in rows)
        again = samples(
            asked.name, asked.length, count=lambda made: len(tokenizer(made.question + made.prefix).input_ids)
        )
        assert [row["answers"] for row in rows] == [again(number).answers for number in range(2)]
    capsys.readouterr()
    evaluate.main(["--model", "tiny", "--pred", "ruler"])
    shown = capsys.readouterr().out
    assert "mean: 1500 tokens" in shown and "mean: all" in shown
    assert list(json.loads(Path("pred_ruler/tiny/full/result.json").read_text())) == [
        f"{name}_{length}" for length in (1500, 2000) for name in ("niah_single_1", "fwe")
    ]
    evaluate.main(["--compare", "pred_ruler/tiny/full", "pred_ruler/tiny/0.4/40", "--datasets", "fwe"])
    shown = capsys.readouterr().out
    assert "fwe_1500" in shown and "fwe_2000" in shown and "niah" not in shown and "run 2 - run 1" in shown
    kept = json.loads(Path("pred_ruler/tiny/0.4/40/run.json").read_text())["datasets"]["fwe_1500"]["kept"]
    assert kept == pytest.approx(0.4, abs=0.01)


def test_a_chat_prompt_ends_in_the_answers_beginning():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<user>{{ m.content }}</user>{% endfor %}<assistant>"
    data = RULER.read("niah_single_1_1500", None, None)
    [prompt] = RULER.encode(tokenizer, data, 1, Options(4096, "tiny", chat=True))
    text = tokenizer.decode(prompt.tokens)
    assert text.startswith("<user>A special magic number")
    assert re.search(
        r"text\?</user><assistant> The special magic number for .* mentioned in the provided text is$", text
    )
    assert len(prompt.tokens) + 128 <= 1500


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--datasets", "niah"], "unknown data set niah: RULER has niah_single_1"),
        (["--lengths", "4k"], "--lengths must be numbers of tokens such as 4096,8192, got 4k"),
        (["--lengths", "100"], "smallest prompt has .* tokens, and there is room for 0"),
        (["--lengths", "8192"], "niah_single_1_8192 has prompts and answers of 8192 tokens, and the model has 4096"),
        (["--datasets", "qa_1"], r"squad\.json is not there: RULER's download_qa_dataset\.sh"),
        (["--datasets", "niah_single_2", "--haystack", "none.txt"], "--haystack none.txt is not there"),
        (["--datasets", "niah_single_2", "--haystack", "short.txt"], "is no haystack: it has 3 words"),
        (["--datasets", "cwe", "--lengths", "900000", "--model", "long"], "needs more different words than the"),
        (["--data_dir", "none"], "--data_dir none is no folder"),
        (["--haystack", "short.txt"], "--haystack is for tasks with prose, and niah_single_1_4096 have none"),
        (["--requests", "r.jsonl"], "--requests is for --pred xsum or cnndm"),
    ],
)
def test_bad_input(place, flags, said):
    Path("short.txt").write_text("three short words")
    if "long" in flags:
        save_tiny(place / "long", max_position_embeddings=1_000_000)
    with pytest.raises(InputError, match=said):
        pred.main([*FLAGS, *flags])


def test_files_that_are_not_there_are_not_scored(place):
    pred.main([*FLAGS, "--datasets", "fwe", "--lengths", "1500"])
    for wanted in ("cwe", "fwe,typo", "fwe_4096"):
        with pytest.raises(InputError, match=r"has no predictions of .*: there are fwe_1500"):
            evaluate.main(["--model", "tiny", "--pred", "ruler", "--datasets", wanted])
    assert not Path("pred_ruler/tiny/full/result.json").exists()


def test_flags_of_ruler_are_for_ruler(place):
    with pytest.raises(InputError, match="--lengths is for --pred ruler or niah: with --pred xsum the requests"):
        pred.main(["--model", "tiny", "--pred", "xsum", "--lengths", "4096"])
    with pytest.raises(InputError, match="--lengths is for --pred ruler or niah"):
        pred.main(["--model", "tiny", "--pred", "Long", "--lengths", "4096"])


def test_what_is_no_data_set_is_a_sentence():
    for name in ("vt", "vt_4k", "nothing_4096", "_4096", "vt_٤"):
        with pytest.raises(InputError, match="unknown data set"):
            Asked.read(name)
    assert Texts().prose_name == "prose"
