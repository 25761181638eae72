"""Readers of HELM's files, of requests and of answers: whatever is in a file, there is a value, or a sentence."""

import argparse
import json
from pathlib import Path

import json_damage
import pytest
from helm.common.request import Request
from made_runs import make_helm
from test_readers import LAYERS, MEASURED, manifest, samples_of

from squeeze.benchmarks.helm import HELM
from squeeze.benchmarks.requests import key, read_requests
from squeeze.helm import requests as helm_requests
from squeeze.helm import score as helm_score
from squeeze.helm.client import ReplayClient
from squeeze.helm.files import ScenarioState
from squeeze.helm.plugin import ArticlesScenario
from squeeze.storage.files import read_json, to_jsonl

ASKED = {"prompt": "Hi", "max_tokens": 8, "temperature": 0.3, "stop": ["#"], "n": 1, "best_of": 1, "random": "1"}
ASKED |= {"top_p": 1, "logprobs": 1, "echo": False, "model": "m"}
CHOICE = {"text": "Ho", "logprobs": {"tokens": ["H", "o"], "token_logprobs": [-1, -0.5]}, "finish_reason": "stop"}
RESULT = {"choices": [CHOICE], "request_time": {"batch_time": 1.5, "batch_size": 2}}
NOTE = {"scenario": "xsum_local", "run_entry": "xsum_local:articles=a", "max_eval_instances": 3}
HELM_REQUEST = {"model": "squeeze/m", "prompt": "Hi", "temperature": 0, "top_p": 1, "max_tokens": 9, "random": "1"}
HELM_REQUEST |= {"num_completions": 1, "top_k_per_token": 1, "echo_prompt": False, "stop_sequences": ["#"]}
STATS = [
    {"name": {"name": name, "split": "test"}, "mean": 0.5, "count": 1}
    for name in ("rouge_1", "rouge_2", "rouge_l", "num_instances")
]
COLUMNS = dict.fromkeys(("model", "algorithm", "allocation", "ini_size", "KV_class3", "KV kept"), "x")


def answered_samples():
    one = {"request": ASKED, "result": RESULT, "stats": MEASURED | LAYERS}
    return samples_of(HELM[0], [one])


def helm_run():
    folder = make_helm(Path("runs/xsum"), samples=2, ini_size=0.4, KV_class3=0.2)
    found = manifest(folder)
    summary = found["datasets"]["xsum"]
    summary["data"] = {"source": "a.jsonl", "rows": 2, "made_by": NOTE | {"requests_sha256": "a"}}
    summary["starts"][-1]["flags"] = {"model": "tiny", "model_path": None}
    Path("tiny").mkdir()
    Path("tiny/tokenizer.json").write_text("{}")
    Path("tiny/config.json").write_text('{"model_type": "llama", "max_position_embeddings": 9}')
    args = argparse.Namespace(pred="xsum", scenario=None)

    def use(path):
        helm_score._finished(folder, "xsum")
        read = helm_score.read_run(folder, args)
        assert set(COLUMNS) <= set(read.columns) and read.sample_num > 0

    return folder / "run.json", [found], use


def requests():
    def use(path):
        for one in read_requests("xsum", str(path)).rows:
            (key(one.prompt, one.decoding).encode(), to_jsonl([one.raw]).encode())

    return Path("r.jsonl"), [{"request": ASKED}] * 2, use


def note():
    Path("r.jsonl").write_text(json.dumps({"request": ASKED}))
    digest = read_requests("xsum", "r.jsonl").sha256

    def use(path):
        json.dumps(read_requests("xsum", "r.jsonl").origin, allow_nan=False)

    return Path("r.made_by.json"), [NOTE | {"requests_sha256": digest}], use


def answers():
    def use(path):
        client = ReplayClient(str(path))
        for prompt, one in client._settings.items():
            asked = {"prompt": prompt, "temperature": one.temperature, "num_completions": one.n, "random": one.random}
            asked |= {"max_tokens": one.max_tokens, "top_p": one.top_p, "stop_sequences": list(one.stop)}
            client.make_request(Request(model="squeeze/m", model_deployment="squeeze/m", **asked))

    return Path("xsum.jsonl"), [{"request": ASKED, "result": RESULT}], use


def suite():
    folder = Path("helm/benchmark_output/runs/xsum")
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text("{}")
    (folder / "run").mkdir()
    (folder / "run/stats.json").write_text(json.dumps(STATS))
    one = {"predictions": "p", "scenario": "xsum_local:a", "columns": COLUMNS, "sha256": "a", "run": "run"}

    def use(path):
        for one in helm_score.score("xsum", []).values():
            if "run" in one:
                helm_score.line(folder, one)

    return folder / "squeeze.json", [{"runs": {"M_full": one}}], use


def helm_stats():
    def use(path):
        helm_score.line(Path(), {"run": ".", "columns": COLUMNS})

    return Path("stats.json"), [STATS], use


def helm_states():
    states = {"request_states": [{"request": HELM_REQUEST, "num_train_instances": 5, "prompt_truncated": False}]}

    def use(path):
        to_jsonl([helm_requests.published(one["request"]) for one in read_json(path, ScenarioState)["request_states"]])

    return Path("scenario_state.json"), [states], use


def articles():
    rows = [{"document": f"It is {number}.", "summary": "It is."} for number in range(6)]
    return Path("a.jsonl"), rows, lambda path: ArticlesScenario(str(path), "xsum_local").get_instances("")


READERS = {
    made.__name__: made
    for made in (helm_run, answered_samples, requests, note, answers, suite, helm_stats, helm_states, articles)
}


@pytest.mark.parametrize("reader", READERS)
def test_what_is_damaged_is_a_value_or_a_sentence(reader, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    json_damage.withstand(*READERS[reader]())
