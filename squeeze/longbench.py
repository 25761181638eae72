"""LongBench v1 and LongBench-E as their own runner has them: data sets, rows and prompts.

Bai et al., LongBench: A Bilingual, Multitask Benchmark for Long Context Understanding (arXiv 2308.14508). Prompts
and generation lengths are in `config/dataset2prompt.json` and `config/dataset2maxlen.json`, in LongBench's layout.
`python -m squeeze.longbench download` fetches and checks the data.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError

from squeeze.arguments import Parser
from squeeze.config import InputError, shortened
from squeeze.files import parse_jsonl, read_bytes
from squeeze.flags import run_command
from squeeze.models import quiet_hub

CONFIG = Path(__file__).resolve().parent.parent / "config"
HUB_DATASET = "THUDM/LongBench"
FIELDS = ("input", "context", "answers", "length", "all_classes")

#: LongBench-E: other rows of these, about as many of each length; their files end in `_e`.
LONGBENCH_E = (
    *("qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "gov_report", "multi_news", "trec", "triviaqa", "samsum"),
    *("passage_count", "passage_retrieval_en", "lcc", "repobench-p"),
)

#: Rows of each data set as published, where they are not 200.
ROWS = {"multifieldqa_en": 150, "lcc": 500, "repobench-p": 500}
CLASSIFICATION = frozenset({"trec", "lsht"})

#: What an answer of these starts with, before a number.
PARAGRAPH = {"passage_retrieval_en": "Paragraph ", "passage_retrieval_zh": "段落"}


@cache
def prompt_formats() -> dict[str, str]:
    """The prompt of each of the 21 data sets, with `{context}` and `{input}` to fill in."""
    return json.loads((CONFIG / "dataset2prompt.json").read_text(encoding="utf-8"))


@cache
def generation_lengths() -> dict[str, int]:
    """The most tokens to generate for each of the 21 data sets."""
    return json.loads((CONFIG / "dataset2maxlen.json").read_text(encoding="utf-8"))


def dataset_names(text: str, task: str = "Long") -> list[str]:
    """Read a comma-separated list of data sets; `all` is every one.

    Args:
        task: `Long`, or `e` for LongBench-E.
    Raises:
        InputError: a name is none of LongBench's.
    """
    known = LONGBENCH_E if task == "e" else tuple(prompt_formats())
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise InputError("--datasets names no data set")
    if names == ["all"]:
        return list(known)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name[:80], known, cutoff=0.5) or sorted(known)
            benchmark = "LongBench-E" if task == "e" else "LongBench"
            raise InputError(f"unknown data set {shortened(name)}: {benchmark} has {', '.join(near)}, or all")
    return names


@dataclass(frozen=True)
class Data:
    """One data set's rows, and which rows they are.

    Args:
        dataset: its name.
        rows: LongBench's rows, in order.
        source: the file, or the Hub's data set.
        revision: the Hub's revision, None for a local file.
        sha256: of the JSON Lines file.
    """

    dataset: str
    rows: list[dict[str, Any]]
    source: str
    revision: str | None
    sha256: str

    def count(self, sample_num: int | None) -> int:
        """How many rows a run takes that asked for `sample_num` of them, or for all."""
        return min(sample_num or len(self.rows), len(self.rows))

    @property
    def settings(self) -> dict[str, Any]:
        """What changes the results, for `Run.open`."""
        return {
            "data_sha256": self.sha256,
            "prompt_format": prompt_formats()[self.dataset],
            "max_new_tokens": generation_lengths()[self.dataset],
        }

    @property
    def origin(self) -> dict[str, Any]:
        """What `run.json` says about the rows."""
        return {"source": self.source, "revision": self.revision, "sha256": self.sha256, "rows": len(self.rows)}


def load_data(dataset: str, data_dir: str | None, task: str = "Long") -> Data:
    """Read a data set from `data_dir/<dataset>.jsonl`, or, without a folder, from the Hub.

    Args:
        task: `Long`, or `e` for LongBench-E, whose files end in `_e.jsonl`.
    Raises:
        InputError: the file is not there, or a row is not one of LongBench's.
    """
    name = f"{dataset}_e" if task == "e" else dataset
    content, source, revision = _local_file(name, data_dir) if data_dir is not None else _hub_file(name)
    rows = []
    for number, row in parse_jsonl(content, source, FIELDS):
        _check_row(row, dataset, f"{source} line {number}")
        rows.append(row)
    return Data(dataset, rows, source, revision, hashlib.sha256(content).hexdigest())


def _local_file(name: str, data_dir: str) -> tuple[bytes, str, None]:
    path = Path(data_dir) / f"{name}.jsonl"
    if not path.is_file():
        there = sorted(file.stem for file in Path(data_dir).glob("*.jsonl"))
        raise InputError(f"{path} is not there: {data_dir} has {', '.join(there) if there else 'no .jsonl file'}")
    return read_bytes(path), str(path), None


def _hub_file(name: str) -> tuple[bytes, str, str | None]:
    file: dict[str, Any] = {"repo_id": HUB_DATASET, "filename": "data.zip", "repo_type": "dataset"}
    try:
        with quiet_hub():
            cached = try_to_load_from_cache(**file)
            archive = Path(cached if isinstance(cached, str) else hf_hub_download(**file))
    except (HfHubHTTPError, OSError) as error:
        raise InputError(
            f"{HUB_DATASET} cannot be read from the Hugging Face Hub and is not cached ({type(error).__name__}): "
            f"unpack its data.zip on a machine with a network and pass --data_dir FOLDER "
            f"(--data_dir data/longbench has the project's own small demo set)"
        ) from None
    member = f"data/{name}.jsonl"
    try:
        with zipfile.ZipFile(archive) as files:
            return files.read(member), f"{HUB_DATASET}/{member}", archive.parent.name
    except KeyError:
        raise InputError(f"{archive} has no {member}") from None
    except zipfile.BadZipFile:
        raise InputError(f"{archive} is no whole zip file: delete it, so that it is downloaded again") from None


def _check_row(row: dict[str, Any], dataset: str, where: str) -> None:
    for field in ("input", "context"):
        if not isinstance(row[field], str):
            raise InputError(f"{where}: {field} is not text")
    if not (row["input"] + row["context"]).strip():
        raise InputError(f"{where}: the prompt is empty, input and context are both blank")
    if row.get("dataset", dataset) in prompt_formats().keys() - {dataset}:
        raise InputError(f"{where} is a row of {row['dataset']}, not of {dataset}")
    check_lists(row, dataset, where)
    if not isinstance(row["length"], int):
        raise InputError(f"{where}: length is not a whole number")


def check_lists(row: dict[str, Any], dataset: str, where: str) -> None:
    """Check the answers and classes of a row or a prediction.

    Raises:
        InputError: they are not what the data set's metric needs.
    """
    answers, classes = row["answers"], row["all_classes"]
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise InputError(f"{where}: answers is not a list of texts")
    if classes is not None and not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        raise InputError(f"{where}: all_classes is neither a list of texts nor null")
    if dataset in CLASSIFICATION and not classes:
        raise InputError(f"{where}: all_classes is empty, and {dataset} is scored by it")
    if dataset in PARAGRAPH and not all(re.search(PARAGRAPH[dataset] + r"\d", answer) for answer in answers):
        raise InputError(f"{where}: an answer does not name a paragraph, as in {PARAGRAPH[dataset]}1")


def build_prompt(dataset: str, row: dict[str, Any]) -> str:
    """Fill a row into its data set's prompt."""
    return prompt_formats()[dataset].format(**row)


def download() -> None:
    """Fetch LongBench from the Hub, unless it is cached, and check every row of every data set.

    Raises:
        InputError: it cannot be read, a row is not one of LongBench's, or rows are missing.
    """
    for task, datasets in (("Long", tuple(prompt_formats())), ("e", LONGBENCH_E)):
        for dataset in datasets:
            data = load_data(dataset, None, task)
            expected = ROWS.get(dataset, 200)
            if task == "Long" and len(data.rows) != expected:
                raise InputError(f"{data.source} has {len(data.rows)} rows, and LongBench published {expected}")
            print(f"{data.source}: {len(data.rows)} rows, sha256 {data.sha256[:16]}, revision {data.revision}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="python -m squeeze.longbench", description="Get LongBench's data from the Hugging Face Hub.")
    parser.add_argument("command", choices=["download"], help="fetch everything once, and check every row")
    parser.parse_args(argv)
    download()


if __name__ == "__main__":
    sys.exit(run_command(main))
