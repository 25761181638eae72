"""The parts of a model folder's configuration files that count: its architecture, and the ids of special tokens.

Everything else in them is a wish of whoever saved the model (how to sample, which cache to use or whether to use one,
what to return, keys left over from another architecture), and a run has its own: what the benchmark says.
"""

from __future__ import annotations

import difflib
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from transformers import CONFIG_MAPPING, GenerationConfig, PretrainedConfig
from transformers.activations import ACT2FN

from squeeze.errors import InputError
from squeeze.models.model_config import read_config, taken
from squeeze.storage.files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Names that an architecture's class does not declare and that count: how RoPE was written before transformers 5, how
#: the weights are stored, and which tokenizer belongs to them.
ALSO = frozenset(
    {
        *("rope_scaling", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"),
        *("quantization_config", "transformers_weights", "tokenizer_class"),
    }
)

#: Settings that a run decides on by itself; special tokens come with the generation config.
RUNS_OWN = ("use_cache", "pad_token_id", "bos_token_id", "eos_token_id")


class SpecialTokens(msgspec.Struct):
    """The ids of special tokens, as `generation_config.json` gives them."""

    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | list[int] | None = None


def declares(config: PretrainedConfig | type[PretrainedConfig], name: str) -> bool:
    """Whether an architecture has this setting, and not just a file that somebody left it in."""
    made = config if isinstance(config, type) else type(config)
    return name in inspect.signature(made).parameters


def own_window(config: PretrainedConfig) -> int | None:
    """Tokens that a query sees at most, itself included, by the architecture's own sliding window; None for all."""
    return getattr(config, "sliding_window", None) if declares(config, "sliding_window") else None


def model_config(folder: Path) -> PretrainedConfig:
    """The architecture that `config.json` describes, without the rest of that file.

    Raises:
        InputError: the file describes no model.
    """
    path = folder / "config.json"
    made = CONFIG_MAPPING[read_config(folder).model_type]
    kept = {
        name: value
        for name, value in taken(folder).items()
        if name in ALSO or (declares(made, name) and name not in RUNS_OWN)
    }
    try:
        config = made(**kept)
    except Exception as error:  # whatever transformers' checks raise
        words = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path} describes no model: {words}") from error
    if config.hidden_act not in ACT2FN:
        near = ", ".join(difflib.get_close_matches(config.hidden_act, ACT2FN, cutoff=0.4) or ["silu"])
        raise InputError(f"{path}: hidden_act: there is no activation {config.hidden_act!r}, perhaps {near}")
    config.name_or_path = str(folder)
    return config


def generation_config(
    folder: Path, vocabulary: int, tokenizer: PreTrainedTokenizerBase | None = None
) -> GenerationConfig:
    """Settings of `generate` that hold nothing but special tokens; the benchmark's own settings come at each call.

    The end of a text is what `generation_config.json` says, else `config.json`, else the tokenizer; padding, which is
    never attended to, is any token that the model has.

    Args:
        vocabulary: how many tokens the model has. Other ids, such as the -1 of some Llamas, are as good as none.
    Raises:
        InputError: one of the files is not JSON, or an id in it is no number.
    """
    path = folder / "generation_config.json"
    sources: list[Any] = [read_json(path, SpecialTokens)] if path.exists() else []
    sources += [read_config(folder), tokenizer]

    def first(name: str) -> list[int]:
        candidates = (valid_ids(getattr(source, name, None), vocabulary) for source in sources)
        return next((ids for ids in candidates if ids), [])

    eos = first("eos_token_id")
    pad = [*first("pad_token_id"), *eos, 0]
    bos = first("bos_token_id")
    return GenerationConfig(eos_token_id=eos or None, pad_token_id=pad[0], bos_token_id=bos[0] if bos else None)


def valid_ids(ids: int | list[int] | None, vocabulary: int) -> list[int]:
    """Those of some token ids that a model with so many tokens has."""
    given = [] if ids is None else [ids] if isinstance(ids, int) else ids
    return [token for token in given if 0 <= token < vocabulary]
