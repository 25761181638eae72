"""The model that a configuration describes, on PyTorch's `meta` device: all of its shapes and none of its numbers.

Which tensors its weights must have, under whatever names they were saved, is asked of transformers' own code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from math import prod
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from squeeze.errors import InputError
from squeeze.models.folder_config import text_config
from squeeze.models.model_files import Tensor
from squeeze.text import shortened

META = torch.device("meta")


def build(config: PretrainedConfig) -> PreTrainedModel:
    """A configuration's model; whatever transformers raises where it describes none."""
    with META:
        return AutoModelForCausalLM.from_config(deepcopy(config), dtype=torch.bfloat16, attn_implementation="eager")


def check_weights(folder: Path, config: PretrainedConfig, tensors: Mapping[str, Tensor], quantized: bool) -> None:
    """Compare the model that `config.json` describes with the weights that are there, without reading any of them.

    Raises:
        InputError: it describes no model, or the weights are another model's, lack some of its tensors, or are
            quantized and `config.json` does not say how.
    """
    path = folder / "config.json"
    text, numbers = text_config(config), sum(prod(tensor.shape) for tensor in tensors.values())
    for name, most in {"num_hidden_layers": len(tensors), "hidden_size": numbers, "head_dim": numbers}.items():
        size = getattr(text, name, None) or 0
        if size > most:  # which would be built for hours
            things = "tensors" if most == len(tensors) else "numbers"
            raise InputError(f"{path}: {name} is {size}, but the weights have {most} {things} in all")
    if quantized:
        return  # packed in ways of its own
    empty = {name: torch.empty(tensor.shape, device=META) for name, tensor in tensors.items()}
    try:
        with quiet():
            built = build(config)
            model, report = type(built).from_pretrained(
                None,
                config=built.config,
                state_dict=empty,
                device_map={"": META},
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception as error:  # whatever an architecture's code raises
        raise InputError(f"{path} describes no model: {_words(error, config)}") from error
    for problem in _differences(model, report, path):
        raise InputError(problem)
    for name, tensor in tensors.items():
        if name.endswith("weight") and not tensor.floating:
            raise InputError(
                f"{name} in {folder / tensor.file} holds whole numbers: if the weights are quantized, "
                "quantization_config in config.json must say how"
            )


def _differences(model: PreTrainedModel, report: dict[str, Any], path: Path) -> Iterator[str]:
    """What the weights have and the model has not, and the reverse, the reason before what follows from it."""
    known = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    layers = [int(found[1]) for name in report["unexpected_keys"] if (found := _of_a_layer_like(name, known))]
    if layers:
        said = text_config(model.config).num_hidden_layers
        yield f"{path}: num_hidden_layers is {said}, but the weights have {max(layers) + 1}"
    missing = sorted(report["missing_keys"])
    if missing:
        yield f"the weights in {path.parent} lack {len(missing)} tensors of the model, among them {missing[0]}"
    for name, there, described in sorted(report["mismatched_keys"]):
        sizes = {size for size, other in zip(described, there, strict=False) if size != other}.difference(there)
        named = " or ".join(field for field, value in _sizes(model.config).items() if value in sizes)
        reason = f" ({named})" if named else ""
        yield f"{path} makes {name} of shape {tuple(described)}{reason}, but the weights have {tuple(there)}"
    modules = {name.rpartition(".")[0] for name in known}
    for name in sorted(report["unexpected_keys"]):
        if name.rpartition(".")[0] in modules:
            yield f"the weights in {path.parent} have {name}, which the model that {path} describes has not"


def _sizes(config: PretrainedConfig) -> dict[str, int]:
    """The numbers of a configuration that a dimension of its weights can be."""
    sizes = {name: value for name, value in text_config(config).to_dict().items() if type(value) is int}
    heads = {name: sizes.get(name) or 0 for name in ("num_attention_heads", "num_key_value_heads")}
    return sizes | {f"{name} times head_dim": count * sizes.get("head_dim", 0) for name, count in heads.items()}


def _of_a_layer_like(name: str, known: Mapping[str, Any]) -> re.Match[str] | None:
    """The number of a layer that the model has not in a tensor's name, where its first layer has such a tensor."""
    found = re.search(r"\.(\d+)\.", name)
    return found if found and f"{name[: found.start(1)]}0{name[found.end(1) :]}" in known else None


def _words(error: Exception, config: PretrainedConfig) -> str:
    """What keeps a model from being built; for a name that transformers does not know, the settings that have it."""
    if not isinstance(error, KeyError):
        return shortened(" ".join(str(error).split()), 300) or type(error).__name__
    unknown, text = error.args[0] if error.args else "", text_config(config).to_dict()
    groups = {"": text, **{f"{name}.": value for name, value in text.items() if isinstance(value, dict)}}
    named = [group + name for group, values in groups.items() for name, value in values.items() if value == unknown]
    return f"{' and '.join(named)}: transformers knows no {unknown!r}" if named else f"it lacks {unknown!r}"


@contextmanager
def quiet() -> Iterator[None]:
    """A block without transformers' warnings and progress bar: what it finds is said in a sentence."""
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
