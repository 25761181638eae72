"""Every reader of a file from outside: whatever is in it, there is a value that can be used, or a sentence."""

import argparse
import json
import time
from pathlib import Path

import json_damage
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from made_runs import make_bench, make_fidelity, make_helm, make_run

from squeeze import InputError, calibrate, calibration, curves, fidelity, longbench, models, report, results, stats
from squeeze import inventory as inventories
from squeeze.files import read_json, to_jsonl
from squeeze.layers import parse_layers
from squeeze.records import AnsweredSample, ComparedSample, PredictedSample
from squeeze.report_files import check_folder
from squeeze.request_files import key, read_requests
from squeeze.runs import Run
from squeeze.samples import Samples
from squeeze.scoring import score_file

helm_plugin = pytest.importorskip("squeeze.helm_plugin")
from helm.common.request import Request  # noqa: E402

from squeeze import helm_requests, helm_score  # noqa: E402
from squeeze.helm_client import ReplayClient  # noqa: E402
from squeeze.helm_files import ScenarioState  # noqa: E402

PREDICTION = {"pred": "Ann", "answers": ["Ann is here.", "Ann"], "all_classes": ["Ann", "Bob"], "length": 4100}
MEASURED = {"prompt_tokens": 90, "new_tokens": 5, "prefill_seconds": 0.5, "decode_seconds": 1.5, "kv_bytes": 10.0}
MEASURED |= {"full_kv_bytes": 100, "state_bytes": 0, "peak_memory_bytes": 10**9}
LAYERS = {"classes": [1, 3], "budgets": [9, 5], "similarities": [0.5, 0.9], "notes": ["raised"]}
ASKED = {"prompt": "Hi", "max_tokens": 8, "temperature": 0.3, "stop": ["#"], "n": 1, "best_of": 1, "random": "1"}
ASKED |= {"top_p": 1, "logprobs": 1, "echo": False, "model": "m"}
CHOICE = {"text": "Ho", "logprobs": {"tokens": ["H", "o"], "token_logprobs": [-1, -0.5]}, "finish_reason": "stop"}
RESULT = {"choices": [CHOICE], "request_time": {"batch_time": 1.5, "batch_size": 2}}
COMPARED = {"kl": 0.1, "agreement": 0.9, "tokens": 7}
CURVES = {"version": 3, "algorithm": "h2o", "start_size": None, "shares": ["1/10", "2/5"], "multiples": ["1/2", "1"]}
CURVES |= {"model": {}, "loss": [[[[0.2, 0.1], [0.3, 0.1]]] * 2]}
NOTE = {"scenario": "xsum_local", "run_entry": "xsum_local:articles=a", "max_eval_instances": 3}
HELM_REQUEST = {"model": "squeeze/m", "prompt": "Hi", "temperature": 0, "top_p": 1, "max_tokens": 9, "random": "1"}
HELM_REQUEST |= {"num_completions": 1, "top_k_per_token": 1, "echo_prompt": False, "stop_sequences": ["#"]}
STATS = [
    {"name": {"name": name, "split": "test"}, "mean": 0.5, "count": 1}
    for name in ("rouge_1", "rouge_2", "rouge_l", "num_instances")
]
COLUMNS = dict.fromkeys(("model", "algorithm", "allocation", "ini_size", "KV_class3", "KV kept"), "x")


def manifest(folder):
    return json.loads((folder / "run.json").read_text())


def show(folder="runs"):
    """All that is shown of runs but the figures; what is left out is an error here."""
    found = inventories.find([Path(folder)])
    read = results.read(found)
    results.cheapest(read.runs)
    results.sensitivity(read.runs)
    [results.shown_score(row) for row in read.runs.to_dict("records")]
    report.print_tables(found)
    if found.problems or read.problems:
        raise InputError("; ".join([*found.problems, *read.problems]))


def squeezed_run():
    folder = make_run(Path("runs/full"), samples=2, ini_size=0.4, KV_class3=0.2)

    def use(path):
        score_file(path.parent, path.with_name("samsum.jsonl"), "Long", rouge=False)
        show()

    return folder / "run.json", [manifest(folder)], use


