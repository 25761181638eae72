"""Generate a data set's predictions batch by batch, and measure time, memory and budgets while doing so."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria
from transformers.generation import LogitsProcessorList, StoppingCriteriaList

from squeeze.batching import Work
from squeeze.clock import now
from squeeze.config import InputError
from squeeze.distributed import ALONE, Ranks
from squeeze.folder_config import own_window, valid_ids
from squeeze.longbench import Data, build_prompt
from squeeze.prompting import clean, encode_prompt, generation_settings
from squeeze.request_files import Requests
from squeeze.sampling import generator, sampler
from squeeze.squeezed_model import SqueezedModel
from squeeze.stopping import StopStrings

#: Characters that take seconds to tokenize.
LONG_TEXT = 5_000_000


@dataclass(frozen=True)
class Options:
    """How prompts are made and run.

    Args:
        max_length: the most tokens of a prompt; of a request, those of its completion included.
        model_name: decides on LongBench's chat format.
        chat: use the tokenizer's chat template instead.
        batch_size: prompts to run together.
        temperature, top_p: of sampling; temperature 0 is greedy.
        seed: of sampling.
        ranks: this process among those of the run.
    """

    max_length: int
    model_name: str
    chat: bool = False
    batch_size: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 42
    ranks: Ranks = ALONE


class FirstToken(StoppingCriteria):
    """Stops nothing; notes when the first token was there, which is when the prefill was over."""

    def __init__(self, then: Callable[[], None]) -> None:
        self.time: float | None = None
        self.then = then

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if self.time is None:
            self.time = now(input_ids.device)
            self.then()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[torch.Tensor],
    settings: dict[str, Any],
    run: SqueezedModel | None,
    processors: LogitsProcessorList | None = None,
    stops: StopStrings | None = None,
) -> tuple[list[torch.Tensor], list[dict[str, Any]]]:
    """Generate after a batch of prompts, padded on the left.

    Args:
        prompts: token ids of each, (tokens,).
        settings: for the model's `generate`.
        run: what `squeezed` gave; None for the full cache.
        processors: of the logits, such as those that sample.
        stops: what ends a row beside the model's own end.
    Returns:
        The new tokens of each prompt, (new tokens,), up to and with the first that stops it, and what was measured on
        each: `prompt_tokens`, `new_tokens`, `prefill_seconds`, `decode_seconds`, `kv_bytes` held after the prefill,
        `full_kv_bytes` that the full cache of this prompt alone holds after it, `state_bytes`, `peak_memory_bytes`,
        and for a squeezed cache `similarities`, `classes`, `budgets` and `notes`. Seconds and bytes held are shares of
        the batch's.
    """
    tokens, mask = pad_left(model, prompts)
    device = tokens.device
    cache = None if run is not None else DynamicCache(config=model.config)
    held = {"state_bytes": 0}

    def measure_cache() -> None:
        if cache is not None:
            held["kv_bytes"] = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)

    first = FirstToken(measure_cache)
    start = now(device)
    output = model.generate(
        tokens,
        attention_mask=mask,
        past_key_values=cache,
        stopping_criteria=StoppingCriteriaList([first, *([stops] if stops else [])]),
        logits_processor=processors,
        pad_token_id=_pad_token(model),
        **settings,
    )[:, tokens.shape[1] :].cpu()
    end = now(device)
    if run is not None:
        held = {"kv_bytes": run.kv_bytes, "state_bytes": run.state_bytes}
    prefilled = first.time or end
    shared = run.shared_seconds if run is not None else 0.0
    shares = {"prefill_seconds": prefilled - start + shared, "decode_seconds": end - prefilled} | held
    ends = stop_tokens(model, settings)
    outputs = [_until_stop(row, ends) for row in output]
    if stops is not None:
        outputs = [row[:end] for row, end in zip(outputs, stops.ends, strict=True)]
    stats = []
    for row, (prompt, new) in enumerate(zip(prompts, outputs, strict=True)):
        one: dict[str, Any] = {"prompt_tokens": len(prompt), "new_tokens": len(new)}
        one |= {name: value / len(prompts) for name, value in shares.items()}
        one["full_kv_bytes"] = full_cache_bytes(model.config, len(prompt), model.dtype)
        one["peak_memory_bytes"] = peak_memory(device)
        if run is not None:
            one["similarities"] = [round(float(value), 6) for value in np.asarray(run.similarities)[row]]
            one["classes"] = np.asarray(run.classes)[row].tolist()
            one["budgets"] = np.asarray(run.budgets)[row].tolist()
            one["notes"] = run.notes[row]
        stats.append(one)
    return outputs, stats


def pad_left(model: PreTrainedModel, prompts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts as one batch on the model's device: token ids and mask, `(batch, longest)`.

    Raises:
        InputError: a prompt has no tokens, or one that the model does not have.
    """
    check_tokens(model, prompts)
    device = model.get_input_embeddings().weight.device
    pad = _pad_token(model)
    tokens = pad_sequence(list(prompts), batch_first=True, padding_value=pad, padding_side="left").to(device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)[:, None]
    return tokens, (torch.arange(tokens.shape[1], device=device) >= tokens.shape[1] - lengths).long()


