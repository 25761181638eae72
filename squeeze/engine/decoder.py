"""The stand-in for the decoder's forward pass: a prefill, whole, in chunks or taken over, or a decode step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from transformers.utils import ModelOutput

from squeeze.compatibility import cache_argument
from squeeze.devices import now
from squeeze.engine.cache import SqueezeCache
from squeeze.engine.interface import forward_pass
from squeeze.engine.prefill import Prefill
from squeeze.engine.squeezed_model import SqueezedModel
from squeeze.models.rope import LengthwiseRope

#: Arguments of a decoder's forward pass that prefills may differ in, or must agree in, to be shared.
SHARED = (
    *("input_ids", "attention_mask", "position_ids", "past_key_values", "cache", "use_cache", "return_dict"),
    "logits_to_keep",  # which Gemma 4 hands on, and only its head looks at
)

#: What models that read more than text take beside tokens.
MEDIA = ("pixel_values", "pixel_values_videos", "image_features", "input_features", "input_values")


# Not for Dynamo, which would trace it into scikit-learn: the graph of a model that its user compiled breaks off here.
@torch.compiler.disable
def decoder_forward(run: SqueezedModel, original, names: Sequence[str], *args, **kwargs):
    """Stands in for the decoder's forward pass, for one thread at a time.

    Args:
        names: of its arguments, in order.
    Raises:
        ValueError: the call would make a cache of its own, or asks for what a squeezed cache cannot do.
    """
    given = dict(zip(names, args, strict=False)) | kwargs
    inputs = given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"]
    if "past_key_values" in given:  # from a call of the decoder itself, by the name that every release takes
        given[cache_argument()] = given.pop("past_key_values")
    cache = given.get(cache_argument())
    with run.lock:
        if not isinstance(cache, SqueezeCache) or inputs is None:
            use_cache = given.get("use_cache")
            if cache is None and (run.model.config.use_cache if use_cache is None else use_cache):
                raise ValueError(
                    "inside `with squeezed(...) as run` a call of the model itself names its cache: "
                    f"{cache_argument()}=run.cache(max_new_tokens), or use_cache=False for none"
                )
            with forward_pass(None, run.findings.configs, None):
                return original(**given)
        _check(run, cache, given)

        def squeezed(**given):
            with forward_pass(cache, run.findings.configs, run.attention):
                return original(**given)

        batch, tokens = inputs.shape[:2]
        if cache.compressed:
            return _continue(run, squeezed, cache, given) if tokens > 1 else _step(run, squeezed, cache, given)
        cache.begin(batch, tokens, given.get("attention_mask"))
        return _prefill(run, squeezed, cache, given)


def _check(run: SqueezedModel, cache: SqueezeCache, given: dict[str, Any]) -> None:
    if cache.owner[0] is not run.model or (not cache.compressed and cache.owner[1] is not run.evictor):
        raise ValueError(
            "the cache was made for another model, or before run.use(...): make one with run.cache(max_new_tokens)"
        )
    media = next((name for name in MEDIA if given.get(name) is not None), None)
    if media is not None:
        raise ValueError(
            f"{media}: images, sound and video, whose tokens see each other, are not supported with a squeezed cache: "
            "text only"
        )
    output_attentions = given.get("output_attentions")
    if output_attentions is None:
        output_attentions = getattr(run.model.config, "output_attentions", False)
    if output_attentions:
        raise ValueError(
            "output_attentions is not supported with a squeezed cache, which keeps no probabilities: leave it out"
        )
    block = run.findings.layers[0].block
    if block.training and getattr(block, "gradient_checkpointing", False):
        raise ValueError("training with gradient checkpointing takes its cache from a layer: call model.eval() first")


def _prefill(run: SqueezedModel, forward, cache: SqueezeCache, given: dict[str, Any]):
    """The decoder's output over the prompts that `cache` has begun with; the cache is cut by then."""
    config, inputs = run.model.config, given.get("input_ids")
    # What a kept prefill has no part of: more than the last hidden states, or what they depend on beside tokens.
    asked = config.output_hidden_states or getattr(config, "output_router_logits", False)
    more = [value for name, value in given.items() if name not in SHARED]
    plain = not asked and given.get("return_dict", config.return_dict) is not False
    plain = plain and all(value is None or value is False for value in more)
    positions = given.get("position_ids")
    with run.prefilling(cache, inputs, positions, plain) as prefill:
        if prefill.chunk is not None:
            return _prefill_in_chunks(run, forward, prefill, given)
        once = prefill.copies > 1 and prefill.kept is None
        if once:
            assert inputs is not None
            places, mask = (_first(prefill.prompts, part) for part in (positions, given.get("attention_mask")))
            prefill.kept = run.prefill(inputs[: prefill.prompts], places, mask)
        if prefill.kept is not None:
            output = prefill.take_over(prefill.kept)
            prefill.shared_seconds -= prefill.kept.seconds if once else 0.0
            return prefill.kept.made(last_hidden_state=output, **{cache_argument(): cache})
        prefill.begin_chunk(0, prefill.cache.columns)
        if not (prefill.shared or cache.whole):
            return forward(**given)
        assert inputs is not None
        start = now(inputs.device)
        output = forward(**given)
        prefill.keep(inputs, positions, output, now(inputs.device) - start)
        return output


def _first(prompts: int, given: torch.Tensor | None) -> torch.Tensor | None:
    """What an argument says of the first prompts of a batch."""
    return None if given is None else given[:prompts]