def run_that_goes_on():
    folder = make_run(Path("runs/full"), samples=2, ini_size=0.4, KV_class3=0.2)
    record = {"index": 0, **PREDICTION, "stats": MEASURED}
    (folder / "samples/samsum.jsonl").write_text(json.dumps(record) + "\n")
    known = manifest(folder)

    def use(path):
        Run(folder, {}, {}, overwrite=True)  # one that is replaced
        with Run(folder, known["settings"], {}) as run:
            samples = run.open("samsum", {}, 4)
            run.start(samples)
            run.note(samples, batch_size=1)

    return folder / "run.json", [known], use


def fidelity_run():
    folder = make_fidelity(Path("runs/fidelity"), 0.1, samples=2, ini_size=0.4, KV_class3=0.2)
    return folder / "run.json", [manifest(folder)], lambda path: show()


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


def scores():
    make_run(Path("runs/full"), samples=2)
    return Path("runs/full/result.json"), [{"samsum": 37.5, "qasper": {"0-4k": 1, "8k+": None}}], lambda path: show()


def helm_scores():
    folder = make_helm(Path("runs/xsum"), (3.0, 2.0, 1.0), samples=2)
    return folder / "result.json", [{"xsum": {"ROUGE-1": 3.0, "ROUGE-2": 2, "ROUGE-L": 1.0}}], lambda path: show()


def samples_of(kind, summarize, describe, records, name="samsum.partial.jsonl"):
    """A file of samples, which a run reads when it goes on, sums up and publishes."""

    def use(path):
        samples = Samples(Path("run"), "samsum", {}, 2, kind)
        samples.read()
        found = [record["stats"] for record in samples.records]
        if found:
            (json.dumps(summarize(found), allow_nan=False), describe(found))
        samples.reopen()
        samples.publish()

    Path("run/samples").mkdir(parents=True)
    return Path("run", name), [{"index": index, **record} for index, record in enumerate(records)], use


def full_samples():
    return samples_of(PredictedSample, stats.summarize, stats.progress, [{**PREDICTION, "stats": MEASURED}] * 2)


def squeezed_samples():
    one = {**PREDICTION, "stats": MEASURED | LAYERS}
    return samples_of(PredictedSample, stats.summarize, stats.progress, [one] * 2, "samples/samsum.jsonl")


def answered_samples():
    one = {"request": ASKED, "result": RESULT, "stats": MEASURED | LAYERS}
    return samples_of(AnsweredSample, stats.summarize, stats.progress, [one])


def compared_samples():
    one = {**COMPARED, "stats": COMPARED | {"kv_bytes": 3.5, "full_kv_bytes": 10, "notes": []}}
    return samples_of(ComparedSample, fidelity.summarize, fidelity.describe, [one] * 2)


def measured_samples():
    one = {"dataset": "a", "row": 0, "prompt_tokens": 9, "loss": CURVES["loss"][0], "stats": {}}
    path, records, _ = samples_of(None, None, None, [one] * 2)

    def use(path):
        samples = Samples(Path("run"), "samsum", {}, 2, calibrate.MeasuredSample)
        samples.read()
        calibrate.check_whole(samples, 2, 2)
        np.array([record["loss"] for record in samples.records])

    return path, records, use


def layers():
    Path("run/samples").mkdir(parents=True)
    lines = [{"index": index, "stats": {"prompt_tokens": 90, **LAYERS}} for index in range(2)]

    def use(path):
        parse_layers(Path("run"), "samsum").pivot(index="prompt", columns="layer", values="layer_class").astype(int)

    return Path("run/samples/samsum.jsonl"), lines, use


def predictions(dataset, task):
    def use(path):
        json.dumps(score_file(path.parent, path, task), allow_nan=False)

    return Path(f"{dataset}.jsonl"), [PREDICTION] * 2, use


def rows():
    row = {"input": "i", "context": "c", "dataset": "trec", "_id": "a", "language": "en", **PREDICTION}
    del row["pred"]

    def use(path):
        for one in longbench.load_data("trec", ".").rows:
            (longbench.build_prompt("trec", one).encode(), to_jsonl([one]).encode())

    return Path("trec.jsonl"), [row] * 2, use


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


