"""Generate a data set's predictions batch by batch, and measure time, memory and budgets while doing so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel, StoppingCriteria
from transformers.generation import LogitsProcessorList, StoppingCriteriaList

from squeeze.allocations.classes import CLASS_3
from squeeze.compatibility import cache_argument
from squeeze.devices import input_device, now, peak_memory
from squeeze.engine.cache import SqueezeCache
from squeeze.engine.squeezed_model import SqueezedModel
from squeeze.errors import InputError
from squeeze.generation.stats import SampleStats
from squeeze.generation.stopping import StopStrings
from squeeze.models.cached_layers import full_cache_bytes, held_bytes, layers_of
from squeeze.models.folder_config import valid_ids


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
    asked: int = 0,
) -> tuple[list[torch.Tensor], list[SampleStats]]:
    """Generate after a batch of prompts, padded on the left.

    Of a model that is squeezed in several configurations (`run.use`) each has an equal part of the prompts, in order.

    Args:
        prompts: token ids of each, (tokens,).
        settings: for the model's `generate`.
        run: what `squeezed` gave; None for the full cache.
        processors: of the logits, such as those that sample.
        stops: what ends a row beside the model's own end.
        asked: tokens at the end of each prompt that a squeezed cache does not see before what precedes them is cut:
            a question that follows on a context. 0: the whole prompt is cut.
    Returns:
        The new tokens of each prompt, (new tokens,), up to and with the first that stops it, and its statistics, in
        which seconds and bytes held are shares of the batch's.
    """
    tokens, mask = pad_left(model, prompts)
    device = tokens.device
    cache = DynamicCache(config=model.config)  # the full one; a squeezed model makes its own
    held = [(0.0, 0.0)] * len(prompts)  # bytes of keys and values of each prompt, and of states

    def measure_cache() -> None:
        nonlocal held
        held = [(held_bytes(cache) / len(prompts), 0.0)] * len(prompts)

    first = FirstToken(measure_cache)
    start = now(device)
    given: Any = cache if run is None else None
    if run is not None and asked:
        given = _cut(model, run, tokens[:, :-asked], mask[:, :-asked], asked + settings["max_new_tokens"])
    output = model.generate(
        tokens,
        attention_mask=mask,
        **{cache_argument(): given},
        stopping_criteria=StoppingCriteriaList([first, *([stops] if stops else [])]),
        logits_processor=processors,
        pad_token_id=_pad_token(model),
        **settings,
    )[:, tokens.shape[1] :].cpu()
    end = now(device)
    if run is not None:
        held = run.own_bytes
    own = layers_of(cache) if run is None else run.layers
    prefilled = first.time or end
    shared = run.shared_seconds if run is not None else 0.0
    ends = stop_tokens(model, settings)
    outputs = [_until_stop(row, ends) for row in output]
    if stops is not None:
        outputs = [row[:end] for row, end in zip(outputs, stops.ends, strict=True)]
    stats = []
    for row, (prompt, new) in enumerate(zip(prompts, outputs, strict=True)):
        layers: dict[str, Any] = {}
        if run is not None:
            if run.similarities is not None:
                layers["similarities"] = [round(float(value), 6) for value in run.similarities[row]]
            # Layers that were not sorted are all of the class that the others get their tokens from.
            sorted_layers = run.classes is not None
            layers["classes"] = run.classes[row].tolist() if sorted_layers else [CLASS_3] * len(run.layers)
            layers["budgets"] = run.budgets[row].tolist()
            if run.per_head:  # of layers with fewer heads than others no more
                layers["budgets"] = [own[:heads] for own, heads in zip(layers["budgets"], run.kv_heads, strict=True)]
            layers["notes"] = run.notes[row]
        sample = SampleStats(
            prompt_tokens=len(prompt),
            new_tokens=len(new),
            prefill_seconds=(prefilled - start + shared) / len(prompts),
            decode_seconds=(end - prefilled) / len(prompts),
            kv_bytes=held[row][0],
            state_bytes=held[row][1],
            full_kv_bytes=full_cache_bytes(own, len(prompt) - (0 if run is None else asked), model.dtype),
            peak_memory_bytes=peak_memory(device),
            **layers,
        )
        stats.append(sample)
    return outputs, stats


def _cut(
    model: PreTrainedModel, run: SqueezedModel, tokens: torch.Tensor, mask: torch.Tensor, more: int
) -> SqueezeCache:
    """The cache of left-padded contexts, `(batch, tokens)`, cut before `more` tokens follow."""
    cache = run.cache(more)
    given = {"input_ids": tokens, "attention_mask": mask, cache_argument(): cache, "use_cache": True}
    if "position_ids" in run.decoder_arguments:
        given["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
    model(**given, logits_to_keep=1)
    return cache


def pad_left(model: PreTrainedModel, prompts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts as one batch on the model's device: token ids and mask, `(batch, longest)`.

    Raises:
        InputError: a prompt has no tokens, or one that the model does not have: its tokenizer is another's.
    """
    embeddings = model.get_input_embeddings()
    for prompt in prompts:
        if not len(prompt):
            raise InputError("the tokenizer makes no tokens of a prompt: nothing can follow it")
        if int(prompt.max()) >= embeddings.num_embeddings:
            raise InputError(
                f"the tokenizer gives token {int(prompt.max())}, and the model's tokens are 0 to "
                f"{embeddings.num_embeddings - 1}: they do not belong together"
            )
    device, pad = input_device(model), _pad_token(model)
    tokens = pad_sequence(list(prompts), batch_first=True, padding_value=pad, padding_side="left").to(device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)[:, None]
    return tokens, (torch.arange(tokens.shape[1], device=device) >= tokens.shape[1] - lengths).long()


def stop_tokens(model: PreTrainedModel, settings: dict[str, Any]) -> torch.Tensor:
    """Token ids that end an answer, `(stops,)`."""
    stops = settings.get("eos_token_id", model.generation_config.eos_token_id)
    return torch.tensor(valid_ids(stops, model.get_input_embeddings().num_embeddings), dtype=torch.long)


def _until_stop(tokens: torch.Tensor, stops: torch.Tensor) -> torch.Tensor:
    """Drop what `generate` pads a row with that stopped before the others of its batch."""
    ends = torch.isin(tokens, stops).nonzero()
    return tokens[: int(ends[0]) + 1] if len(ends) else tokens


def _pad_token(model: PreTrainedModel) -> int:
    """Any token: no padding is ever attended, but `generate` wants one."""
    vocabulary = model.get_input_embeddings().num_embeddings
    special = model.generation_config
    return [*valid_ids(special.pad_token_id, vocabulary), *valid_ids(special.eos_token_id, vocabulary), 0][0]


@dataclass(frozen=True)
class Prompt:
    """A prompt for `generate`.

    Args:
        tokens: token ids, (tokens,).
        settings: for the model's `generate`.
        stop: strings that end an answer.
        kind: prompts go into one batch only where this is equal.
        asked: tokens at the end that are read when the cache is cut already; see `generate`.
        compared: tokens of the full cache's answer that a comparison with it looks at; None: all.
    """

    tokens: torch.Tensor
    settings: dict[str, Any]
    stop: tuple[str, ...] = ()
    kind: Any = None
    asked: int = 0
    compared: int | None = None


def greedy(max_new_tokens: int) -> dict[str, Any]:
    """Settings for `generate`: a processor of the logits may sample nevertheless."""
    return {"max_new_tokens": max_new_tokens, "num_beams": 1, "do_sample": False}
