"""HELM's prompts as a file of requests, by a dry run of HELM itself: `python -m squeeze.helm_requests --help`.

HELM chooses the instances and the in-context examples, builds the prompts, and leaves examples out until a prompt fits
into the model's window; `--model` is therefore part of what a prompt is.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from squeeze.benchmarks.requests import SAMPLE_NUM, note_path
from squeeze.cli.arguments import Parser, path_text
from squeeze.errors import InputError
from squeeze.helm.environment import ENVIRONMENT, OUTPUT, Deployment, find_model, helm, write_environment
from squeeze.helm.files import HelmRequest, RequestState, ScenarioState
from squeeze.models import sources
from squeeze.runs.spec import FLAGS, RunSpec
from squeeze.storage.files import Open, lock, read_json, to_jsonl, write_json, write_whole, writing
from squeeze.text import say, shortened


@dataclass(frozen=True)
class HelmScenario:
    """A scenario whose prompts `pred.py` runs.

    Args:
        run_spec: HELM's name for it.
        task: its name in `--pred`.
        local: whether it reads articles from a file, and needs nothing from outside.
    """

    run_spec: str
    task: str
    local: bool = False


SCENARIOS = {
    "xsum": HelmScenario("summarization_xsum", "xsum"),
    "xsum_sampled": HelmScenario("summarization_xsum_sampled", "xsum"),
    "cnndm": HelmScenario("summarization_cnndm", "cnndm"),
    "xsum_local": HelmScenario("xsum_local", "xsum", local=True),
    "cnndm_local": HelmScenario("cnndm_local", "cnndm", local=True),
}

#: Modules that HELM's own scenarios import, and the line of requirements-helm-full.txt that installs it.
FULL = {"summ_eval": "summ-eval", "bert_score": "bert-score", "sentencepiece": "sentencepiece"}


def run_entry(name: str, articles: str | None, temperature: float) -> str:
    """A scenario as `helm-run --run-entries` takes it, but for the model.

    Raises:
        InputError: there is no such scenario, or its articles are not there.
    """
    if name not in SCENARIOS:
        raise InputError(f"--scenario must be one of {', '.join(SCENARIOS)}, got {shortened(name)}")
    scenario = SCENARIOS[name]
    if not scenario.local:
        if articles is not None:
            raise InputError(f"--articles is for xsum_local and cnndm_local: {name} has HELM's own articles")
        return f"{scenario.run_spec}:temperature={temperature}"
    if articles is None:
        raise InputError(f'{name} needs --articles FILE, with a {{"document": ..., "summary": ...}} a line')
    if not Path(articles).is_file():
        raise InputError(f"the articles {articles} are not there")
    if set(",=:") & set(articles):
        raise InputError(f"HELM cannot read a file name with a comma, a colon or an equals sign: {articles}")
    return f"{scenario.run_spec}:articles={articles},temperature={temperature}"


def check_full() -> None:
    """Check that the modules and models of HELM's own summarization metrics are there.

    Raises:
        InputError: it names everything that is missing.
    """
    missing = [package for module, package in FULL.items() if importlib.util.find_spec(module) is None]
    command = "pip install --no-deps -r requirements-helm-full.txt"
    if importlib.util.find_spec("en_core_web_sm") is None:
        missing.append("the spaCy model en_core_web_sm")
        command += " and python -m spacy download en_core_web_sm"
    if missing:
        raise InputError(f"HELM's own scenario cannot be scored without {', '.join(missing)}: {command}")


def dry_run(entry: str, folder: Path, positions: int, sample_num: int) -> list[RequestState]:
    """HELM's request states for a run entry: its requests, and how many in-context examples each has.

    Args:
        folder: the model's, for its tokenizer.
        positions: the model's window.
        sample_num: the most instances.
    Raises:
        InputError: HELM fails.
    """
    name = "squeeze/requests"
    deployment = Deployment(
        name, "No model, only a tokenizer.", "ReplayClient", {"predictions": ""}, folder, positions
    )
    with _claim() as suite:
        environment, made = _folders(suite)
        write_environment(environment, [deployment])
        helm(
            "helm-run",
            *("--plugins", "squeeze.helm_plugin", "--local-path", str(environment), "-o", str(OUTPUT)),
            *("--suite", suite, "-m", str(sample_num), "-n", "1", "--disable-cache", "--dry-run"),
            *("--run-entries", f"{entry},model={name}"),
        )
        [state] = made.glob("*/scenario_state.json")
        return read_json(state, ScenarioState)["request_states"]


@contextmanager
def _claim() -> Iterator[str]:
    """A name for folders that are gone afterwards; those of processes that were killed go now."""
    with writing("into helm"):
        ENVIRONMENT.parent.mkdir(parents=True, exist_ok=True)
        for path in ENVIRONMENT.parent.glob(".requests-*.lock"):
            stale = lock(path)
            if stale is not None:
                _drop(path, stale)
        suite = f"requests-{secrets.randbelow(10**9)}"
        path = ENVIRONMENT.parent / f".{suite}.lock"
        held = lock(path)
    if held is None:
        raise InputError(f"{path} is locked by another process: start again")
    try:
        yield suite
    finally:
        _drop(path, held)


def _drop(path: Path, held: Open) -> None:
    """Remove the folders that a lock claims, and let go of it."""
    with held:
        for folder in _folders(path.name.removeprefix(".").removesuffix(".lock")):
            shutil.rmtree(folder, ignore_errors=True)
        path.unlink()


def _folders(suite: str) -> tuple[Path, Path]:
    """The folders of HELM's environment for a dry run, and of its results."""
    return ENVIRONMENT.with_name(suite), OUTPUT / "runs" / suite


