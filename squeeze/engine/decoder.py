"""The stand-in for the decoder's forward pass: a prefill, whole, in chunks or taken over, or a decode step."""

from __future__ import annotations

from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast

from squeeze.devices import now
from squeeze.engine.cache import SqueezeCache
from squeeze.engine.prefill import Prefill
from squeeze.engine.squeezed_model import SqueezedModel


# Not for Dynamo, which would trace it into scikit-learn: the graph of a model that its user compiled breaks off here.
@torch.compiler.disable
def decoder_forward(
    run: SqueezedModel,
    original,
    input_ids=None,
    attention_mask=None,
    position_ids=None,
    past_key_values=None,
    inputs_embeds=None,
    use_cache=None,
    **kwargs,
):
    """Stands in for the decoder's forward pass, for one thread at a time.

    Raises:
        ValueError: the call would make a cache of its own, or asks for what a squeezed cache cannot do.
    """
    given = {"input_ids": input_ids, "position_ids": position_ids, "inputs_embeds": inputs_embeds}
    given |= {"past_key_values": past_key_values, "use_cache": use_cache} | kwargs
    inputs = input_ids if inputs_embeds is None else inputs_embeds
    cache = past_key_values
    with run.lock, run.apart():
        if not isinstance(cache, SqueezeCache) or inputs is None:
            if cache is None and (run.model.config.use_cache if use_cache is None else use_cache):
                raise ValueError(
                    "inside `with squeezed(...) as run` a call of the model itself names its cache: "
                    "past_key_values=run.cache(max_new_tokens), or use_cache=False for none"
                )
            return original(attention_mask=attention_mask, **given)
        _check(run, cache, kwargs.get("output_attentions"))
        # A mask that has four dimensions is handed through as it is, and transformers builds none; the patched
        # attention does not look at it, since the cache knows each sequence's length.
        given["attention_mask"] = inputs.new_zeros(1, 1, 1, 1)
        batch, tokens = inputs.shape[:2]
        if cache.compressed:
            with cache.step(batch, tokens):
                return original(**given)
        cache.begin(batch, tokens, attention_mask)
        return _prefill(run, original, cache, given)


def _check(run: SqueezedModel, cache: SqueezeCache, output_attentions: bool | None) -> None:
    if cache.owner[0] is not run.model or (not cache.compressed and cache.owner[1] is not run.evictor):
        raise ValueError(
            "the cache was made for another model, or before run.use(...): make one with run.cache(max_new_tokens)"
        )
    if output_attentions is None:
        output_attentions = getattr(run.model.config, "output_attentions", False)
    if output_attentions:
        raise ValueError(
            "output_attentions is not supported with a squeezed cache, which keeps no probabilities: leave it out"
        )
    layer = run.model.model.layers[0]
    if layer.training and layer.gradient_checkpointing:
        raise ValueError("training with gradient checkpointing takes its cache from a layer: call model.eval() first")


def _prefill(run: SqueezedModel, original, cache: SqueezeCache, given: dict[str, Any]):
    """The decoder's output over the prompts that `cache` has begun with; the cache is cut by then."""
    config, inputs = run.model.config, given["input_ids"]
    more = given.get("output_hidden_states", config.output_hidden_states)  # than a kept prefill has
    plain = not more and given.get("return_dict", config.return_dict) is not False
    with run.prefilling(cache, inputs, plain) as prefill:
        if prefill.chunk is not None:
            return _prefill_in_chunks(run, original, prefill, **given)
        if prefill.kept is not None:
            prefill.take_over(prefill.kept)
            return BaseModelOutputWithPast(last_hidden_state=prefill.kept.states, past_key_values=cache)
        prefill.begin_chunk(0, prefill.columns)
        if not prefill.shared:
            return original(**given)
        start = now(inputs.device)
        output = original(**given)
        prefill.keep(inputs, output.last_hidden_state, now(inputs.device) - start)
        return output


def _prefill_in_chunks(
    run: SqueezedModel, original, prefill: Prefill, input_ids, inputs_embeds, position_ids, past_key_values, **given
) -> BaseModelOutputWithPast | tuple:
    """The decoder's output over prompts, a chunk of columns at a time.

    Counted from the end, where left-padded prompts meet: so the chunks of a prompt do not depend on its batch.
    """
    inputs, name = (input_ids, "input_ids") if inputs_embeds is None else (inputs_embeds, "inputs_embeds")
    return_dict = given.pop("return_dict", run.model.config.return_dict)
    tokens, size = prefill.columns, prefill.chunk or prefill.columns
    if position_ids is None:
        position_ids = torch.arange(tokens, device=inputs.device)[None]
    if run.rope is not None:
        run.rope.lengths = position_ids.amax(dim=-1) + 1
    parts = []
    try:
        for end in range((tokens - 1) % size + 1, tokens + 1, size):
            start = max(end - size, 0)
            prefill.begin_chunk(start, end)
            given |= {name: inputs[:, start:end], "position_ids": position_ids[:, start:end]}
            parts.append(original(**given, past_key_values=past_key_values, return_dict=True))
    finally:
        if run.rope is not None:
            run.rope.lengths = None
    output = BaseModelOutputWithPast(
        last_hidden_state=torch.cat([part.last_hidden_state for part in parts], dim=1),
        past_key_values=past_key_values,
    )
    if parts[0].hidden_states is not None:
        by_layer = zip(*(part.hidden_states for part in parts), strict=True)
        output.hidden_states = tuple(None if each[0] is None else torch.cat(each, dim=1) for each in by_layer)
    return output.to_tuple() if return_dict is False else output
