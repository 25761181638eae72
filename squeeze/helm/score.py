"""Score `pred.py`'s predictions with HELM itself, and show runs side by side, for `script/helm.sh`.

`helm-run` asks a client that answers from the predictions, so that HELM scores exactly those. All runs of a task are
one HELM suite, `helm/benchmark_output/runs/<task>`, to which `latest` points.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from squeeze.benchmarks.helm import HELM
from squeeze.cli.arguments import Parser, as_path, path_text
from squeeze.cli.tables import table
from squeeze.errors import InputError
from squeeze.helm.environment import ENVIRONMENT, OUTPUT, Deployment, engine, find_model, helm, write_environment
from squeeze.helm.files import Stat, Suite
from squeeze.helm.requests import SCENARIOS, check_full, run_entry
from squeeze.runs.flags import named_run
from squeeze.runs.inventory import describe
from squeeze.runs.manifest import AnsweredOrigin, Manifest, RequestsSummary, check_settings
from squeeze.runs.resolve import named_folder
from squeeze.runs.spec import CACHE, FLAGS, RunSpec
from squeeze.storage.files import read_bytes, read_json, unfinished, write_json, writing
from squeeze.storage.schema import check, shown
from squeeze.text import say

RUNS = OUTPUT / "runs"
ROUGE = {"rouge_1": "ROUGE-1", "rouge_2": "ROUGE-2", "rouge_l": "ROUGE-L"}
COLUMNS = ("model", "algorithm", "allocation", "ini_size", "KV_class3", "instances", *ROUGE.values(), "KV kept")

#: The file that lists a suite's runs; a suite without it is someone else's.
MARK = "squeeze.json"


@dataclass(frozen=True)
class Predictions:
    """A run of `pred.py` on HELM's requests, and how HELM is to be asked about it.

    Args:
        folder: the run's.
        file: its predictions.
        entry: HELM's run entry, but for the model.
        sample_num: the most instances HELM takes, as when it made the requests.
        model: the model's folder, for its tokenizer.
        positions: the model's window.
        columns: the run's cells in the table.
    """

    folder: Path
    file: Path
    entry: str
    sample_num: int
    model: Path
    positions: int
    columns: dict[str, str]

    @property
    def engine(self) -> str:
        """The suite's name for the run."""
        return engine(self.folder)

    @property
    def sha256(self) -> str:
        """The hash of the predictions."""
        return hashlib.sha256(read_bytes(self.file)).hexdigest()


def read_run(folder: Path, args: argparse.Namespace) -> Predictions:
    """Read a run's folder.

    Raises:
        InputError: it is no finished run, or does not say which requests it answered and the flags do not either.
    """
    if not (folder / "run.json").is_file():
        raise InputError(f"there is no run in {folder}: python pred.py --pred {args.pred} makes one")
    recorded = _summary(folder, args.pred)
    if recorded is None:
        raise InputError(f"{folder} has no predictions of {args.pred}")
    settings, summary = recorded
    file = folder / f"{args.pred}.jsonl"
    if "samples" not in summary or not file.is_file():
        raise InputError(f"{folder} is not finished: start pred.py again to go on")
    entry, sample_num = _scenario(folder, summary["data"], args)
    have, want = summary["samples"], summary["data"]["rows"]
    if have < want:
        raise InputError(
            f"{folder} has {have} predictions, but HELM will ask {want}, all of {summary['data']['source']}: go on "
            f"with pred.py --sample_num {want}, or make fewer requests with squeeze.helm_requests --sample_num {have}"
        )
    start = summary["starts"][-1]
    model = find_model(RunSpec(model=start["flags"]["model"], model_path=start["flags"].get("model_path")))
    columns = describe(settings, summary)
    columns |= {"model": start["model"]["name"], "KV kept": f"{100 * summary['kept']:.1f}%"}
    return Predictions(folder, file, entry, sample_num, model.folder, model.positions, columns)


def _summary(folder: Path, task: str) -> tuple[dict[str, Any], Any] | None:
    """A run's settings and its summary of a task: `RequestsSummary` where it is finished; None if nothing."""
    path = folder / "run.json"
    manifest = read_json(path, Manifest)
    check_settings(manifest["settings"], path)
    summary = manifest["datasets"].get(task)
    if summary is None or "measure" in manifest["settings"]:
        return None
    if "samples" in summary:
        check(summary, RequestsSummary, f"{path}: {task}")
    return manifest["settings"], summary


