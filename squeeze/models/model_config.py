"""What a model's `config.json` says of its files; the architecture in it is for `folder_config.py`. No torch."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import msgspec

from squeeze.errors import InputError
from squeeze.storage.files import read_bytes
from squeeze.storage.schema import check, decode

#: Infinity as Python writes it, which is no JSON, in the place of a value; and as transformers writes it today.
INFINITE = re.compile(rb"([\[,:]\s*)(-?)Infinity(?=\s*[,\]}])")
TAGGED = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that are read before transformers is asked."""

    model_type: str = ""
    transformers_weights: str | None = None
    quantization_config: dict[str, Any] | None = None
    configuration_files: Any = None
    auto_map: Any = None

    @property
    def quantization(self) -> str | None:
        """Name of the method that quantized the weights: None if none did, empty if `quantization_config` lacks it."""
        settings = self.quantization_config
        if settings is None:
            return None
        if settings.get("load_in_4bit") is True or settings.get("load_in_8bit") is True:
            return "bitsandbytes"
        method = settings.get("quant_method")
        return method if isinstance(method, str) and method != "bitsandbytes" else ""


def read_settings(folder: Path) -> dict[str, Any]:
    """Everything in a model's `config.json`; InputError if it is no JSON object."""
    path = folder / "config.json"
    data = INFINITE.sub(rb'\1{"__float__": "\2Infinity"}', read_bytes(path))
    return {name: _number(value) for name, value in decode(data, dict[str, Any], path).items()}


def _number(value: Any) -> Any:
    """A value of `config.json` with the numbers that JSON has not."""
    if isinstance(value, list):
        return [_number(one) for one in value]
    if isinstance(value, dict):
        tag = value.get("__float__")
        return (
            TAGGED[tag]
            if isinstance(tag, str) and tag in TAGGED
            else {name: _number(one) for name, one in value.items()}
        )
    return value


def read_config(folder: Path) -> ModelConfig:
    """Read the part of a model's `config.json` that says what kind of model it is and how its files are to be read.

    Raises:
        InputError: it is no JSON object, names no architecture, or makes something of the model that is not supported.
    """
    path = folder / "config.json"
    config = check(read_settings(folder), ModelConfig, str(path))
    if not config.model_type:
        raise InputError(f"the model of {path} has no model_type, such as llama")
    if config.configuration_files is not None:
        raise InputError(
            f"{path}: configuration_files names other files to read in its place: put what is meant into config.json"
        )
    if config.quantization == "":
        raise InputError(
            f"{path}: quantization_config has no quant_method (or of bitsandbytes, no true load_in_4bit or "
            "load_in_8bit)"
        )
    return config
