"""The parts of a model folder's configuration files that count: its architecture, and the ids of special tokens.

Everything else in them is a wish of whoever saved the model (how to sample, which cache to use or whether to use one,
what to return, keys left over from another architecture), and a run has its own: what the benchmark says.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from transformers import CONFIG_MAPPING, GenerationConfig, PretrainedConfig, __version__
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from squeeze.errors import InputError
from squeeze.models.model_config import read_config, read_settings
from squeeze.storage.files import read_json
from squeeze.storage.schema import check
from squeeze.text import shortened

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Names that an architecture's own code need not say and that count: how RoPE was written before transformers 5, how
#: the weights are stored, and which tokenizer belongs to them.
ALSO = frozenset(
    {
        *("rope_scaling", "rope_theta", "original_max_position_embeddings"),
        *("quantization_config", "transformers_weights", "tokenizer_class"),
    }
)

#: Settings that a run decides on by itself; special tokens come with the generation config, but for the row of an
#: embedding that is padding's.
RUNS_OWN = frozenset({"use_cache", "bos_token_id", "eos_token_id"})

#: Sizes by transformers' own names for them, and the least of each; a prompt keeps its first and its last token with 4
#: positions (`squeeze.models.sources.prompt_limit`).
SIZES = {
    **{"vocab_size": 1, "hidden_size": 1, "intermediate_size": 0, "num_hidden_layers": 1},
    **{"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 1, "max_position_embeddings": 4},
}
MOST = 2**31 - 1


class SpecialTokens(msgspec.Struct):
    """The ids of special tokens, as `generation_config.json` and `config.json` give them."""

    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | list[int] | None = None


def declares(config: PretrainedConfig, name: str) -> bool:
    """Whether an architecture has this setting, and not just a file that somebody left it in."""
    return name in inspect.signature(type(config)).parameters


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The part of a configuration that describes the decoder: itself, but where images or sounds have their own."""
    return config.get_text_config(decoder=True)


def positions(config: PretrainedConfig) -> int:
    """The most tokens of a sequence; 2^31 - 1 where the architecture names no limit."""
    most = getattr(text_config(config), "max_position_embeddings", None)
    return most if isinstance(most, int) else MOST


def model_config(folder: Path) -> PretrainedConfig:
    """The architecture that `config.json` describes, without the rest of that file.

    Raises:
        InputError: the file describes no model, or none that continues a text.
    """
    path, described = folder / "config.json", read_config(folder)
    kind = described.model_type
    if kind not in CONFIG_MAPPING:
        near = difflib.get_close_matches(kind, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, cutoff=0.7)
        code = "; code that comes with a model (auto_map) is never run" if described.auto_map else ""
        raise InputError(
            f"the model of {path} is of type {kind}, which transformers {__version__} does not know{code}"
            + (f": it knows {', '.join(near)}" if near else "")
        )
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise InputError(
            f"the model of {path} is of type {kind}, which is no decoder: no language model that continues a text"
        )
    made = CONFIG_MAPPING[kind]
    try:
        config = made(**_kept(made, read_settings(folder), path))
    except InputError:
        raise
    except Exception as error:  # whatever transformers' checks raise
        words = shortened(" ".join(str(error).split()), 300) or type(error).__name__
        raise InputError(f"{path} describes no model: {words}") from error
    for problem in _problems(config):
        raise InputError(f"{path}: {problem}")
    for part in (config, text_config(config)):  # Llamas write -1; a class's own may be beyond a smaller vocabulary
        if getattr(part, "pad_token_id", None) is not None:
            part.pad_token_id = next(iter(valid_ids(part.pad_token_id, part.vocab_size)), None)
    config.name_or_path = str(folder)
    return config