def _scenario(folder: Path, data: AnsweredOrigin, args: argparse.Namespace) -> tuple[str, int]:
    """HELM's run entry and number of instances: as noted when the requests were made, or by the flags."""
    note = data["made_by"]
    if note is None:
        if args.scenario is None:
            raise InputError(
                f"{folder} answers {data['source']}, which python -m squeeze.helm_requests did not make: say with "
                "--scenario, --sample_num and --temperature how HELM would make those requests"
            )
        return run_entry(args.scenario, args.articles, args.temperature), args.sample_num or data["rows"]
    if args.scenario not in (None, note["scenario"]):
        raise InputError(f"{folder} answers requests of {note['scenario']}, not of {args.scenario}")
    return note["run_entry"], note["max_eval_instances"]


def score(task: str, runs: Sequence[Predictions]) -> dict[str, dict[str, Any]]:
    """Let HELM score the runs that it has not scored yet.

    Returns:
        HELM's name for a model → its run in the task's suite: `predictions`, `sha256`, `scenario`, `columns`, and
        `run`, the folder of HELM's results.
    Raises:
        InputError: the suite, or a run in it, was made by someone else, or HELM fails.
    """
    suite = RUNS / task
    # A kill may have come before the mark was written.
    if suite.is_dir() and not (suite / MARK).is_file() and {*suite.iterdir()} - {*unfinished(suite / MARK)}:
        raise InputError(f"{suite} is there and was not made by this command: move it away")
    known: dict[str, Any] = dict(read_json(suite / MARK, Suite)["runs"]) if (suite / MARK).is_file() else {}
    fresh = [run for run in runs if known.get(run.engine, {}).get("sha256") != run.sha256]
    if fresh and not all(SCENARIOS[_short(run.entry)].local for run in fresh):
        check_full()
    for run in fresh:
        for stale in _helm_folders(suite, run.engine):
            if run.engine not in known:
                raise InputError(f"{stale} is there and was not made by this command: move it away")
            say(f"note: {stale} is of earlier predictions and is made anew")
            with writing(stale):
                shutil.rmtree(stale)
        known[run.engine] = {"predictions": str(run.folder), "scenario": run.entry, "columns": run.columns}
    if fresh:
        with writing(f"into {suite}"):
            suite.mkdir(parents=True, exist_ok=True)
            (suite / "summary.json").unlink(missing_ok=True)  # it is of other runs, until HELM has made it again
            write_json(suite / MARK, {"runs": known})
        for number in sorted({run.sample_num for run in fresh}):
            _helm_run(task, [run for run in fresh if run.sample_num == number], number)
        for run in fresh:
            [results] = _helm_folders(suite, run.engine)
            known[run.engine] |= {"sha256": run.sha256, "run": results.name}
        with writing(f"into {suite}"):
            write_json(suite / MARK, {"runs": known})
    if fresh or not (suite / "summary.json").is_file():
        helm(
            "helm-summarize",
            *("--suite", task, "-o", str(OUTPUT), "--local-path", str(ENVIRONMENT), "--auto-generate-schema"),
        )
    _point_latest(task)
    return known


def _helm_folders(suite: Path, name: str) -> list[Path]:
    """The folders of HELM's results for a model."""
    return [path for path in sorted(suite.glob("*/")) if path.name.endswith(f"model=squeeze_{name}")]


def _short(entry: str) -> str:
    """The name in `SCENARIOS` of a run entry."""
    name = entry.split(":")[0]
    names = [short for short, scenario in SCENARIOS.items() if scenario.run_spec == name]
    if not names:
        raise InputError(f"the run entry {shown(entry)} is of none of the scenarios {', '.join(SCENARIOS)}")
    return names[0]


def _helm_run(task: str, runs: Sequence[Predictions], sample_num: int) -> None:
    deployments = [
        Deployment(
            name=f"squeeze/{run.engine}",
            description=", ".join(f"{key} {value}" for key, value in run.columns.items() if value != "-"),
            client="ReplayClient",
            args={"predictions": str(run.file)},
            folder=run.model,
            positions=run.positions,
        )
        for run in runs
    ]
    write_environment(ENVIRONMENT, deployments)
    print(f"helm-run: {len(runs)} run(s) of {task}, at most {sample_num} instances each")
    helm(
        "helm-run",
        *("--plugins", "squeeze.helm_plugin", "--local-path", str(ENVIRONMENT), "-o", str(OUTPUT)),
        *("--suite", task, "-m", str(sample_num), "-n", "1", "--disable-cache", "--exit-on-error"),
        *("--run-entries", *(f"{run.entry},model=squeeze/{run.engine}" for run in runs)),
    )


def _point_latest(task: str) -> None:
    """Make `latest` the task's suite, for `helm-server --suite latest`."""
    latest = RUNS / "latest"
    if latest.exists() and not latest.is_symlink():
        raise InputError(f"{latest} is there and is no link of this command's: move it away")
    with writing(latest):
        latest.unlink(missing_ok=True)
        latest.symlink_to(task)


