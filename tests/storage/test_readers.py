"""Every reader of a file from outside: whatever is in it, there is a value that can be used, or a sentence."""

import json
from pathlib import Path

import json_damage
import numpy as np
import pytest
from made_runs import make_bench, make_fidelity, make_helm, make_run

from squeeze import H2O, InputError, PromptFacts, calibrate
from squeeze.allocations import calibration, curves
from squeeze.benchmarks.fidelity import Fidelity
from squeeze.benchmarks.longbench import data as longbench
from squeeze.benchmarks.longbench.benchmark import LONGBENCH
from squeeze.benchmarks.registry import BENCHMARKS
from squeeze.models import sources
from squeeze.report import command as report
from squeeze.report import results
from squeeze.report.files import check_folder
from squeeze.report.layers import parse_layers
from squeeze.runs import inventory as inventories
from squeeze.runs.folder import Run
from squeeze.runs.samples import Samples
from squeeze.storage.files import to_jsonl

PREDICTION = {"pred": "Ann", "answers": ["Ann is here.", "Ann"], "all_classes": ["Ann", "Bob"], "length": 4100}
MEASURED = {"prompt_tokens": 90, "new_tokens": 5, "prefill_seconds": 0.5, "decode_seconds": 1.5, "kv_bytes": 10.0}
MEASURED |= {"full_kv_bytes": 100, "state_bytes": 0, "peak_memory_bytes": 10**9}
LAYERS = {"classes": [1, 3], "budgets": [9, 5], "similarities": [0.5, 0.9], "notes": ["raised"]}
COMPARED = {"kl": 0.1, "agreement": 0.9, "tokens": 7}
CURVES = {"version": 3, "algorithm": "h2o", "start_size": None, "shares": ["1/10", "2/5"], "multiples": ["1/2", "1"]}
CURVES |= {"model": {}, "loss": [[[[0.2, 0.1], [0.3, 0.1]]] * 2]}


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
        LONGBENCH.read_scores(folder, "samsum")
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


def scores():
    make_run(Path("runs/full"), samples=2)
    return Path("runs/full/result.json"), [{"samsum": 37.5, "qasper": {"0-4k": 1, "8k+": None}}], lambda path: show()


def helm_scores():
    folder = make_helm(Path("runs/xsum"), (3.0, 2.0, 1.0), samples=2)
    return folder / "result.json", [{"xsum": {"ROUGE-1": 3.0, "ROUGE-2": 2, "ROUGE-L": 1.0}}], lambda path: show()


def samples_of(measure, records, name="samsum.partial.jsonl"):
    """A file of samples, which a run reads when it goes on, sums up and publishes."""

    def use(path):
        samples = Samples(Path("run"), "samsum", {}, 2, measure.sample)
        samples.read()
        found = [record["stats"] for record in samples.records]
        if found:
            (json.dumps(measure.summarize(found), allow_nan=False), measure.describe(found))
        samples.reopen()
        samples.publish()

    Path("run/samples").mkdir(parents=True)
    return Path("run", name), [{"index": index, **record} for index, record in enumerate(records)], use


def full_samples():
    return samples_of(LONGBENCH, [{**PREDICTION, "stats": MEASURED}] * 2)


def squeezed_samples():
    one = {**PREDICTION, "stats": MEASURED | LAYERS}
    return samples_of(LONGBENCH, [one] * 2, "samples/samsum.jsonl")


def compared_samples():
    one = {**COMPARED, "stats": COMPARED | {"kv_bytes": 3.5, "full_kv_bytes": 10, "notes": []}}
    return samples_of(Fidelity(), [one] * 2)


def measured_samples():
    one = {"dataset": "a", "row": 0, "prompt_tokens": 9, "loss": CURVES["loss"][0], "stats": {}}
    path, records, _ = samples_of(None, [one] * 2)

    def use(path):
        samples = Samples(Path("run"), "samsum", {}, 2, calibrate.MeasuredSample)
        samples.read()
        calibrate.check_whole(samples, 2, 2)
        np.array([record["loss"] for record in samples.records])

    return path, records, use


