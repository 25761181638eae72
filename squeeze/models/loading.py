"""A model's folder → the model and its tokenizer on a device, with errors that say what to do."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from squeeze.errors import InputError
from squeeze.models.described import check_weights
from squeeze.models.folder_config import generation_config, model_config, text_config
from squeeze.models.model_config import ModelConfig, read_config
from squeeze.models.model_files import inspect
from squeeze.models.packing import pack
from squeeze.models.rope import find_lengthwise, forward_name
from squeeze.text import message_of


def load_tokenizer(folder: Path, config: PretrainedConfig | None = None) -> PreTrainedTokenizerBase:
    """A model's tokenizer; InputError if its files are not whole."""
    if config is None:
        config = model_config(folder)
    try:
        # Not by mistral-common, which reads other files, only because it happens to be installed.
        tokenizer = AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False, mistral_format=False)
        tokenizer("a")  # some of its settings are looked at only when it is used
        return tokenizer
    except Exception as error:
        raise InputError(f"the tokenizer in {folder} cannot be loaded: {message_of(error)}") from error


def load(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    attn: str = "auto",
    allow_pickle: bool = False,
    device_map: str | dict[str, Any] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer for inference, without running code that came with them.

    Of the folder's configuration only the architecture and the special tokens count
    (`squeeze.models.folder_config`). On the CPU the linear layers are packed (`squeeze.models.packing`).

    Args:
        folder: from `fetch`.
        attn: `auto` (sdpa where the architecture has it, else eager), `sdpa`, `eager` or `flash_attention_2`.
        device_map: accelerate's, in place of `device`, for a model that is larger than one device.
    Raises:
        InputError: the files are not a whole model, or a package is not installed that it or `attn` needs.
    """
    (weights, tensors), facts, config = inspect(folder, allow_pickle), read_config(folder), model_config(folder)
    check_weights(folder, config, tensors, quantized=facts.quantization is not None)
    tokenizer = load_tokenizer(folder, config)
    # transformers would take weights of a quantization that it does not know as they are.
    if facts.quantization not in (None, "bitsandbytes", *AUTO_QUANTIZATION_CONFIG_MAPPING):
        known = ", ".join(sorted(AUTO_QUANTIZATION_CONFIG_MAPPING))
        raise InputError(f"{_quantized(folder, facts)}, which transformers does not know: it knows {known}")
    generation = generation_config(folder, text_config(config).vocab_size, tokenizer)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            generation_config=generation,
            dtype=dtype,
            attn_implementation=None if attn == "auto" else attn,  # sdpa, where the architecture has it
            use_safetensors=not weights.pickled,
            trust_remote_code=False,
            device_map=device_map or {"": device},
            offload_folder=_offload_folder() if device_map else None,
            output_loading_info=True,
        )
    except torch.OutOfMemoryError:
        raise InputError(f"the model in {folder} does not fit on {device} in {dtype}") from None
    except Exception as error:
        if facts.quantization is not None:
            raise InputError(
                f"{_quantized(folder, facts)}, which cannot be loaded here: {message_of(error)}"
            ) from error
        if isinstance(error, ImportError) and attn == "flash_attention_2":
            raise InputError(f"--attn {attn} is not installed here: {message_of(error)}") from error
        raise InputError(f"the model in {folder} cannot be loaded: {message_of(error)}") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise InputError(f"the weights in {folder} lack {len(missing)} tensors of the model, among them {missing[0]}")
    try:
        if device_map is None:
            pack(model)
    except Exception as error:  # whatever an architecture's forward pass raises
        raise InputError(f"the model in {folder} cannot be run: {message_of(error)}") from error
    for name, buffer in model.named_buffers():
        if "inv_freq" in name and not buffer.isfinite().all():
            raise InputError(f"{folder / 'config.json'}: RoPE has no finite frequencies ({name}): see rope_parameters")
    for rotary, lengthwise in find_lengthwise(model):
        setattr(rotary, forward_name(rotary), lengthwise)
    return model.eval(), tokenizer


def _quantized(folder: Path, config: ModelConfig) -> str:
    return f"the weights in {folder} are quantized by {config.quantization} (quantization_config in config.json)"


def _offload_folder() -> str:
    """A folder for weights that accelerate finds no memory for; gone with this process."""
    folder = tempfile.mkdtemp(prefix="squeeze-offload-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
