"""A model's `config.json`, read once: what it may say, and whether its weights are the described ones. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import UNSET, Meta, UnsetType

from squeeze.config import DEFAULT_ALGORITHM
from squeeze.errors import InputError
from squeeze.storage.files import read_json

Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Positive = Annotated[float, Meta(gt=0, le=1e18)]
Base = Annotated[float, Meta(gt=1, le=1e18)]
Whole = Annotated[float, Meta(ge=1, le=1)]  # Llama and Mistral turn all of a head

#: With so many, `models.prompt_limit` leaves a prompt its first and its last token.
FEWEST_POSITIONS = 4

#: Kind of RoPE in transformers → what it cannot be computed without.
ROPE: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
#: Names that RoPE had elsewhere → what it is called now.
ROPE_BEFORE = {"su": "longrope"}

LAYER = re.compile(r"layers\.(\d+)\.")


class Rope(msgspec.Struct, frozen=True, kw_only=True):
    """Parameters of RoPE: `rope_parameters`, which was called `rope_scaling` before."""

    rope_type: str | UnsetType = UNSET
    type: str | UnsetType = UNSET
    rope_theta: Base | UnsetType = UNSET
    partial_rotary_factor: Whole | UnsetType = UNSET
    factor: Positive | None = None
    original_max_position_embeddings: Annotated[int, Meta(ge=2, le=2**31 - 1)] | UnsetType = UNSET
    attention_factor: Positive | None = None
    beta_fast: Positive | None = None
    beta_slow: Positive | None = None
    short_factor: list[Positive] | None = None
    long_factor: list[Positive] | None = None
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Fields that are read from the `config.json` of a Llama or Mistral model; its others have no effect.

    Fields that are left out have transformers' defaults; where those of the two differ, `heads` and `inner_size` know.
    """

    model_type: str = ""
    vocab_size: Count = 32000
    hidden_size: Count = 4096
    intermediate_size: Count | UnsetType = UNSET
    num_hidden_layers: Count = 32
    num_attention_heads: Count = 32
    num_key_value_heads: Count | UnsetType | None = UNSET
    head_dim: Count | None = None
    max_position_embeddings: Annotated[int, Meta(ge=FEWEST_POSITIONS, le=2**31 - 1)] = 2048
    sliding_window: int | None = None
    hidden_act: str = "silu"
    rms_norm_eps: Annotated[float, Meta(ge=0, le=1)] = 1e-6
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    rope_theta: Base = 10000.0
    rope_scaling: Rope | None = None
    rope_parameters: Rope | None = None
    original_max_position_embeddings: Count | UnsetType = UNSET
    partial_rotary_factor: Whole | UnsetType = UNSET
    tokenizer_class: str | None = None
    transformers_version: str | None = None
    transformers_weights: str | None = None
    quantization_config: dict[str, Any] | None = None

    @property
    def heads(self) -> tuple[int, int, int]:
        """Query heads, KV heads, and numbers in each."""
        queries, keys = self.num_attention_heads, self.num_key_value_heads
        if isinstance(keys, UnsetType):
            keys = 8 if self.model_type == "mistral" else None
        return queries, keys or queries, self.head_dim or self.hidden_size // queries

    @property
    def inner_size(self) -> int:
        """Numbers between the two halves of the MLP."""
        if isinstance(self.intermediate_size, UnsetType):
            return 14336 if self.model_type == "mistral" else 11008
        return self.intermediate_size

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


def read_config(folder: Path) -> ModelConfig:
    """Read a model's `config.json`, which must be that of a Llama or Mistral model.

    Raises:
        InputError: it is no JSON object, names another architecture or none, or a field is not what it must be.
    """
    path = folder / "config.json"
    known = read_json(path, dict[str, Any])
    kind = known.get("model_type", "")
    if isinstance(kind, str) and kind not in DEFAULT_ALGORITHM:
        fault = f"is of type {kind}" if kind else "has no model_type"
        raise InputError(f"the model of {path} {fault}: supported are {', '.join(DEFAULT_ALGORITHM)}")
    config = read_json(path, ModelConfig)
    for problem in chain(_foreign(known), _inconsistent(config), _rope_problems(known, config)):
        raise InputError(f"{path}: {problem}")
    return config


def taken(folder: Path) -> dict[str, Any]:
    """The part of a model's `config.json` that transformers is given: fields of `ModelConfig`, in their form.

    Raises:
        InputError: see `read_config`.
    """
    config, known = read_config(folder), read_json(folder / "config.json", dict[str, Any])
    # Of what turns the keys as it is written: transformers tells a field that is not there from one that is null.
    return {
        name: known[name] if name.startswith("rope_") else getattr(config, name)
        for name in ModelConfig.__struct_fields__
        if name in known and name != "model_type"
    }


def _foreign(known: dict[str, Any]) -> Iterator[str]:
    """Fields that make something else of the model than what this project reads here."""
    if "configuration_files" in known:
        yield "configuration_files names other files to read in its place: put what is meant into config.json"
    if known.get("per_layer_config"):
        yield "per_layer_config makes layers of different shapes, which are not supported"


