"""The files of a model's folder that loading touches, listed before any of them is trusted. No torch but for pickles.

transformers takes weights from wherever an index names them, with `torch.load` where the name is not one of
safetensors, and adds adapters and code that it finds. Here every file is looked at first: it must lie in the folder,
hold nothing that can run, and be known to `models.identity`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import msgspec

from squeeze.errors import InputError
from squeeze.models.model_config import ModelConfig, read_config
from squeeze.storage.files import read_json, read_object

#: Where transformers looks for weights, in its order; `*.index.json` names the files that they are spread over.
SAFE = ("model.safetensors", "model.safetensors.index.json")
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
INDEX = ".index.json"

#: Beside the weights, the files of a model's folder that change what it generates.
SETTINGS_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
#: Files that a tokenizer is made from where there is neither `tokenizer.json` nor `tokenizer.model`.
VOCABULARIES = ("vocab.json", "merges.txt", "vocab.txt", "tekken.json", "tiktoken.model", "spiece.model")
#: Ends of the names of everything that configs and tokenizers of transformers read.
TEXTS = (".json", ".jinja", ".model", ".txt", ".codes", ".tokenizer", ".tiktoken")
CHAT_TEMPLATES = ("chat_template.jinja", "additional_chat_templates/*.jinja")
#: Weights of other libraries, for the sentence that says that they are not read.
OTHERS = ("*.gguf", "*.h5", "*.msgpack", "*.pth", "*.pt", "*.bin", "*.safetensors", "*.onnx")


class NoWeights(InputError):
    """A model's folder has no weights that can be loaded."""


class Index(msgspec.Struct, frozen=True):
    """`model.safetensors.index.json`: the file of each tensor."""

    weight_map: dict[str, str]
    metadata: dict[str, Any]


class Tensor(NamedTuple):
    """A tensor of the weights: the file that it lies in, its shape, and whether it holds floating-point numbers."""

    file: str
    shape: tuple[int, ...]
    floating: bool


@dataclass(frozen=True)
class Weights:
    """The weights that loading will use.

    Args:
        names: of their files, in the folder, sorted.
        source: the file that transformers looks for: the weights themselves, or the index that names them.
    """

    names: tuple[str, ...]
    source: str

    @property
    def pickled(self) -> bool:
        """True if it is `pytorch_model.bin` or its index."""
        return self.source in PICKLED


def inspect(folder: Path, allow_pickle: bool = False) -> tuple[Weights, dict[str, Tensor]]:
    """Look at every file that loading a model will touch; returns its weights, and their tensors by name.

    Raises:
        InputError: a file lies elsewhere, can run code or changes the model in a way that is not supported, or the
            weights are missing or damaged.
    """
    check_texts(folder)
    weights = find_weights(folder, read_config(folder), allow_pickle)
    return weights, {key: tensor for name in weights.names for key, tensor in _read_heads(folder, name)}


def check_texts(folder: Path) -> None:
    """Look at the files of a model's folder that are no weights.

    Raises:
        InputError: one lies elsewhere, or the folder holds what transformers would add to the model.
    """
    if (folder / "adapter_config.json").exists():
        raise InputError(
            f"{folder} holds a PEFT adapter (adapter_config.json): give a folder with the whole model, as peft's "
            "merge_and_unload() and save_pretrained make it"
        )
    for path in sorted(folder.iterdir()):
        if path.name.endswith(TEXTS) and (path.is_file() or path.is_symlink()):
            confine(folder, path.name)
    for path in chat_templates(folder):
        confine(folder, path.relative_to(folder).as_posix())
    for name in _named_tokenizers(folder):
        if (folder / name).exists():
            confine(folder, name)


def chat_templates(folder: Path) -> list[Path]:
    """The files that hold a model's chat templates."""
    return [path for pattern in CHAT_TEMPLATES for path in sorted(folder.glob(pattern))]