def check_tokens(model: PreTrainedModel, prompts: Sequence[torch.Tensor]) -> None:
    """Raises InputError where a tokenizer does not belong to a model: a token is missing there, or there is none."""
    there = model.get_input_embeddings().num_embeddings
    for prompt in prompts:
        if not len(prompt):
            raise InputError("the tokenizer makes no tokens of a prompt: nothing can follow it")
        if int(prompt.max()) >= there:
            raise InputError(
                f"the tokenizer gives token {int(prompt.max())}, and the model's tokens are 0 to {there - 1}: they do "
                "not belong together"
            )


def stop_tokens(model: PreTrainedModel, settings: dict[str, Any]) -> torch.Tensor:
    """Token ids that end an answer, `(stops,)`."""
    stops = settings.get("eos_token_id", model.generation_config.eos_token_id)
    return torch.tensor(valid_ids(stops, model.get_input_embeddings().num_embeddings), dtype=torch.long)


def _until_stop(tokens: torch.Tensor, stops: torch.Tensor) -> torch.Tensor:
    """Drop what `generate` pads a row with that stopped before the others of its batch."""
    found = torch.isin(tokens, stops).nonzero()
    return tokens[: int(found[0]) + 1] if len(found) else tokens


def _pad_token(model: PreTrainedModel) -> int:
    """Any token: no padding is ever attended, but `generate` wants one."""
    there = model.get_input_embeddings().num_embeddings
    generation = model.generation_config
    return [*valid_ids(generation.pad_token_id, there), *valid_ids(generation.eos_token_id, there), 0][0]


def full_cache_bytes(config: PretrainedConfig, length: int, dtype: torch.dtype) -> int:
    """Bytes of all keys and values of `length` tokens, or of what the model's own window needs for the next one."""
    window = own_window(config)
    held = min(length, window - 1) if window else length
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * held * dtype.itemsize


def peak_memory(device: torch.device) -> int:
    """The most bytes this process has held so far: on GPUs, tensors; on the CPU, all of its resident memory."""
    if device.type == "cuda":
        return sum(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count())))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass(frozen=True)
class Prompt:
    """A prompt for `generate`.

    Args:
        tokens: token ids, (tokens,).
        settings: for the model's `generate`.
        stop: strings that end an answer.
        kind: prompts go into one batch only where this is equal.
    """

    tokens: torch.Tensor
    settings: dict[str, Any]
    stop: tuple[str, ...] = ()
    kind: Any = None


def greedy(max_new_tokens: int) -> dict[str, Any]:
    """Settings for `generate`: a processor of the logits may sample nevertheless."""
    return {"max_new_tokens": max_new_tokens, "num_beams": 1, "do_sample": False}


def tokenizing(texts: Sequence[str], dataset: str, ranks: Ranks) -> Iterator[str]:
    """The texts, with a bar over their characters where they take a while: at once, if there are many."""
    total = sum(map(len, texts))
    shown: dict[str, Any] = {} if ranks.first else {"disable": True}
    delay = 0 if total > LONG_TEXT else 2
    what = f"{dataset}: tokenizing"
    with tqdm(total=total, desc=what, unit="char", unit_scale=True, delay=delay, leave=False, **shown) as bar:
        for text in texts:
            yield text
            bar.update(len(text))


def encode(tokenizer: PreTrainedTokenizerBase, data: Data | Requests, total: int, how: Options) -> list[Prompt]:
    """The first `total` prompts of a data set: LongBench's as its runner puts them, HELM's without special tokens.

    Raises:
        InputError: a request's prompt and its completion do not fit into `how.max_length`.
    """
    if isinstance(data, Data):
        settings = generation_settings(tokenizer, data.dataset)
        texts = [build_prompt(data.dataset, row) for row in data.rows[:total]]
        limit, name, chat = how.max_length, how.model_name, how.chat
        return [
            Prompt(encode_prompt(tokenizer, data.dataset, text, limit, name, chat), settings)
            for text in tokenizing(texts, data.dataset, how.ranks)
        ]
    prompts = []
    requests = data.rows[:total]
    asked = tokenizing([request.prompt for request in requests], data.dataset, how.ranks)
    for number, (request, text) in enumerate(zip(requests, asked, strict=True), start=1):
        tokens = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
        new = request.decoding.max_tokens
        if len(tokens) + new > how.max_length:
            raise InputError(
                f"{data.source}: prompt {number} has {len(tokens)} tokens, which with {new} new ones is more than the "
                f"model's {how.max_length} positions: make the requests again with --model {how.model_name}"
            )
        prompts.append(Prompt(tokens, greedy(new), request.decoding.stop, request.decoding))
    return prompts


def predict(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    prompts: Sequence[Prompt],
    run: SqueezedModel | None,
    how: Options,
) -> Work:
    """The work of LongBench's data sets: prompts to answers."""

    def work(batch: list[int]) -> list[dict[str, Any]]:
        processors = sampler(how.temperature, how.top_p, [generator(how.seed, index) for index in batch])
        chosen = [prompts[index] for index in batch]
        results = generate(model, [one.tokens for one in chosen], chosen[0].settings, run, processors)
        records = []
        for index, output, stats in zip(batch, *results, strict=True):
            row = data.rows[index]
            answer = clean(tokenizer.decode(output, skip_special_tokens=True), how.model_name)
            published = {"pred": answer} | {key: row[key] for key in ("answers", "all_classes", "length")}
            records.append({"index": index, **published, "stats": stats})
        return records

    return work
