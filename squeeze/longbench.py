"""LongBench v1 as its own runner does it: data, prompts, truncation and stop rules.

Bai et al., LongBench: A Bilingual, Multitask Benchmark for Long Context Understanding (arXiv 2308.14508). Prompts
and generation lengths are in `config/dataset2prompt.json` and `config/dataset2maxlen.json`, in LongBench's layout.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError

from squeeze.config import InputError
from squeeze.files import parse_jsonl, read_bytes
from squeeze.models import quiet_hub

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

CONFIG = Path(__file__).resolve().parent.parent / "config"
HUB_DATASET = "THUDM/LongBench"
FIELDS = ("input", "context", "answers", "length", "all_classes")

#: Few-shot and code-completion data sets are given to chat models as they are, too.
NO_CHAT = frozenset({"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"})


@cache
def prompt_formats() -> dict[str, str]:
    """The prompt of each of the 21 data sets, with `{context}` and `{input}` to fill in."""
    return json.loads((CONFIG / "dataset2prompt.json").read_text(encoding="utf-8"))


@cache
def generation_lengths() -> dict[str, int]:
    """The most tokens to generate for each of the 21 data sets."""
    return json.loads((CONFIG / "dataset2maxlen.json").read_text(encoding="utf-8"))


def dataset_names(text: str) -> list[str]:
    """Read a comma-separated list of data sets.

    Raises:
        InputError: a name is none of LongBench's.
    """
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise InputError("--datasets names no data set")
    for name in names:
        if name not in prompt_formats():
            near = difflib.get_close_matches(name, prompt_formats(), cutoff=0.5) or sorted(prompt_formats())
            raise InputError(f"unknown data set {name}: LongBench has {', '.join(near)}")
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
    def origin(self) -> dict[str, Any]:
        """What `run.json` says about the rows."""
        return {"source": self.source, "revision": self.revision, "sha256": self.sha256, "rows": len(self.rows)}


def load_data(dataset: str, data_dir: str | None) -> Data:
    """Read a data set from `data_dir/<dataset>.jsonl`, or, without a folder, from the Hub.

    Raises:
        InputError: the file is not there, or a row is not one of LongBench's.
    """
    content, source, revision = _local_file(dataset, data_dir) if data_dir is not None else _hub_file(dataset)
    rows = []
    for number, row in parse_jsonl(content, source, FIELDS):
        _check_row(row, f"{source} line {number}")
        rows.append(row)
    return Data(dataset, rows, source, revision, hashlib.sha256(content).hexdigest())


def _local_file(dataset: str, data_dir: str) -> tuple[bytes, str, None]:
    path = Path(data_dir) / f"{dataset}.jsonl"
    if not path.is_file():
        there = sorted(file.stem for file in Path(data_dir).glob("*.jsonl"))
        raise InputError(f"{path} is not there: {data_dir} has {', '.join(there) if there else 'no .jsonl file'}")
    return read_bytes(path), str(path), None


def _hub_file(dataset: str) -> tuple[bytes, str, str | None]:
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
    name = f"data/{dataset}.jsonl"
    try:
        with zipfile.ZipFile(archive) as files:
            return files.read(name), f"{HUB_DATASET}/{name}", archive.parent.name
    except KeyError:
        raise InputError(f"{archive} has no {name}") from None
    except zipfile.BadZipFile:
        raise InputError(f"{archive} is no whole zip file: delete it, so that it is downloaded again") from None


def _check_row(row: dict[str, Any], where: str) -> None:
    for field in ("input", "context"):
        if not isinstance(row[field], str):
            raise InputError(f"{where}: {field} is not text")
    if not (row["input"] + row["context"]).strip():
        raise InputError(f"{where}: the prompt is empty, input and context are both blank")
    answers, classes = row["answers"], row["all_classes"]
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise InputError(f"{where}: answers is not a list of texts")
    if classes is not None and not isinstance(classes, list):
        raise InputError(f"{where}: all_classes is neither a list nor null")
    if not isinstance(row["length"], int):
        raise InputError(f"{where}: length is not a whole number")


def build_prompt(dataset: str, row: dict[str, Any]) -> str:
    """Fill a row into its data set's prompt."""
    return prompt_formats()[dataset].format(**row)


def data_settings(data: Data) -> dict[str, Any]:
    """What changes the results of one data set, for `Run.open`."""
    return {
        "data_sha256": data.sha256,
        "prompt_format": prompt_formats()[data.dataset],
        "max_new_tokens": generation_lengths()[data.dataset],
    }


def is_chat_model(model_name: str) -> bool:
    """Whether LongBench's runner gives this model a chat format: of those it knows, the names with `llama2`."""
    return "llama2" in model_name


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, dataset: str, prompt: str, max_length: int, model_name: str
) -> torch.Tensor:
    """Turn a prompt into tokens: one that is too long keeps its first and last halves, then comes the chat format.

    Args:
        max_length: the most tokens of the prompt, before the chat format.
        model_name: decides on the chat format.
    Returns:
        Token ids, (tokens,).
    """
    tokens = tokenizer(prompt, truncation=False).input_ids
    if len(tokens) > max_length:
        half = max_length // 2
        first = tokenizer.decode(tokens[:half], skip_special_tokens=True)
        prompt = first + tokenizer.decode(tokens[-half:], skip_special_tokens=True)
    if dataset not in NO_CHAT and is_chat_model(model_name):
        prompt = f"[INST]{prompt}[/INST]"
    return tokenizer(prompt, truncation=False, return_tensors="pt").input_ids[0]


def generation_settings(tokenizer: PreTrainedTokenizerBase, dataset: str) -> dict[str, Any]:
    """What LongBench passes to `generate`: greedy, and for samsum a stop at a newline that is not the first token."""
    settings: dict[str, Any] = {"max_new_tokens": generation_lengths()[dataset], "num_beams": 1, "do_sample": False}
    if dataset == "samsum":
        newline = tokenizer.encode("\n", add_special_tokens=False)[-1]
        settings |= {"min_new_tokens": 1, "eos_token_id": [tokenizer.eos_token_id, newline]}
    return settings