def layers():
    Path("run/samples").mkdir(parents=True)
    Path("run/run.json").write_text(json.dumps({"datasets": {"samsum": {"starts": [{}]}}}))
    lines = [{"index": index, "stats": {"prompt_tokens": 90, **LAYERS}} for index in range(2)]

    def use(path):
        parse_layers(Path("run"), "samsum").pivot(index="prompt", columns="layer", values="layer_class").astype(int)

    return Path("run/samples/samsum.jsonl"), lines, use


def predictions(dataset, task):
    def use(path):
        benchmark = BENCHMARKS[task]
        json.dumps(benchmark.score(dataset, benchmark.predictions(path, dataset)), allow_nan=False)

    return Path(f"{dataset}.jsonl"), [PREDICTION] * 2, use


def rows():
    row = {"input": "i", "context": "c", "dataset": "trec", "_id": "a", "language": "en", **PREDICTION}
    del row["pred"]

    def use(path):
        for one in longbench.load_data("trec", ".").rows:
            (longbench.build_prompt("trec", one).encode(), to_jsonl([one]).encode())

    return Path("trec.jsonl"), [row] * 2, use


def loss_curves():
    def use(path):
        found = calibration.read_calibration(path)
        found.relative(0)
        found.check("h2o", H2O(), found.losses.shape[2])
        share = found.shares[0]
        layers = found.losses.shape[2]
        facts = PromptFacts(500, (508,) * layers, (500,) * layers, (1,) * layers, 2)
        curves.budgets(found.multiples, found.measurements(share), share, facts)

    return Path("c.json"), [CURVES], use


def bench():
    path = make_bench(Path("runs/bench.json"), batch_sizes=(1,))
    return path, [json.loads(path.read_text())], lambda path: show()


def mark():
    Path("out").mkdir()
    content = {"made_by": "python -m squeeze.report", "files": ["a.svg"]}
    return Path("out/report.json"), [content], lambda path: check_folder(path.parent)


def config(name, content, use):
    Path("config").mkdir()
    Path("config/model2path.json").write_text('{"M": "org/M"}')
    Path("config/model2maxlen.json").write_text('{"M": 3500}')
    Path("config/dataset2prompt.json").write_text('{"samsum": "{context}"}')
    Path("config/dataset2maxlen.json").write_text('{"samsum": 8, "trec": 8}')
    return Path("config", name), [content], use


def resolve(path):
    source = sources.resolve("M")
    return str(source.path), (source.max_length or 0) + 1


def model_paths():
    return config("model2path.json", {"M": "org/M", "N": "models/N"}, resolve)


def model_lengths():
    return config("model2maxlen.json", {"M": 3500}, resolve)


def fill_in(path):
    longbench.prompt_formats.cache_clear()
    longbench.generation_lengths.cache_clear()
    for name in longbench.prompt_formats():
        longbench.build_prompt(name, {"context": "c", "input": "i"}).encode()
        assert longbench.generation_lengths()[name] > 0


def prompts():
    return config("dataset2prompt.json", {"samsum": "A {context} {{}} {input}", "trec": "{input}"}, fill_in)


def lengths():
    return config("dataset2maxlen.json", {"samsum": 8}, fill_in)


READERS = {
    made.__name__: made
    for made in (
        *(squeezed_run, run_that_goes_on, fidelity_run, scores, helm_scores),
        *(full_samples, squeezed_samples, compared_samples, measured_samples, layers),
        *(rows, loss_curves, bench, mark, model_paths, model_lengths, prompts, lengths),
    )
}
READERS |= {
    f"predictions of {dataset} ({task})": lambda dataset=dataset, task=task: predictions(dataset, task)
    for dataset, task in (("trec", "Long"), ("samsum", "e"), ("passage_count", "Long"))
}


@pytest.fixture
def reader(request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield READERS[request.param]()
    longbench.prompt_formats.cache_clear()
    longbench.generation_lengths.cache_clear()


@pytest.mark.parametrize("reader", READERS, indirect=True)
def test_what_is_damaged_is_a_value_or_a_sentence(reader, capsys):
    json_damage.withstand(*reader)