def _named_tokenizers(folder: Path) -> list[str]:
    """Files that `tokenizer_config.json` names in place of `tokenizer.json`."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return []
    named = read_object(path).get("fast_tokenizer_files") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise InputError(f"{path}: fast_tokenizer_files must be a list of file names")
    return named


def find_weights(folder: Path, config: ModelConfig, allow_pickle: bool = False) -> Weights:
    """Choose the weights as transformers does.

    Raises:
        InputError: there are none, or one is missing, lies elsewhere, or is not of safetensors without `allow_pickle`.
    """
    if any(folder.glob("shard-*-model-*.safetensors")):
        raise InputError(
            f"{folder} holds a distributed checkpoint (shard-*-model-*.safetensors): save it as one model"
        )
    chosen = config.transformers_weights
    if chosen is not None:
        if not chosen.endswith((".safetensors", ".safetensors.index.json")):
            raise InputError(
                f"{folder / 'config.json'}: transformers_weights is {chosen}, which is no safetensors file"
            )
    else:
        names = (*SAFE, *(PICKLED if allow_pickle else ()))
        chosen = next((name for name in names if (folder / name).is_file()), None)
    if chosen is None:
        raise NoWeights(f"the model folder {folder} has no weights ({' or '.join(SAFE)}){_instead(folder)}")
    confine(folder, chosen)
    if not chosen.endswith(INDEX):
        return Weights((chosen,), chosen)
    path = folder / chosen
    index = read_json(path, Index)
    named = sorted(set(index.weight_map.values()))
    if not named:
        raise InputError(f"{path} names no weights")
    for name in named:
        if not name.endswith(".safetensors") and not allow_pickle:
            raise InputError(
                f"{path} names {name}, which is no safetensors file and can run code: --allow_pickle loads it if you "
                "trust its author"
            )
        confine(folder, name, path)
    return Weights(tuple(named), chosen)


def _instead(folder: Path) -> str:
    """The end of a sentence that names what lies there in place of weights."""
    if any((folder / name).is_file() for name in PICKLED):
        return ", only pickled weights, which can run code: --allow_pickle loads them if you trust their author"
    other = next((path.name for pattern in OTHERS for path in sorted(folder.glob(pattern))), None)
    return f"; {other} is not read" if other else ""


def confine(folder: Path, name: str, source: Path | None = None) -> None:
    """Raises InputError unless `name` is a file of the folder, or a link of the Hub's cache to its own `blobs`.

    Args:
        source: the file that named it.
    """
    says = f"{source} names {name}" if source is not None else f"{folder / name}"
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or not parts.parts:
        raise InputError(f"{says}, which is outside of the model's folder: only files in it are loaded")
    path, home = folder / name, folder.resolve()
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError, ValueError):  # not there; links in a circle; no name that a file can have
        link = f", a link to {path.readlink()}" if _is_link(path) else ""
        raise InputError(f"{says}{link}, which is not there") from None
    blobs = home.parent.parent / "blobs"
    if not real.is_relative_to(home) and not (home.parent.name == "snapshots" and real.parent == blobs.resolve()):
        raise InputError(
            f"{says}, a link to {real}, which is outside of the model's folder: copy the file into it, or give the "
            "folder where the model lies"
        )
    if not real.is_file():
        raise InputError(f"{says}, which is no file")


def _is_link(path: Path) -> bool:
    try:
        return path.is_symlink()
    except (OSError, ValueError):  # no name that a file can have
        return False


def _read_heads(folder: Path, name: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a file of weights, after its name."""
    path = folder / name
    if name.endswith(".safetensors"):
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="np") as file:
                for key in file.keys():  # noqa: SIM118 - it is no mapping
                    part = file.get_slice(key)
                    yield key, Tensor(name, tuple(part.get_shape()), part.get_dtype().startswith(("F", "BF")))
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"the model in {folder} cannot be loaded: {name} is no whole safetensors file ({error})"
            ) from None
        return

    from transformers.modeling_utils import load_state_dict  # what loads them later

    try:
        pickled = load_state_dict(path, map_location="meta")
        for key, tensor in pickled.items():
            yield key, Tensor(name, tuple(tensor.shape), tensor.is_floating_point())
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        raise InputError(f"the model in {folder} cannot be loaded: {name} holds no tensors by name ({text})") from None


def identified(folder: Path, weights: Weights) -> tuple[list[str], list[str]]:
    """Names of the files that tell a model from another: its settings, and its weights.

    An index counts where it leaves out some of the folder's weights: otherwise it says no more than their names do.
    """
    pattern = "pytorch_model*.bin" if weights.pickled else "*.safetensors"
    there = {path.name for path in folder.glob(pattern) if path.is_file()}
    settings = [name for name in SETTINGS_FILES if (folder / name).is_file()]
    if "tokenizer.json" not in settings:
        more = ("added_tokens.json",) if "tokenizer.model" in settings else (*VOCABULARIES, "added_tokens.json")
        settings += [name for name in more if (folder / name).is_file()]
    settings += [name for name in _named_tokenizers(folder) if name not in settings and (folder / name).is_file()]
    left_out = {name for name in there.difference(weights.names) if not name.startswith("consolidated")}
    if weights.source.endswith(INDEX) and left_out:
        settings.append(weights.source)
    return settings, sorted(there.union(weights.names))