def _step(run: SqueezedModel, forward, cache: SqueezeCache, given: dict[str, Any]) -> ModelOutput | tuple:
    """The decoder's output over one more token of each sequence."""
    inputs = given["input_ids"] if given.get("inputs_embeds") is None else given["inputs_embeds"]
    padded = min(cache.prompt_lengths) < cache.columns  # after which some models make their positions of the mask
    if cache.graph is None or (padded and given.get("position_ids") is None):
        with cache.step(len(inputs)):
            return forward(**given)
    return_dict = given.pop("return_dict", run.model.config.return_dict)
    if given.get("position_ids") is None:
        given["position_ids"] = inputs.new_full((len(inputs), 1), cache.get_seq_length(), dtype=torch.long)
    forward = partial(forward, return_dict=True, **{cache_argument(): given.pop(cache_argument())})
    output = cache.graph(cache, forward, given | {"attention_mask": None})
    return output.to_tuple() if return_dict is False else output


def _continue(run: SqueezedModel, forward, cache: SqueezeCache, given: dict[str, Any]) -> ModelOutput | tuple:
    """The decoder's output over several tokens that follow on a cut prompt, as if they were generated one by one.

    Most models read them in one pass, in which each layer takes them in one by one. Where angles depend on the length
    of a sequence, a pass has those of its end, and each token has a pass of its own.

    Raises:
        ValueError: some of them are padding, or the cache was made for fewer.
    """
    inputs = given["input_ids"] if given.get("inputs_embeds") is None else given["inputs_embeds"]
    batch, tokens = inputs.shape[:2]
    seen, mask = cache.get_seq_length(), given.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.ndim == 2 and not mask[:, -tokens:].all():
        raise ValueError("what follows on a cut prompt cannot be padded: go on with one sequence at a time")
    if tokens > cache.max_new_tokens - cache.steps:
        raise ValueError(
            f"the cache was made for {cache.max_new_tokens} new tokens, of which {cache.steps} are used up, and got "
            f"{tokens}"
        )
    if "position_ids" in run.decoder_arguments and given.get("position_ids") is None:
        given["position_ids"] = torch.arange(seen, seen + tokens, device=inputs.device).expand(batch, -1)
    if cache.takes_several and not run.ropes:
        with cache.several(batch, tokens):
            return forward(**given)
    return_dict = given.pop("return_dict", run.model.config.return_dict)
    whole = {
        name: value for name, value in given.items() if isinstance(value, torch.Tensor) and name != "attention_mask"
    }
    parts = []
    for start in range(tokens):
        given |= {name: _columns(name, value, start, start + 1) for name, value in whole.items()}
        given |= {} if mask is None else {"attention_mask": mask[:, : seen + start + 1]}
        parts.append(_step(run, forward, cache, given | {"return_dict": True}))
    return _joined(parts, return_dict)


def _prefill_in_chunks(run: SqueezedModel, forward, prefill: Prefill, given: dict[str, Any]) -> ModelOutput | tuple:
    """The decoder's output over prompts, a chunk of columns at a time.

    Counted from the end, where left-padded prompts meet: so the chunks of a prompt do not depend on its batch.
    """
    cache = prefill.cache
    tokens, size = cache.columns, prefill.chunk or cache.columns
    return_dict = given.pop("return_dict", run.model.config.return_dict)
    inputs = given["input_ids"] if given.get("inputs_embeds") is None else given["inputs_embeds"]
    if "position_ids" in run.decoder_arguments and given.get("position_ids") is None:
        given["position_ids"] = torch.arange(tokens, device=inputs.device)[None]
    whole = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
    parts = []
    with _whole_lengths(run.ropes, given.get("position_ids")):
        for end in range((tokens - 1) % size + 1, tokens + 1, size):
            start = max(end - size, 0)
            prefill.begin_chunk(start, end)
            given |= {name: _columns(name, value, start, end) for name, value in whole.items()}
            parts.append(forward(**given, return_dict=True))
    return _joined(parts, return_dict)


def _joined(parts: Sequence[ModelOutput], return_dict: bool | None) -> ModelOutput | tuple:
    """The output over all tokens, from those over some after the others."""
    output = parts[-1]
    output.last_hidden_state = torch.cat([part.last_hidden_state for part in parts], dim=1)
    if parts[0].hidden_states is not None:
        by_layer = zip(*(part.hidden_states for part in parts), strict=True)
        output.hidden_states = tuple(None if each[0] is None else torch.cat(each, dim=1) for each in by_layer)
    return output.to_tuple() if return_dict is False else output


def _columns(name: str, value: torch.Tensor, start: int, end: int) -> torch.Tensor:
    """Columns of an argument that has one for each token: the last dimension of positions, of which some models have
    several kinds (M-RoPE), and the second one of others."""
    if name == "attention_mask":
        return value[:, :end]
    return value[..., start:end] if name == "position_ids" or value.ndim == 1 else value[:, start:end]


@contextmanager
def _whole_lengths(ropes: Sequence[LengthwiseRope], position_ids: torch.Tensor | None) -> Iterator[None]:
    """A block in which chunks of prompts have the angles of the whole prompts, whose positions are given."""
    for rope in ropes:
        assert position_ids is not None
        rope.lengths = position_ids.amax(dim=-1) + 1
    try:
        yield
    finally:
        for rope in ropes:
            rope.lengths = None