def _kept(made: type[PretrainedConfig], known: dict[str, Any], path: Path) -> dict[str, Any]:
    """The settings that count of those in a file, or in a part of it that has an architecture of its own.

    Raises:
        InputError: a size is none.
    """
    named: frozenset[str] = _named(made)  # type: ignore[arg-type] # classes are hashable
    kept = {name: value for name, value in known.items() if name in named}
    spelled = getattr(made, "attribute_map", {})
    for size, least in SIZES.items():
        for name in {size, spelled.get(size, size)} & kept.keys():
            value = kept[name]
            if isinstance(value, int) and not isinstance(value, bool) and not least <= value <= MOST:
                raise InputError(f"{path}: {name} is not a whole number from {least} to {MOST}, got {value}")
    if known.get("per_layer_config") and "per_layer_config" not in named:
        raise InputError(f"{path}: per_layer_config makes layers of different shapes, which the architecture has not")
    for name, value in kept.items():
        if name.endswith(("eps", "epsilon")) and isinstance(value, int | float) and not 0 <= value <= 1:
            raise InputError(f"{path}: {name} is not a number from 0 to 1, got {value}")
    for name, of_part in (made.sub_configs or {}).items():
        part = kept.get(name)
        if isinstance(part, dict):
            kind = part.get("model_type")
            of_part = CONFIG_MAPPING[kind] if isinstance(kind, str) and kind in CONFIG_MAPPING else of_part
            if issubclass(of_part, PretrainedConfig):  # and not AutoConfig, which has a kind of its own in mind
                kept[name] = ({"model_type": kind} if kind else {}) | _kept(of_part, part, path)
    return kept


@cache
def _named(made: type[PretrainedConfig]) -> frozenset[str]:
    """The settings that an architecture has: those that it declares, and those that its own code calls by name.

    A configuration class takes more than it declares (Gemma 3's `rope_local_base_freq`), and what an architecture's
    code never names it cannot read. What all configurations have says nothing of the architecture.
    """
    source = Path(inspect.getfile(made)).parent
    words = {word for path in sorted(source.glob("*.py")) for word in re.findall(r"\w+", path.read_text("utf-8"))}
    bases = [base for base in made.__mro__ if base not in PretrainedConfig.__mro__]
    own = {name for base in bases for name in vars(base).get("__annotations__", ())}
    own |= inspect.signature(made).parameters.keys() - inspect.signature(PretrainedConfig).parameters.keys()
    read = {word for word in words if not hasattr(PretrainedConfig, word) and word[0] != "_"}
    read |= words & {"per_layer_config"}
    read -= {word for word in read if word.endswith("_implementation")} | GenerationConfig().to_dict().keys()
    return frozenset((own | read | ALSO) - RUNS_OWN)


def _problems(config: PretrainedConfig) -> Iterator[str]:
    """Faults of an architecture that transformers lets pass."""
    kind, text = config.model_type, text_config(config)
    encoder = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(text, "is_decoder", True)
    if config.is_encoder_decoder or encoder:
        yield f"a model of type {kind} is no decoder by itself: none that continues a text"
    window, kinds = getattr(text, "sliding_window", None), getattr(text, "layer_types", None)
    if window is not None and window < 2 and "sliding_attention" in (kinds or ["sliding_attention"]):
        yield f"sliding_window must be null or 2 or more, and is {window}"
    queries, keys = (getattr(text, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    if isinstance(queries, int) and isinstance(keys, int) and queries % keys:
        yield f"num_attention_heads {queries} is no multiple of num_key_value_heads {keys}"
    rope = getattr(text, "rope_parameters", None) or {}
    nested = next((name for name, value in rope.items() if isinstance(value, dict)), None)
    if nested is not None and "rope_type" in rope:
        yield f"rope_parameters: {nested} is RoPE of one kind of layers, which {kind} models do not have"
    for one in rope_parameters(config):
        factors = [one[name] for name in ("short_factor", "long_factor") if isinstance(one.get(name), list)]
        if len({len(each) for each in factors}) > 1:
            yield f"rope_parameters: short_factor has {len(factors[0])} numbers and long_factor {len(factors[1])}"


def rope_parameters(config: PretrainedConfig) -> list[dict[str, Any]]:
    """The parameters of each kind of RoPE that a model has: none, one, or one for each kind of its layers."""
    rope = getattr(text_config(config), "rope_parameters", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)]
    return [rope] if "rope_type" in rope else nested


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
    path, described = folder / "generation_config.json", folder / "config.json"
    sources: list[Any] = [read_json(path, SpecialTokens)] if path.exists() else []
    known = read_settings(folder)
    sources.append(check(known, SpecialTokens, str(described)))
    if isinstance(known.get("text_config"), dict) and "text_config" in CONFIG_MAPPING[known["model_type"]].sub_configs:
        sources.append(check(known["text_config"], SpecialTokens, f"{described} text_config"))
    sources.append(tokenizer)

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