def rouge(run: Path) -> dict[str, float]:
    """HELM's mean of each ROUGE over a run's test instances, 0 to 1, and `num_instances`.

    Raises:
        InputError: HELM wrote none.
    """
    means = {
        stat["name"]["name"]: mean
        for stat in read_json(run / "stats.json", list[Stat])
        if stat["name"].get("split") == "test"
        and stat["name"].get("perturbation") is None
        and (mean := stat.get("mean")) is not None
    }
    missing = [name for name in (*ROUGE, "num_instances") if name not in means]
    if missing:
        raise InputError(f"{run / 'stats.json'} has no {missing[0]} of test instances")
    return {name: means[name] for name in (*ROUGE, "num_instances")}


def line(suite: Path, known: dict[str, Any]) -> dict[str, str]:
    """A run's line of the table; ROUGE in percent."""
    scores = rouge(suite / known["run"])
    percents = {title: f"{100 * scores[name]:.2f}" for name, title in ROUGE.items()}
    return known["columns"] | percents | {"instances": f"{scores['num_instances']:g}"}


def write_result(folder: Path, task: str, run: Path) -> None:
    """Write a run's ROUGE, in percent, into its own folder, where `squeeze.report` looks."""
    scores = rouge(run)
    with writing(folder / "result.json"):
        write_json(folder / "result.json", {task: {title: 100 * scores[name] for name, title in ROUGE.items()}})


def find_folders(spec: RunSpec) -> list[Path]:
    """The run that is described, and every finished run of the same model on the same requests."""
    if spec.model is None:
        raise InputError("nothing to score: give folders of runs, or --model and pred.py's other flags")
    named = named_folder(spec)
    data = _finished(named, spec.pred)
    candidates = sorted(path.parent for path in Path(*named.parts[:2]).rglob("run.json"))
    folders = [named]
    for folder in candidates if data is not None else ():
        try:
            folders += [folder] if folder != named and _finished(folder, spec.pred) == data else []
        except InputError as error:
            print(f"left out: {error}")
    return folders


def _finished(folder: Path, task: str) -> AnsweredOrigin | None:
    """The requests that a run has answered; None if it has not answered all of them, or measured something else."""
    recorded = _summary(folder, task) if (folder / "run.json").is_file() else None
    summary = recorded[1] if recorded else {}
    return summary["data"] if "samples" in summary and summary["samples"] >= summary["data"]["rows"] else None


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(
        prog="script/helm.sh",
        description="Score predictions of HELM's requests with HELM, and show all runs scored so far side by side.",
        epilog="The settings at the top of the script, or in the environment, come first; flags win over them.",
    )
    parser.add_argument("folders", nargs="*", type=as_path, help="run folders, in place of the flags that name one")
    FLAGS["pred"].add_to(
        parser, default=None, help="the task: xsum or cnndm (default: as the folders are called, or xsum)"
    )
    for name in CACHE:
        FLAGS[name].add_to(parser)
    parser.add_argument("--scenario", help=f"for requests of unknown origin: {', '.join(SCENARIOS)}")
    parser.add_argument("--articles", type=path_text, help="of xsum_local and cnndm_local")
    FLAGS["temperature"].add_to(parser, default=0.3, help="of requests of unknown origin (0.3)")
    FLAGS["sample_num"].add_to(parser, help="instances that HELM takes, for requests of unknown origin")
    args = parser.parse_args(argv)
    called = args.folders[0].parts[0] if args.folders and args.folders[0].parts else ""
    tasks = [benchmark.name for benchmark in HELM]
    args.pred = args.pred or next((task for task in tasks if called == f"pred_{task}"), "xsum")
    spec = named_run(args, "pred")
    if args.pred not in tasks:
        raise InputError(f"--pred must be {' or '.join(tasks)} here, got {args.pred}: eval.py scores LongBench")
    runs = [read_run(folder, args) for folder in args.folders or find_folders(spec)]
    known = score(args.pred, runs)
    for run in runs:
        write_result(run.folder, args.pred, RUNS / args.pred / known[run.engine]["run"])
    scored = [record for record in known.values() if "run" in record]
    for entry in dict.fromkeys(record["scenario"] for record in scored):
        print(f"{entry}; ROUGE in percent, KV is what is held after prefill")
        print(table(COLUMNS, [line(RUNS / args.pred, record) for record in scored if record["scenario"] == entry]))
    print(f"{RUNS / args.pred}, also as {RUNS / 'latest'}: helm-server -o {OUTPUT} --suite latest shows every answer")