def loss_curves():
    def use(path):
        found = calibration.read_calibration(path)
        found.relative(0)
        found.check("h2o", 4, found.losses.shape[2])
        share = found.shares[0]
        curves.budgets(found.multiples, found.measurements(share), share, 500, 508, 2)

    return Path("c.json"), [CURVES], use


def bench():
    path = make_bench(Path("runs/bench.json"), batch_sizes=(1,))
    return path, [json.loads(path.read_text())], lambda path: show()


def mark():
    Path("out").mkdir()
    content = {"made_by": "python -m squeeze.report", "files": ["a.svg"]}
    return Path("out/report.json"), [content], lambda path: check_folder(path.parent)


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


def config(name, content, use):
    Path("config").mkdir()
    Path("config/model2path.json").write_text('{"M": "org/M"}')
    Path("config/model2maxlen.json").write_text('{"M": 3500}')
    Path("config/dataset2prompt.json").write_text('{"samsum": "{context}"}')
    return Path("config", name), [content], use


def resolve(path):
    source = models.resolve("M")
    return str(source.path), (source.max_length or 0) + 1


def model_paths():
    return config("model2path.json", {"M": "org/M", "N": "models/N"}, resolve)


def model_lengths():
    return config("model2maxlen.json", {"M": 3500}, resolve)


def fill_in(path):
    for name in longbench.prompt_formats():
        longbench.build_prompt(name, {"context": "c", "input": "i"}).encode()


def prompts():
    return config("dataset2prompt.json", {"samsum": "A {context} {{}} {input}", "trec": "{input}"}, fill_in)


def lengths():
    return config("dataset2maxlen.json", {"samsum": 8}, lambda path: longbench.generation_lengths()["samsum"] + 1)


def articles():
    rows = [{"document": f"It is {number}.", "summary": "It is."} for number in range(6)]
    return Path("a.jsonl"), rows, lambda path: helm_plugin.ArticlesScenario(str(path), "xsum_local").get_instances("")


READERS = {
    made.__name__: made
    for made in (
        *(squeezed_run, run_that_goes_on, fidelity_run, helm_run, scores, helm_scores),
        *(full_samples, squeezed_samples, answered_samples, compared_samples, measured_samples, layers),
        *(rows, requests, note, answers, loss_curves, bench, mark, suite, helm_stats, helm_states),
        *(model_paths, model_lengths, prompts, lengths, articles),
    )
}
READERS |= {
    f"predictions of {dataset} ({task})": lambda dataset=dataset, task=task: predictions(dataset, task)
    for dataset, task in (("trec", "Long"), ("samsum", "e"), ("passage_count", "Long"))
}


@pytest.fixture
def reader(request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if READERS[request.param] in (model_paths, model_lengths, prompts, lengths):
        monkeypatch.setattr(models, "ROOT", tmp_path)
        monkeypatch.setattr(longbench, "CONFIG", tmp_path / "config")
    yield READERS[request.param]()
    longbench.prompt_formats.cache_clear()
    longbench.generation_lengths.cache_clear()


@pytest.mark.parametrize("reader", READERS, indirect=True)
def test_what_is_damaged_is_a_value_or_a_sentence(reader, capsys):
    path, lines, use = reader

    def write(data):
        longbench.prompt_formats.cache_clear()
        longbench.generation_lengths.cache_clear()
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)

    whole = "".join(json.dumps(line) + "\n" for line in lines).encode()
    write(whole)
    use(path)
    refused = []

    def attempt():
        start = time.process_time()
        try:
            use(path)
        except InputError as error:
            refused.append(str(error).encode())  # what it says can be printed
            assert b"\n" not in refused[-1]
        assert time.process_time() - start < 1

    @settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(json_damage.damaged(lines))
    def anything(data):
        write(data)
        attempt()

    anything()
    assert refused
    for data in (b"", b"\n", b"\0", b"[" * 100_000, whole.decode().encode("utf-16"), b"\xff" + whole):
        write(data)
        attempt()
    path.unlink()
    path.mkdir()
    attempt()
