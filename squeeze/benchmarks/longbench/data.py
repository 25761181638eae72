"""LongBench v1 and LongBench-E as their own runner has them: data sets, rows and prompts.

Bai et al., LongBench: A Bilingual, Multitask Benchmark for Long Context Understanding (arXiv 2308.14508). Prompts
and generation lengths are in `config/dataset2prompt.json` and `config/dataset2maxlen.json`, in LongBench's layout.
`python -m squeeze.longbench download` fetches and checks the data.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, NotRequired, TypedDict

from msgspec import Meta

from squeeze.benchmarks.base import DataSet
from squeeze.benchmarks.records import Prediction
from squeeze.errors import InputError
from squeeze.storage.files import parse_jsonl, read_bytes, read_json
from squeeze.storage.paths import config_file, shipped
from squeeze.storage.schema import Count, Positive
from squeeze.text import shortened

HUB_DATASET = "THUDM/LongBench"

#: LongBench-E: other rows of these, about as many of each length; their files end in `_e`.
LONGBENCH_E = (
    *("qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "gov_report", "multi_news", "trec", "triviaqa", "samsum"),
    *("passage_count", "passage_retrieval_en", "lcc", "repobench-p"),
)

CLASSIFICATION = frozenset({"trec", "lsht"})

#: The start of an answer of these, before a number.
PARAGRAPH = {"passage_retrieval_en": "Paragraph ", "passage_retrieval_zh": "段落"}


class Row(TypedDict):
    """A row as LongBench publishes it; others of its fields are kept."""

    input: str
    context: str
    answers: Annotated[list[str], Meta(min_length=1)]
    length: Count
    all_classes: list[str] | None
    dataset: NotRequired[str | None]


@cache
def prompt_formats() -> dict[str, str]:
    """The prompt of each of the 21 data sets, with `{context}` and `{input}` to fill in.

    Raises:
        InputError: the file has been edited, and a prompt asks for something else.
    """
    path = config_file("dataset2prompt.json")
    formats = read_json(path, dict[str, str])
    for dataset, text in formats.items():
        try:
            asked = [part for part in Formatter().parse(text) if part[1] is not None]
        except ValueError as error:
            raise InputError(f"{path}: {dataset} cannot be filled in: {error}") from None
        for _, name, layout, conversion in asked:
            if name not in ("context", "input") or layout or conversion:
                raise InputError(f"{path}: {dataset} asks for {{{name}}}: there are {{context}} and {{input}} only")
    return formats


@cache
def generation_lengths() -> dict[str, int]:
    """The most tokens to generate for each of the 21 data sets."""
    path = config_file("dataset2maxlen.json")
    lengths = read_json(path, dict[str, Positive])
    for dataset in prompt_formats().keys() - lengths.keys():
        raise InputError(f"{path} has no field {dataset}")
    return lengths


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
class Data(DataSet):
    """One data set's rows, `Row`, from a local file, or from the Hub at a `revision`."""

    revision: str | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that change the results: the rows, the prompt and the length of the answer."""
        return {
            "data_sha256": self.sha256,
            "prompt_format": prompt_formats()[self.dataset],
            "max_new_tokens": generation_lengths()[self.dataset],
        }

    @property
    def origin(self) -> dict[str, Any]:
        """Facts for `run.json` on the rows."""
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
    for number, row in parse_jsonl(content, source, Row):
        _check_row(row, dataset, f"{source} line {number}")
        rows.append(row)
    return Data(dataset, rows, source, hashlib.sha256(content).hexdigest(), revision)


def _local_file(name: str, data_dir: str) -> tuple[bytes, str, None]:
    path = Path(data_dir) / f"{name}.jsonl"
    if not path.is_file():
        there = sorted(file.stem for file in Path(data_dir).glob("*.jsonl"))
        raise InputError(f"{path} is not there: {data_dir} has {', '.join(there) if there else 'no .jsonl file'}")
    return read_bytes(path), str(path), None


def _hub_file(name: str) -> tuple[bytes, str, str | None]:
    # A fifth of a second to import, of which --help knows nothing.
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    from squeeze.models.sources import quiet_hub

    file: dict[str, Any] = {"repo_id": HUB_DATASET, "filename": "data.zip", "repo_type": "dataset"}
    try:
        with quiet_hub():
            cached = try_to_load_from_cache(**file)
            archive = Path(cached if isinstance(cached, str) else hf_hub_download(**file))
    except (HfHubHTTPError, OSError) as error:
        raise InputError(
            f"{HUB_DATASET} cannot be read from the Hugging Face Hub and is not cached ({type(error).__name__}): "
            f"unpack its data.zip on a machine with a network and pass --data_dir FOLDER "
            f"(--data_dir {os.path.relpath(shipped('data/longbench'))} has the project's own small demo set)"
        ) from None
    member = f"data/{name}.jsonl"
    try:
        with zipfile.ZipFile(archive) as files:
            return files.read(member), f"{HUB_DATASET}/{member}", archive.parent.name
    except KeyError:
        raise InputError(f"{archive} has no {member}") from None
    except zipfile.BadZipFile:
        raise InputError(f"{archive} is no whole zip file: delete it, so that it is downloaded again") from None


def _check_row(row: Row, dataset: str, where: str) -> None:
    if not (row["input"] + row["context"]).strip():
        raise InputError(f"{where}: the prompt is empty, input and context are both blank")
    other = row.get("dataset")
    if other != dataset and other in prompt_formats():
        raise InputError(f"{where} is a row of {other}, not of {dataset}")
    check_lists(row, dataset, where)


def check_lists(row: Row | Prediction, dataset: str, where: str) -> None:
    """Check the answers and classes of a row or a prediction.

    Raises:
        InputError: they are not what the data set's metric needs.
    """
    if dataset in CLASSIFICATION and not row["all_classes"]:
        raise InputError(f"{where}: all_classes is empty, and {dataset} is scored by it")
    if dataset in PARAGRAPH and not all(re.search(PARAGRAPH[dataset] + r"\d", answer) for answer in row["answers"]):
        raise InputError(f"{where}: an answer does not name a paragraph, as in {PARAGRAPH[dataset]}1")


def after_context(dataset: str, row: Row) -> str:
    """The part of a row's prompt that follows on its context."""
    return prompt_formats()[dataset].rpartition("{context}")[2].format(**row)


def build_prompt(dataset: str, row: Row) -> str:
    """Fill a row into its data set's prompt."""
    return prompt_formats()[dataset].format(**row)
