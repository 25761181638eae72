"""HELM from end to end, through the real `helm-run` and `helm-summarize`, with a network that cannot be reached."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from rouge_score.rouge_scorer import RougeScorer
from tiny import save_tiny

import pred
from squeeze import InputError
from squeeze.helm import environment as helm_env
from squeeze.helm import requests as helm_requests
from squeeze.helm import score as helm_score
from squeeze.report import command as report

ROOT = Path(__file__).parents[2]
ARTICLES = "data/xsum/articles.jsonl"

#: Python imports this first: every attempt to look up a host fails and is noted.
NO_NETWORK = """
import os, socket
def refuse(host, *rest, **more):
    with open(os.environ["LOOKUPS"], "a") as file:
        file.write(f"{host}\\n")
    raise socket.gaierror("no network in this test")
socket.getaddrinfo = refuse
"""


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A folder in which `script/helm_demo.sh` has run on two articles, and what it printed."""
    place = tmp_path_factory.mktemp("demo")
    for name in (".venv", "models", "squeeze", "config", "script", "data", "pred.py"):
        (place / name).symlink_to(ROOT / name)
    for path in ROOT.glob("requirements*.txt"):
        (place / path.name).symlink_to(path)
    (place / "offline").mkdir()
    (place / "offline/sitecustomize.py").write_text(NO_NETWORK)
    environment = os.environ | {
        "PYTHONPATH": str(place / "offline"),
        "LOOKUPS": str(place / "lookups"),
        "HF_HUB_OFFLINE": "1",
        "sample_num": "2",
        "TQDM_DISABLE": "1",
    }
    command = ["bash", str(place / "script/helm_demo.sh")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return place, done.stdout


@pytest.fixture
def there(demo, monkeypatch):
    monkeypatch.chdir(demo[0])
    return demo[0]


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A working directory with a tiny model, six short articles, and a request for the last of them."""
    save_tiny(tmp_path / "tiny", max_position_embeddings=8192)
    rows = [{"document": f"Article {number} is short.", "summary": f"Summary {number}."} for number in range(6)]
    (tmp_path / "articles.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines(path):
    return [json.loads(line) for line in Path(path).read_text("utf-8").split("\n")[:-1]]


def test_the_demo_ends_in_a_table_of_three_runs_without_a_network(demo):
    place, printed = demo
    table = [line for line in printed.splitlines() if line.startswith("| SmolLM2-135M")]
    assert len(table) == 3
    kept = [line.split("|")[-2].strip() for line in table]
    assert kept[0] == "100.0%"
    assert kept[1] == kept[2] == "40.0%"
    assert (place / "helm/benchmark_output/runs/latest/summary.json").is_file()
    # HELM itself looks for NLTK's punkt when it is imported, and goes on without it; nothing else asks for a host.
    lookups = place / "lookups"
    assert set(lookups.read_text().split() if lookups.exists() else []) <= {"raw.githubusercontent.com"}


def test_rouge_by_helm_is_rouge_of_the_predictions(there):
    summaries = {" ".join(row["document"].split()): row["summary"] for row in lines(ARTICLES)}
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    known = json.loads((there / "helm/benchmark_output/runs/xsum/squeeze.json").read_text())["runs"]
    assert len(known) == 3
    for run in known.values():
        scores = []
        for line in lines(Path(run["predictions"]) / "xsum.jsonl"):
            article = line["request"]["prompt"].split("###\nArticle: ")[-1].split("\n\n")[0]
            text = line["result"]["choices"][0]["text"].strip()
            scores.append(scorer.score(summaries[article], text))
        found = helm_score.rouge(there / "helm/benchmark_output/runs/xsum" / run["run"])
        assert found["num_instances"] == len(scores) == 2
        for name, key in (("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL")):
            assert found[name] == pytest.approx(sum(one[key].fmeasure for one in scores) / 2)


def test_live_and_replay_give_the_same(there):
    flags = ["--model", "SmolLM2-135M", "--ini_size", "0.4", "--KV_class3", "0.25", "--device", "cpu"]
    helm_env.main([*flags, "--out", "helm/live"])
    output = helm_env.OUTPUT
    helm_env.helm(
        "helm-run",
        *("--plugins", "squeeze.helm_plugin", "--local-path", "helm/live", "-o", str(output), "--suite", "live"),
        *("-m", "2", "-n", "3", "--run-entries"),
        f"xsum_local:articles={ARTICLES},temperature=0.0,model=squeeze/SmolLM2-135M_0.4_25",
    )
    assert (there / "helm/logs/helm-run.log").read_text().count("/SmolLM2-135M on cpu") == 1  # loaded once
    [live] = (output / "runs/live").glob("xsum_local*")
    [replay] = (output / "runs/xsum").glob("xsum_local*_0.4_25")
    texts = [
        [
            state["result"]["completions"][0]
            for state in json.loads((run / "scenario_state.json").read_text())["request_states"]
        ]
        for run in (live, replay)
    ]
    assert [one["text"] for one in texts[0]] == [one["text"] for one in texts[1]]
    assert [one["finish_reason"] for one in texts[0]] == [one["finish_reason"] for one in texts[1]]
    assert helm_score.rouge(live) == helm_score.rouge(replay)


def test_other_predictions_are_scored_anew_and_others_are_left_alone(there, capsys):
    folder = "pred_xsum/SmolLM2-135M/seed-2/full"
    before = sorted(path.name for path in (there / "helm/benchmark_output/runs/xsum").iterdir())
    helm_score.main([folder])
    assert "helm-run" not in capsys.readouterr().out  # scored already
    mark = there / "helm/benchmark_output/runs/xsum/squeeze.json"
    known = json.loads(mark.read_text())
    known["runs"]["SmolLM2-135M_seed-2_full"]["sha256"] = "of earlier predictions"
    mark.write_text(json.dumps(known))
    helm_score.main([folder])
    assert "is of earlier predictions and is made anew" in capsys.readouterr().out
    assert sorted(path.name for path in (there / "helm/benchmark_output/runs/xsum").iterdir()) == before


def test_a_failure_of_helm_keeps_its_code_and_says_its_last_error(tiny):
    requests(tiny, known=True)
    predict()
    # The file of articles changes after the predictions: HELM asks for a prompt that was not predicted.
    text = (tiny / "articles.jsonl").read_text().replace("Article 5 is short.", "Article 5 is another.")
    (tiny / "articles.jsonl").write_text(text)
    with pytest.raises(helm_env.HelmError, match="Article 5 is another") as found:
        helm_score.main(["pred_xsum/tiny/full"])
    assert found.value.code == 1
    assert "helm/logs/helm-run.log" in str(found.value)
    assert (tiny / "pred_xsum/tiny/full/xsum.jsonl").is_file()


def test_a_suite_that_someone_else_made_is_left_alone(tiny):
    requests(tiny, known=True)
    predict()
    (tiny / "helm/benchmark_output/runs/xsum/mine").mkdir(parents=True)
    with pytest.raises(InputError, match="runs/xsum is there and was not made by this command: move it away"):
        helm_score.main(["pred_xsum/tiny/full"])
    assert [path.name for path in (tiny / "helm/benchmark_output/runs/xsum").iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["nowhere"], "there is no run in nowhere"),
        ([], "nothing to score"),
        (["--pred", "Long", "x"], "eval.py scores LongBench"),
    ],
)
def test_nothing_to_score(tiny, flags, said):
    with pytest.raises(InputError, match=said):
        helm_score.main(flags)


def test_a_part_of_the_requests_cannot_be_scored(tiny):
    rows = "".join(json.dumps({"document": f"Article {n} here.", "summary": "It is."}) + "\n" for n in range(8))
    (tiny / "articles.jsonl").write_text(rows)
    requests(tiny)
    predict("--sample_num", "2")
    with pytest.raises(InputError, match="has 2 predictions, but HELM will ask 3, all of data/xsum"):
        helm_score.main(["pred_xsum/tiny/full"])


#: The files that HELM made of `tiny`'s articles: each time takes it a quarter of a minute.
MADE = {}


def requests(place, *flags, known=False):
    """Make requests, or take those of another test in which nothing was different."""
    start = ["--scenario", "xsum_local", "--articles", "articles.jsonl", "--model", "tiny"]
    if known and MADE:
        (place / "data").mkdir()
        for name, content in MADE.items():
            (place / "data" / name).write_bytes(content)
    else:
        helm_requests.main([*start, *flags])
    if known and not MADE:
        MADE.update((path.name, path.read_bytes()) for path in (place / "data").iterdir())
    task = "cnndm" if "cnndm_local" in flags else "xsum"
    return lines(place / f"data/{task}.jsonl")


def predict(*flags):
    pred.main(["--model", "tiny", "--pred", "xsum", "--device", "cpu", "--dtype", "float32", *flags])


def test_requests_have_the_published_layout(tiny):
    [line] = requests(tiny)
    request = line["request"]
    assert {key: request[key] for key in request if key != "prompt"} == {
        "best_of": 1,
        "echo": False,
        "logprobs": 1,
        "max_tokens": 64,
        "model": "tiny",
        "n": 1,
        "request_type": "language-model-inference",
        "stop": ["###"],
        "temperature": 0.3,
        "top_p": 1,
    }
    assert request["prompt"].count("###\nArticle: ") == 6
    assert request["prompt"].endswith("Article 5 is short.\n\nSummarize the above article in 1 sentence.")
    assert "Summarize the above article in 1 sentence.\nSummary 3.\n" in request["prompt"]
    assert not list(tiny.glob("helm/requests-*"))
    assert not list(tiny.glob("helm/benchmark_output/runs/*"))


def test_a_file_that_was_not_made_by_the_command_is_kept(tiny):
    (tiny / "mine.jsonl").write_text("mine\n")
    with pytest.raises(InputError, match="is there and was not made by this command"):
        requests(tiny, "--out", "mine.jsonl")
    assert (tiny / "mine.jsonl").read_text() == "mine\n"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--scenario", "xsom"], "--scenario must be one of xsum, xsum_sampled, cnndm, xsum_local, cnndm_local"),
        (["--scenario", "xsum"], "--articles is for xsum_local and cnndm_local"),
        (["--articles", "none.jsonl"], "the articles none.jsonl are not there"),
        (["--sample_num", "0"], "--sample_num must be 1 or more"),
        (["--model", "nothing-like-it"], "unknown model"),
    ],
)
def test_bad_flags_of_requests(tiny, flags, said):
    with pytest.raises(InputError, match=said):
        requests(tiny, *flags)


def test_a_missing_tokenizer(tiny):
    for path in (tiny / "tiny").glob("tokenizer*"):
        path.unlink()
    with pytest.raises(InputError, match="has no tokenizer"):
        requests(tiny)


def test_configuration_of_someone_else_is_kept(tmp_path):
    (tmp_path / "model_metadata.yaml").write_text("models: []\n")
    with pytest.raises(InputError, match="was not written by this project: move it away"):
        helm_env.write_environment(tmp_path, [])
    assert (tmp_path / "model_metadata.yaml").read_text() == "models: []\n"


def test_what_full_scoring_lacks_is_named(monkeypatch):
    monkeypatch.setattr(helm_requests.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="without summ-eval, bert-score, sentencepiece, the spaCy model"):
        helm_requests.check_full()


def test_helm_sh_reads_its_settings_from_the_environment(tmp_path):
    environment = os.environ | {"PYTHON": sys.executable, "model": "SmolLM2-135M", "ini_size": "0.5"}
    command = ["sh", "helm.sh", "--algorithm", "h2o"]
    done = subprocess.run(command, cwd=ROOT / "script", capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert "there is no run in pred_xsum/SmolLM2-135M/h2o/0.5/25" in done.stderr
    head = (ROOT / "script/helm.sh").read_text().splitlines()[1:4]
    assert head == ["model=${model:-llama2-7b-32k}", "ini_size=${ini_size:-0.4}", "KV_class3=${KV_class3:-0.25}"]


@pytest.mark.slow
def test_runs_on_the_same_requests_are_scored_together(tiny, capsys):
    requests(tiny, "--temperature", "0")
    squeezed = ["--enable_squeeze", "--ini_size", "0.4", "--KV_class3"]
    predict(*squeezed, "0.4")
    predict(*squeezed, "0.25")
    predict(*squeezed, "0.25", "--fidelity")
    # Of other requests: it is left alone.
    (tiny / "other.jsonl").write_text((tiny / "data/xsum.jsonl").read_text() * 2)
    predict(*squeezed, "0.1", "--requests", "other.jsonl")
    predict()
    capsys.readouterr()
    helm_score.main(["--model", "tiny", "--ini_size", "0.4", "--KV_class3", "0.25"])
    table = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| tiny")]
    assert [[cell.strip() for cell in line[4:6]] for line in table] == [["0.4", "0.25"], ["0.4", "0.4"], ["-", "-"]]
    for line, folder in zip(table, ("0.4/25", "0.4/40", "full"), strict=True):
        scores = json.loads((tiny / "pred_xsum/tiny" / folder / "result.json").read_text())["xsum"]
        assert [cell.strip() for cell in line[7:10]] == [f"{scores[f'ROUGE-{one}']:.2f}" for one in "12L"]
    report.main(["pred_xsum"])
    assert "xsum: ROUGE-1/2/L by HELM" in capsys.readouterr().out


@pytest.mark.slow
def test_three_sentences_of_cnndm(tiny):
    [asked] = requests(tiny, "--scenario", "cnndm_local", "--temperature", "0")
    assert asked["request"]["max_tokens"] == 128
    assert asked["request"]["prompt"].endswith("Summarize the above article in 3 sentences.")
    pred.main(["--model", "tiny", "--pred", "cnndm", "--device", "cpu", "--dtype", "float32"])
    helm_score.main(["--model", "tiny", "--pred", "cnndm"])
    assert set(json.loads((tiny / "pred_cnndm/tiny/full/result.json").read_text())["cnndm"]) == {
        "ROUGE-1",
        "ROUGE-2",
        "ROUGE-L",
    }
    assert (tiny / "helm/benchmark_output/runs/cnndm/summary.json").is_file()


@pytest.mark.parametrize(
    ("scenario", "file", "fields", "sentences"),
    [
        pytest.param("xsum", "xsum", ("document", "summary"), "1 sentence.", marks=pytest.mark.slow),
        pytest.param(
            *("xsum_sampled", "xsum-sampled", ("document", "summary"), "1 sentence."), marks=pytest.mark.slow
        ),
        pytest.param(*("cnndm", "cnndm", ("article", "highlights"), "3 sentences."), marks=pytest.mark.slow),
    ],
)
def test_helms_own_scenarios(tiny, scenario, file, fields, sentences):
    # HELM downloads nothing that is there already.
    texts = [f"Article {n} tells that {'the long day went on, and ' * 14} nobody knew." for n in range(8)]
    summary = "Nobody knew how the very long day would go on in the end."
    rows = [dict(zip(fields, (text, summary), strict=True)) for text in texts]
    data = tiny / "helm/benchmark_output/scenarios/summarization/data"
    data.mkdir(parents=True)
    (data / f"{file}.pk").write_bytes(pickle.dumps({"train": rows[:6], "validation": [], "test": rows[6:]}))
    task = helm_requests.SCENARIOS[scenario].task
    helm_requests.main(["--scenario", scenario, "--model", "tiny", "--out", "requests.jsonl"])
    asked = [line["request"] for line in lines(tiny / "requests.jsonl")]
    assert len(asked) == 2
    for request in asked:
        assert request["prompt"].count("###\nArticle: ") == 6
        assert request["prompt"].endswith(sentences)
        assert request["temperature"] == 0.3
    pred.main(["--model", "tiny", "--pred", task, "--requests", "requests.jsonl", "--device", "cpu"])
    with pytest.raises(InputError, match="HELM's own scenario cannot be scored without"):
        helm_score.main([f"pred_{task}/tiny/full"])