def _inconsistent(config: ModelConfig) -> Iterator[str]:
    """Sizes that contradict each other."""
    queries, keys, dim = config.heads
    if config.hidden_size % queries and (config.model_type == "llama" or config.head_dim is None):
        yield f"hidden_size {config.hidden_size} is no multiple of num_attention_heads {queries}"
    if queries % keys:
        yield f"num_attention_heads {queries} is no multiple of num_key_value_heads {keys}"
    if dim % 2:
        yield f"head_dim must be even, since RoPE turns pairs of numbers, and is {dim}"
    if config.model_type == "mistral" and config.sliding_window is not None and config.sliding_window < 2:
        yield f"sliding_window must be null or 2 or more, and is {config.sliding_window}"
    if config.quantization == "":
        yield "quantization_config has no quant_method (or of bitsandbytes, no true load_in_4bit or load_in_8bit)"


def _rope_problems(known: dict[str, Any], config: ModelConfig) -> Iterator[str]:
    """Faults that keep RoPE from being computed."""
    for field in ("rope_scaling", "rope_parameters"):
        rope: Rope | None = getattr(config, field)
        raw = known.get(field)
        if rope is None or not raw:
            continue
        nested = next((key for key, value in raw.items() if isinstance(value, dict)), None)
        if nested is not None:
            yield f"{field}: {nested} is RoPE of one kind of layers, which {config.model_type} models do not have"
        name = "type" if isinstance(rope.rope_type, UnsetType) else "rope_type"
        kind = next((value for value in (rope.rope_type, rope.type) if not isinstance(value, UnsetType)), "default")
        if kind not in ROPE:
            new = ROPE_BEFORE.get(kind)
            renamed = f"; {kind} is called {new} now, and takes {' and '.join(ROPE[new])}" if new else ""
            yield f"{field}.{name}: there is no RoPE {kind!r}, only {', '.join(ROPE)}{renamed}"
            continue
        for need in ROPE[kind]:
            if getattr(rope, need) is None:
                yield f"{field}.{need} is missing, which RoPE {kind} needs"
        if kind == "longrope":
            half = config.heads[2] // 2
            for need in ROPE[kind]:
                if len(getattr(rope, need) or ()) != half:
                    yield f"{field}.{need} must have head_dim / 2 = {half} numbers, got {len(getattr(rope, need))}"
        if kind == "llama3" and not (rope.low_freq_factor or 0) < (rope.high_freq_factor or 0):
            yield f"{field}.high_freq_factor must be more than low_freq_factor"


class Tensor(NamedTuple):
    """A tensor of the weights: the file that it lies in, its shape, and whether it holds floating-point numbers."""

    file: str
    shape: tuple[int, ...]
    floating: bool


def check_weights(folder: Path, config: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
    """Compare the sizes in `config.json` with the weights that are there, which costs nothing of their size.

    Raises:
        InputError: the weights are another model's, lack some of its tensors, or are quantized and `config.json` does
            not say how.
    """
    path = folder / "config.json"
    by_name = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    layers = max((int(match[1]) + 1 for name in by_name if (match := LAYER.match(name))), default=0)
    if config.num_hidden_layers != layers:
        raise InputError(f"{path}: num_hidden_layers is {config.num_hidden_layers}, but the weights have {layers}")
    if config.quantization is not None:
        return  # packed in ways of its own
    expected = _tensors(config)
    head, tokens = "lm_head.weight", "embed_tokens.weight"
    tied = config.tie_word_embeddings and (head in by_name or tokens in by_name)
    missing = [name for name in expected if name not in by_name and not (tied and name in (head, tokens))]
    if missing:
        named = "model." * any(name.startswith("model.") for name in tensors) + missing[0]
        raise InputError(f"the weights in {folder} lack {len(missing)} tensors of the model, among them {named}")
    modules = {name.rpartition(".")[0] for name in expected}
    for name, tensor in by_name.items():
        sizes = expected.get(name)
        if sizes is None:
            if name.rpartition(".")[0] in modules:
                raise InputError(f"{folder / tensor.file} has {name}, which the model that {path} describes has not")
            continue
        if len(sizes) != len(tensor.shape):
            raise InputError(f"{name} in {folder / tensor.file} must have {len(sizes)} dimensions")
        for (field, size), there in zip(sizes.items(), tensor.shape, strict=True):
            if size != there:
                raise InputError(f"{path}: {field} is {size}, but {name} in {tensor.file} has {there}")
        if not tensor.floating:
            raise InputError(
                f"{name} in {folder / tensor.file} holds whole numbers: if the weights are quantized, "
                "quantization_config in config.json must say how"
            )


def _tensors(config: ModelConfig) -> dict[str, dict[str, int]]:
    """Every tensor that the model has, and where each of its dimensions comes from."""
    queries, keys, dim = config.heads
    hidden, inner = {"hidden_size": config.hidden_size}, {"intermediate_size": config.inner_size}
    query = {"num_attention_heads times head_dim": queries * dim}
    key = {"num_key_value_heads times head_dim": keys * dim}
    vocabulary = {"vocab_size": config.vocab_size}
    linear = {"self_attn.q_proj": (query, hidden), "self_attn.o_proj": (hidden, query)}
    linear |= {"self_attn.k_proj": (key, hidden), "self_attn.v_proj": (key, hidden)}
    linear |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    layer = {"input_layernorm.weight": hidden, "post_attention_layernorm.weight": hidden}
    for name, (out, into) in linear.items():
        layer[f"{name}.weight"] = out | into
        biased = config.attention_bias if name.startswith("self_attn") else config.mlp_bias
        if biased and config.model_type == "llama":
            layer[f"{name}.bias"] = out
    layers = {
        f"layers.{number}.{name}": sizes for number in range(config.num_hidden_layers) for name, sizes in layer.items()
    }
    outer = vocabulary | hidden
    return {"embed_tokens.weight": outer, "norm.weight": hidden, "lm_head.weight": outer} | layers