def published(request: HelmRequest) -> dict[str, Any]:
    """One of HELM's requests in the published layout: as HELM has long put it to completion APIs."""
    body: dict[str, Any] = {
        "best_of": request["top_k_per_token"],
        "echo": request["echo_prompt"],
        "logprobs": request["top_k_per_token"],
        "max_tokens": request["max_tokens"],
        "model": request["model"].split("/")[-1],
        "n": request["num_completions"],
        "prompt": request["prompt"],
        "request_type": "language-model-inference",
        "stop": request["stop_sequences"],
        "temperature": request["temperature"],
        "top_p": request["top_p"],
    }
    return body | ({"random": request["random"]} if "random" in request else {})


def write_requests(args: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """Make the file of requests that the flags ask for, and the note beside it.

    Raises:
        InputError: a flag is wrong, a file would be lost, or HELM fails.
    """
    entry = run_entry(args.scenario, args.articles, args.temperature)
    out = Path(args.out or f"data/{SCENARIOS[args.scenario].task}.jsonl")
    if out.is_dir():
        raise InputError(f"--out {out} is a folder: give the name of a file")
    if out.exists() and not note_path(out).exists() and not args.overwrite:
        raise InputError(f"{out} is there and was not made by this command: --overwrite replaces it")
    name = sources.run_name(args.model)
    model = find_model(RunSpec(model=args.model, model_path=args.model_path))
    positions = model.positions
    states = dry_run(entry, model.folder, positions, args.sample_num)
    text = to_jsonl([{"request": published(state["request"]) | {"model": name}} for state in states])
    shots = [state["num_train_instances"] for state in states]
    note = {
        "scenario": args.scenario,
        "run_entry": entry,
        "max_eval_instances": args.sample_num,
        "model": name,
        "positions": positions,
        "requests": len(states),
        "with_fewer_examples": sum(count < max(shots) for count in shots),
        "truncated": sum(bool(state.get("prompt_truncated")) for state in states),
        "crfm_helm": version("crfm-helm"),
        "requests_sha256": hashlib.sha256(text.encode("utf-8")).hexdigest(),
    }
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(note_path(out), note)  # first: a file without a note would be taken for somebody else's
        write_whole(out, text)
    return out, note


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(
        prog="python -m squeeze.helm_requests",
        description="Write HELM's prompts as the file of requests that pred.py --pred xsum or cnndm reads.",
        epilog="HELM's own scenarios (xsum, xsum_sampled, cnndm) download their articles and unpickle them, which can "
        "run code: use them if you trust their source. xsum_local and cnndm_local read --articles, offline.",
    )
    parser.add_argument("--scenario", required=True, help=", ".join(SCENARIOS))
    FLAGS["model"].add_to(parser, required=True, help="as in pred.py: its tokenizer and window decide what fits")
    FLAGS["model_path"].add_to(parser)
    parser.add_argument(
        "--out", type=path_text, help="the file of requests (default: data/xsum.jsonl or data/cnndm.jsonl)"
    )
    parser.add_argument(
        "--articles", type=path_text, help='of xsum_local and cnndm_local: a {"document", "summary"} a line'
    )
    FLAGS["sample_num"].add_to(
        parser, default=SAMPLE_NUM, help=f"the most requests, which HELM samples ({SAMPLE_NUM})"
    )
    FLAGS["temperature"].add_to(parser, default=0.3, help="of sampling, 0 is greedy (HELM's own: 0.3)")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that this command did not make")
    out, note = write_requests(parser.parse_args(argv))
    say(f"{out}: {note['requests']} requests of {note['run_entry']}")
    if note["with_fewer_examples"] or note["truncated"]:
        print(
            f"note: to fit into {note['positions']} positions, {note['with_fewer_examples']} have fewer examples than "
            f"others and {note['truncated']} are cut"
        )
