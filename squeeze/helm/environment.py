"""HELM's description of a squeezed model (`prod_env`), and running its commands.

`python -m squeeze.helm_env --model Mistral --ini_size 0.4 --KV_class3 0.25` writes it for a live model, which any HELM
scenario can then be run on.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from squeeze.cli.arguments import Parser, path_text
from squeeze.compatibility import install
from squeeze.errors import InputError
from squeeze.runs.flags import named_run
from squeeze.runs.folder import run_folder
from squeeze.runs.resolve import Model, reader, resolve
from squeeze.runs.spec import CACHE, FLAGS, MODEL_MISSING, RunSpec
from squeeze.storage.files import Open, read_bytes, write_whole, writing
from squeeze.storage.paths import ROOT
from squeeze.text import say

#: Where everything of HELM's lies, relative to the working directory.
OUTPUT = Path("helm/benchmark_output")
ENVIRONMENT = Path("helm/prod_env")
LOGS = Path("helm/logs")

MARK = "# Written by this project's HELM commands, which may write it again.\n"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class Deployment:
    """A model as HELM knows it.

    Args:
        name: `squeeze/<engine>`.
        description: one sentence.
        client: the class of `squeeze.helm_client` that answers for it.
        args: of the class.
        folder: the model's, for its tokenizer.
        positions: the most tokens of prompt and completion together.
    """

    name: str
    description: str
    client: str
    args: dict[str, Any]
    folder: Path
    positions: int


def engine(run: Path) -> str:
    """HELM's name for the model of a run's folder: `pred_xsum/Mistral/0.4/25` is `Mistral_0.4_25`."""
    return "_".join(run.parts[1:])


def find_model(spec: RunSpec) -> Model:
    """A run's model, whose tokenizer is there; its weights need not be.

    Raises:
        InputError: there is no such model, it has no tokenizer, or a size is out of its range.
    """
    model = resolve(spec, reader(), weights=False)
    if not any((model.folder / name).is_file() for name in TOKENIZER_FILES):
        raise InputError(f"the model folder {model.folder} has no tokenizer ({', '.join(TOKENIZER_FILES)})")
    return model


def write_environment(folder: Path, deployments: Sequence[Deployment]) -> None:
    """Write HELM's three configuration files.

    Raises:
        InputError: a file of that name is there that was not written by this function.
    """
    described = [
        {
            "name": deployment.name,
            "display_name": deployment.name.removeprefix("squeeze/"),
            "description": deployment.description,
            "creator_organization_name": "squeeze",
            "access": "open",
            "release_date": None,
            "tags": ["TEXT_MODEL_TAG", "FULL_FUNCTIONALITY_TEXT_MODEL_TAG"],
        }
        for deployment in deployments
    ]
    deployed = [
        {
            "name": deployment.name,
            "model_name": deployment.name,
            "tokenizer_name": deployment.name,
            "max_sequence_length": deployment.positions,
            "client_spec": {"class_name": f"squeeze.helm_client.{deployment.client}", "args": deployment.args},
        }
        for deployment in deployments
    ]
    tokenizers = [
        {
            "name": deployment.name,
            "tokenizer_spec": {
                "class_name": "helm.tokenizers.huggingface_tokenizer.HuggingFaceTokenizer",
                "args": {"pretrained_model_name_or_path": str(deployment.folder), "trust_remote_code": False},
            },
        }
        for deployment in deployments
    ]
    contents = {
        "model_metadata.yaml": {"models": described},
        "model_deployments.yaml": {"model_deployments": deployed},
        "tokenizer_configs.yaml": {"tokenizer_configs": tokenizers},
    }
    for name in contents:
        path = folder / name
        if path.exists() and not (path.is_file() and read_bytes(path).startswith(MARK.encode())):
            raise InputError(f"{path} is there and was not written by this project: move it away")
    with writing(f"into {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            write_whole(folder / name, MARK + yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


class HelmError(InputError):
    """A command of HELM's has failed; `code` is its exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def helm(command: str, *arguments: str) -> None:
    """Run `helm-run` or `helm-summarize` of this environment; its output goes to a file in `helm/logs`.

    Raises:
        HelmError: it failed; the message has the log's path and its last error.
        InputError: HELM is not installed.
    """
    program = Path(sys.executable).with_name(command)
    if not program.exists():
        raise InputError(f"{command} is not in {program.parent}: {install('helm', 'requirements-helm.txt')}")
    log = LOGS / f"{command}.log"
    # HELM does not look for plugins and clients in the working directory.
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
    with writing(log):
        LOGS.mkdir(parents=True, exist_ok=True)
        file = Open(log, os.O_WRONLY | os.O_CREAT)
    with file:
        os.ftruncate(file.number, 0)
        streams: Any = {"stdout": file.number, "stderr": subprocess.STDOUT}
        done = subprocess.run([str(program), *arguments], env=environment, **streams)
    if done.returncode:
        last = last_error(log.read_text("utf-8", errors="replace"))
        raise HelmError(
            f"{command} failed with exit code {done.returncode}: {last} (all of it: {log})", done.returncode
        )


