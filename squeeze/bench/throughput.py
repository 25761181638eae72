"""How many tokens a second come out of a memory that is used up, as the paper measures it (section 4.4)."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from squeeze.bench.files import speed, whole_speed
from squeeze.cli.tables import table
from squeeze.errors import InputError
from squeeze.storage.files import writing
from squeeze.text import printable

#: In what a process says that had too little memory, or was killed for it.
NO_MEMORY = re.compile("^(OutOfMemoryError|MemoryError|ended with code)|can't allocate memory")

#: Sizes of the paper's measurements of Mistral-7B: tokens of a prompt and after it, and batches.
PAPER = {"prompt_length": 512, "new_tokens": 1024, "batch_size": [1, 32, 64, 128, 224]}

#: Sizes by the name of a shape in `config/shapes`.
PRESETS: dict[str, dict[str, Any]] = {
    "mistral-7b": PAPER,
    "llama-2-7b": PAPER,
    "llama-3.1-8b": {"prompt_length": 8192, "new_tokens": 65, "batch_size": [1, 8, 32]},
}
COLUMNS = ("engine", "cache", "dtype", "batch", "tokens/s", "with prefill", "peak GB", "fits")


def named(spec: dict[str, Any]) -> str:
    """A cache whose batches are compared with each other."""
    return f"{spec['engine']}: {spec['cache']}, {spec['dtype']}"


def memory_of(device: str, limit_gb: float | None) -> float:
    """Bytes that a configuration may need: a limit, or all that the device has."""
    if limit_gb is not None:
        return 1e9 * limit_gb
    if device.startswith("cuda"):
        import torch  # takes seconds, which --help should not

        return float(torch.cuda.get_device_properties(device).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def fits(record: dict[str, Any], memory: float) -> bool | None:
    """Whether a configuration needed no more than `memory` bytes; None where it failed for another reason.

    A process that ended without a word was killed, and memory is why the system does that.
    """
    result = record["result"]
    if "error" in result:
        return False if NO_MEMORY.search(result["error"]) else None
    return bool(result["peak_bytes"] <= memory)


def shape(given: Path, out: Path) -> Path:
    """A folder with a configuration for a model whose weights are made up, below `out`; it is called as the shape is.

    Args:
        given: a `config.json` by any name, or a folder with one.
    Raises:
        InputError: there is none.
    """
    path = given / "config.json" if given.is_dir() else given
    if not path.is_file():
        raise InputError(f"--random_weights {printable(given)}: there is no {path.name}")
    named = path.absolute()
    folder = out.absolute() / "shapes" / (named.parent.name if named.name == "config.json" else named.stem)
    if folder / "config.json" == named:  # made by an earlier run
        return folder
    with writing(folder / "config.json"):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / "config.json")
    return folder


def largest(records: Sequence[dict[str, Any]], memory: float) -> dict[str, dict[str, Any]]:
    """Of each cache, the record of the largest batch that fits."""
    found: dict[str, dict[str, Any]] = {}
    for record in records:
        name = named(record["spec"])
        if fits(record, memory) and (
            name not in found or record["spec"]["batch_size"] > found[name]["spec"]["batch_size"]
        ):
            found[name] = record
    return found


def lines(records: Sequence[dict[str, Any]], memory: float) -> list[str]:
    """The table of all batches, and a sentence for each cache: its speed at full memory, against the full cache's.

    Raises:
        InputError: not even the smallest batch of any cache fits.
    """
    best = largest(records, memory)
    if not best:
        reasons = [record["result"]["error"] for record in records if fits(record, memory) is None]
        if reasons:
            raise InputError(f"nothing could be measured: {reasons[0]}")
        raise InputError(
            f"no batch fits into {memory / 1e9:.3g} GB: take a smaller --batch_size or --prompt_length, or more memory"
        )
    rows = []
    for record in records:
        spec, ran = record["spec"], "error" not in record["result"]
        row = {"engine": spec["engine"], "cache": spec["cache"], "dtype": spec["dtype"]}
        fitted = {True: "yes", False: "no", None: "failed"}[fits(record, memory)]
        row |= {"batch": str(spec["batch_size"]), "fits": fitted}
        if ran:
            row |= {"tokens/s": f"{speed(record):.1f}", "with prefill": f"{whole_speed(record):.1f}"}
            row |= {"peak GB": f"{record['result']['peak_bytes'] / 1e9:.2f}"}
        rows.append(dict.fromkeys(COLUMNS, "-") | row)
    said = [table(COLUMNS, rows)]
    full = {record["spec"]["dtype"]: speed(record) for record in best.values() if is_full(record["spec"])}
    for name, record in best.items():
        batch = record["spec"]["batch_size"]
        sentence = f"{name}: {speed(record):.1f} tokens/s at batch {batch}, the largest that fits"
        if not is_full(record["spec"]) and record["spec"]["dtype"] in full:
            ratio = speed(record) / full[record["spec"]["dtype"]]
            sentence += f": {ratio:.2f} times the full cache at its largest"
        said.append(sentence)
    return said


def is_full(spec: dict[str, Any]) -> bool:
    """Whether a configuration is transformers' own full cache."""
    return spec["engine"] == "transformers" and "budgets" not in spec