def last_error(log: str) -> str:
    """The last line with an exception and its message, other than HELM's own summary of failed runs."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b:?", line)]
    told = [line for line in errors if "Failed runs:" not in line]
    line = next(iter(reversed(told or errors or lines)), "it printed nothing")
    return line if len(line) <= 500 else line[:497] + "..."


def live(spec: RunSpec) -> Deployment:
    """The deployment of a model that is run while HELM asks, with a full or a squeezed cache.

    Raises:
        InputError: there is no such model, it has no tokenizer, or a size is out of its range.
    """
    model = find_model(spec)
    name, squeeze = model.source.name, model.config
    run = run_folder("live", name, squeeze, model.kind, spec.seed)
    cache: dict[str, Any] = {}
    if squeeze is not None:
        cache = {"ini_size": spec.ini_size, "KV_class3": spec.KV_class3, "algorithm": squeeze.algorithm}
        cache |= {"allocation": squeeze.allocation, "start_size": squeeze.start_size}
        cache |= {"per": squeeze.per} if squeeze.per != "layer" else {}
        cache = {key: value for key, value in cache.items() if value is not None}
    rest = {"device": spec.device, "dtype": spec.dtype, "seed": spec.seed, "chat": spec.chat}
    words = [f"{key} {value}" for key, value in cache.items()] or ["full cache"]
    return Deployment(
        name=f"squeeze/{engine(run)}",
        description=", ".join([name, *words]),
        client="SqueezeClient",
        args={"model": str(model.folder), **cache, **rest},
        folder=model.folder,
        positions=model.positions,
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(
        prog="python -m squeeze.helm_env",
        description="Write what HELM needs to run any of its scenarios on a squeezed model.",
    )
    for name in CACHE:
        FLAGS[name].add_to(parser)
    FLAGS["device"].add_to(parser, help="cpu, cuda or cuda:N (default: the first GPU if there is one, else the CPU)")
    FLAGS["dtype"].add_to(parser, help="auto, float32, bfloat16 or float16 (default: auto)")
    FLAGS["chat"].add_to(parser, help="put prompts into the tokenizer's chat template")
    parser.add_argument("--out", type=path_text, default=str(ENVIRONMENT), help=f"the folder (default: {ENVIRONMENT})")
    args = parser.parse_args(argv)
    if args.model is None:
        raise InputError(MODEL_MISSING)
    deployment = live(named_run(args, "device", "dtype", "chat"))
    write_environment(Path(args.out), [deployment])
    say(f"{args.out}: {deployment.name}; now, for example")
    print(
        f"  PYTHONPATH={ROOT} helm-run --plugins squeeze.helm_plugin --local-path {args.out} --suite live "
        f"-n 1 -o {OUTPUT} -m 10 --run-entries simple_mcqa:model={deployment.name}"
    )
