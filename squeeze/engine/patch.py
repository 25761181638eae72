"""Binds importance, allocation, evictors and cache to a Hugging Face model: the file that knows its forward pass.

Everything happens in memory and on one model instance: no class is changed and no installed file is written. A
forward pass without a SqueezeCache runs the model's own code.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.generation import GenerationMode
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb
from transformers.models.mistral.modeling_mistral import MistralAttention

from squeeze.allocations.base import Allocation
from squeeze.config import SqueezeConfig, as_config
from squeeze.devices import now
from squeeze.engine import attention
from squeeze.engine.cache import SqueezeCache
from squeeze.engine.compiling import compiled
from squeeze.engine.layer import SqueezeLayer
from squeeze.engine.prefill import Prefill
from squeeze.engine.squeezed_model import SqueezedModel
from squeeze.errors import InputError
from squeeze.evictors import Evictor
from squeeze.importance import similarity
from squeeze.models.rope import LengthwiseRope, depends_on_length, forward_name

#: What the patched forward pass uses of an attention module.
ATTENTION_CLASSES: dict[str, Any] = {"llama": LlamaAttention, "mistral": MistralAttention}
ATTENTION_ATTRIBUTES = ("q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "scaling", "layer_idx")


#: Held while a model is patched, or put back: threads may want the same one.
_patching = threading.Lock()


@contextmanager
def squeezed(
    model: Any,
    config: SqueezeConfig | Evictor | str | None,
    allocation: Allocation | str | None = None,
    **options: Any,
) -> Iterator[SqueezedModel]:
    """Give `model.generate` a per-layer KV budget inside the `with` block; afterwards the model is what it was.

    For inference: no gradient flows through attention on a squeezed cache. Threads may use the model at the same time:
    their forward passes take turns, and `run` tells of the last prefill of any of them.

    >>> with squeezed(model, H2O(), Squeeze(0.2, class3=0.1)) as run:
    ...     tokens = model.generate(**inputs, max_new_tokens=64)
    ...     print(run.budgets, run.kv_bytes)

    Args:
        model: of transformers, or what PEFT (adapters), torch.compile or DistributedDataParallel made of one.
        config: an eviction method, None for the architecture's default; or a SqueezeConfig, which says everything.
        allocation: what makes the budgets of the layers.
        options: `attn`, `compile`, `prefill_chunk`, see SqueezeConfig.
    Raises:
        InputError: the model's architecture is not supported, or `config` does not fit the model.
        UntestedVersion: the installed transformers is not one that the patch was tested with.
        ValueError: the model is squeezed already. From `generate`, and from calls of the model itself: what a squeezed
            cache cannot do (beams, assisted decoding, attention probabilities, a prompt fed in pieces), and a call
            that would make another cache of its own.
    """
    config = as_config(config, allocation, **options)
    model = unwrap(model)
    undo = ExitStack()
    try:
        with _patching:
            run = _patch(undo, model, config)
    except BaseException:
        undo.close()
        raise
    try:
        yield run
    finally:
        with _patching, run.lock:  # a forward pass of another thread ends first
            undo.close()


def _patch(undo: ExitStack, model: PreTrainedModel, config: SqueezeConfig) -> SqueezedModel:
    """Put everything in place that `undo` takes away again."""
    if "_prepare_cache_for_generation" in vars(model):
        raise ValueError("the model is squeezed already: leave the outer `with squeezed(...)` first")
    run = SqueezedModel(model, config)
    step = compiled(_decode_block, model.device) if config.compile else None
    decoder = model.model
    _replace(undo, model, "_prepare_cache_for_generation", functools.partial(_prepare_cache, run))
    _replace(undo, model, "init_continuous_batching", _no_continuous_batching)
    _replace(undo, decoder, "forward", functools.partial(_decoder_forward, run, decoder.forward))
    if depends_on_length(model.config):
        run.rope = _lengthwise(undo, decoder.rotary_emb)
    for layer in decoder.layers:
        hook = layer.register_forward_pre_hook(functools.partial(_enter, run), with_kwargs=True)
        undo.callback(hook.remove)
        hook = layer.post_attention_layernorm.register_forward_pre_hook(functools.partial(_mix, run))
        undo.callback(hook.remove)
        module = layer.self_attn
        name = forward_name(module)
        _replace(undo, module, name, functools.partial(_forward, run, module, getattr(module, name)))
        if step is not None:
            _replace(undo, layer, "forward", functools.partial(_block_forward, step, layer, layer.forward))
    return run


def unwrap(model: Any) -> PreTrainedModel:
    """The causal language model of transformers in what PEFT, torch.compile or DistributedDataParallel made of it.

    Raises:
        InputError: there is none, or PEFT puts learned tokens before every prompt.
    """
    found = model
    while not isinstance(found, PreTrainedModel):
        if getattr(getattr(found, "active_peft_config", None), "is_prompt_learning", False):
            raise InputError(
                "a PEFT model with learned prompts or prefixes puts tokens before every prompt that a squeezed cache "
                "does not know of: use an adapter such as LoRA"
            )
        if hasattr(found, "get_base_model"):
            found = found.get_base_model()
        elif isinstance(getattr(found, "_orig_mod", None), nn.Module):
            found = found._orig_mod
        elif isinstance(found, nn.DataParallel) and len(found.device_ids) > 1:
            raise InputError("DataParallel copies a model to every GPU and runs the copies: give squeezed its .module")
        elif isinstance(getattr(found, "module", None), nn.Module):
            found = found.module
        else:
            raise InputError(f"squeezed takes a causal language model of transformers, got {type(model).__name__}")
    if not found.can_generate():
        raise InputError(f"squeezed takes a causal language model, and a {type(found).__name__} generates nothing")
    return found


def _replace(undo: ExitStack, owner: object, name: str, value: object) -> None:
    """Set an instance attribute; `undo` puts back what was there, or that nothing was."""
    own = vars(owner)
    if name in own:
        undo.callback(setattr, owner, name, own[name])
    else:
        undo.callback(delattr, owner, name)
    setattr(owner, name, value)


def _lengthwise(undo: ExitStack, rotary: nn.Module) -> LengthwiseRope:
    """Angles by each sequence's own length, as `squeeze.models.loading` gave them to the model, or from now on."""
    name = forward_name(rotary)
    there = vars(rotary).get(name)
    if isinstance(there, LengthwiseRope):
        return there
    made = LengthwiseRope(rotary)
    _replace(undo, rotary, name, made)
    return made


def _prepare_cache(run: SqueezedModel, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length):
    """Stands in for `GenerationMixin._prepare_cache_for_generation`: `generate` gets a SqueezeCache."""
    cache = model_kwargs.get("past_key_values")
    if cache is not None and not isinstance(cache, SqueezeCache):
        original = type(run.model)._prepare_cache_for_generation
        return original(run.model, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
    if generation_mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(
            f"{generation_mode.value.replace('_', ' ')} is not supported with a squeezed cache: "
            "use greedy decoding or sampling"
        )
    for name in ("prefill_chunk_size", "cache_implementation"):
        if getattr(generation_config, name) is not None:
            raise ValueError(
                f"{name} cannot be combined with a squeezed cache, which takes the prompt in one piece, or in the "
                "chunks of SqueezeConfig(prefill_chunk=...)"
            )
    if generation_config.guidance_scale not in (None, 1):
        raise ValueError("guidance_scale reads every prompt a second time, on a cache of its own: leave it out")
    if generation_config.use_cache is False:
        raise ValueError(
            "use_cache is False, in the call or in model.generation_config, which leaves nothing to squeeze: "
            "set it to True, or generate outside of `with squeezed(...)`"
        )
    if cache is None:
        prompt = model_kwargs["position_ids"].shape[-1]
        # max_cache_length is one less than prompt and new tokens: the last token is never fed back.
        model_kwargs["past_key_values"] = run.cache(max_cache_length + 1 - prompt)
    return None


def _no_continuous_batching(*args: Any, **kwargs: Any) -> NoReturn:
    """Stands in for `init_continuous_batching`, by which `generate_batch` makes a paged cache of its own."""
    raise ValueError("continuous batching has a cache of its own: use model.generate inside `with squeezed(...)`")


def _squeeze_cache(kwargs: dict) -> SqueezeCache | None:
    cache = kwargs.get("past_key_values")
    return cache if isinstance(cache, SqueezeCache) else None


# Hooks and stand-ins are not for Dynamo, which would trace them into scikit-learn: the graph of a model that its user
# compiled breaks off here.
@torch.compiler.disable
def _decoder_forward(
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
    """Stands in for the decoder's forward pass, for one thread at a time: a prompt, or a decode step."""
    given = {"input_ids": input_ids, "position_ids": position_ids, "inputs_embeds": inputs_embeds}
    given |= {"past_key_values": past_key_values, "use_cache": use_cache} | kwargs
    inputs = input_ids if inputs_embeds is None else inputs_embeds
    cache = past_key_values
    with run.lock:
        if not isinstance(cache, SqueezeCache) or inputs is None:
            if cache is None and (run.model.config.use_cache if use_cache is None else use_cache):
                raise ValueError(
                    "inside `with squeezed(...) as run` a call of the model itself names its cache: "
                    "past_key_values=run.cache(max_new_tokens), or use_cache=False for none"
                )
            return original(attention_mask=attention_mask, **given)
        if cache.owner[0] is not run.model or (not cache.compressed and cache.owner[1] is not run.evictor):
            raise ValueError(
                "the cache was made for another model, or before run.use(...): make one with run.cache(max_new_tokens)"
            )
        asked = kwargs.get("output_attentions")
        if getattr(run.model.config, "output_attentions", False) if asked is None else asked:
            raise ValueError(
                "output_attentions is not supported with a squeezed cache, which keeps no probabilities: leave it out"
            )
        layer = run.model.model.layers[0]
        if layer.training and layer.gradient_checkpointing:
            raise ValueError(
                "training with gradient checkpointing takes its cache from a layer: call model.eval() first"
            )
        batch, tokens = inputs.shape[:2]
        # A mask that has four dimensions is handed through as it is, and transformers builds none; the patched
        # attention does not look at it, since the cache knows each sequence's length.
        given["attention_mask"] = inputs.new_zeros(1, 1, 1, 1)
        if cache.compressed:
            cache.begin(tokens, batch, None)
            cache.broken = True  # until the last layer has run
            output = original(**given)
            cache.end_step()
            return output
        cache.begin(tokens, batch, attention_mask)
        run.begin_prefill(cache, inputs if inputs.ndim == 2 else None)
        output = _prefill(run, original, cache, given)
        run.finish_prefill(cache)
        return output


def _prefill(run: SqueezedModel, original, cache: SqueezeCache, given: dict[str, Any]):
    """The decoder's forward pass over a prompt: whole, in chunks, or not at all where it was done already."""
    run.shared_seconds = 0.0
    if run.config.prefill_chunk is not None:
        return _prefill_in_chunks(run, original, cache, run.config.prefill_chunk, **given)
    inputs = given["input_ids"]
    more = given.get("output_hidden_states", run.model.config.output_hidden_states)  # than is kept
    if not run.share_prefills or inputs is None or more or given.get("return_dict") is False:
        return original(**given)
    way = (run.evictor.needs_scores, run.config.attn)
    known = run.kept_prefill
    if (
        known is None
        or (known.way, known.lengths) != (way, cache.prompt_lengths)
        or not torch.equal(known.inputs, inputs)
    ):
        run.kept_prefill = known = None  # let go of the old one first
        start = now(inputs.device)
        output = original(**given)
        seconds = now(inputs.device) - start
        layers = [(layer.keys, layer.values, layer.scores) for layer in cache.layers]
        run.kept_prefill = Prefill(
            inputs, cache.prompt_lengths, way, layers, run.measured, output.last_hidden_state, seconds
        )
        return output
    for layer, held in zip(cache.layers, known.layers, strict=True):
        layer.fill(*held)
    run.measured, run.shared_seconds = known.measured, known.seconds
    return BaseModelOutputWithPast(last_hidden_state=known.states, past_key_values=cache)


def _prefill_in_chunks(
    run: SqueezedModel, original, cache: SqueezeCache, size: int, input_ids, inputs_embeds, position_ids, **given
) -> BaseModelOutputWithPast | tuple:
    """The decoder's forward pass over a prompt, `size` columns at a time.

    Counted from the end, where left-padded prompts meet: so the chunks of a prompt do not depend on its batch.
    """
    inputs, name = (input_ids, "input_ids") if inputs_embeds is None else (inputs_embeds, "inputs_embeds")
    return_dict = given.pop("return_dict", run.model.config.return_dict)
    tokens = inputs.shape[1]
    if position_ids is None:
        position_ids = torch.arange(tokens, device=inputs.device)[None]
    if run.rope is not None:
        run.rope.lengths = position_ids.amax(dim=-1) + 1
    parts = []
    try:
        for end in range((tokens - 1) % size + 1, tokens + 1, size):
            start = max(end - size, 0)
            cache.begin_chunk(start, end)
            chunk = {name: inputs[:, start:end], "position_ids": position_ids[:, start:end]}
            parts.append(original(**given, **chunk, return_dict=True))
    finally:
        if run.rope is not None:
            run.rope.lengths = None
    output = BaseModelOutputWithPast(
        last_hidden_state=torch.cat([part.last_hidden_state for part in parts], dim=1), past_key_values=cache
    )
    if parts[0].hidden_states is not None:
        by_layer = zip(*(part.hidden_states for part in parts), strict=True)
        output.hidden_states = tuple(None if each[0] is None else torch.cat(each, dim=1) for each in by_layer)
    return output.to_tuple() if return_dict is False else output


@torch.compiler.disable
def _enter(run: SqueezedModel, layer, args, kwargs):
    """Before a decoder layer: remember the residual stream, if this is a prefill."""
    cache = _squeeze_cache(kwargs)
    run.entering = None
    if cache is not None and not cache.compressed and run.config.allocator.records_similarities:
        run.entering = args[0] if args else kwargs["hidden_states"]
        run.entering_lengths = cache.lengths, cache.prompt_lengths


def _mix(run: SqueezedModel, norm, args):
    """Before the post-attention norm: its input is the stream after self-attention."""
    if run.entering is not None:
        _measure(run, run.entering, args[0])


@torch.compiler.disable  # apart, since a compiled decode step comes through `_mix`
def _measure(run: SqueezedModel, before: torch.Tensor, after: torch.Tensor) -> None:
    run.measured.append(similarity(before, after, *run.entering_lengths))
    run.entering = None


@torch.compiler.disable
def _forward(
    run: SqueezedModel,
    module,
    original,
    hidden_states,
    position_embeddings=None,
    attention_mask=None,
    past_key_values=None,
    **kwargs,
):
    """Stands in for the forward pass of LlamaAttention and MistralAttention where the cache is a SqueezeCache."""
    if not isinstance(past_key_values, SqueezeCache):
        return original(
            hidden_states=hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
    cache = past_key_values
    layer = cache.layers[module.layer_idx]
    if cache.compressed:
        return _decode(module, hidden_states, position_embeddings, layer), None
    queries, keys, values = _project(module, hidden_states, position_embeddings)
    # A copy, where they are a part of a larger product that would stay in memory with them.
    values = values.detach().contiguous()
    with _without_autocast(queries.device):
        output, scores = attention.prefill(
            queries,
            keys,
            values,
            lengths=cache.lengths,
            scale=module.scaling,
            window=run.window,
            fused=run.config.attn != "eager",
            with_scores=run.evictor.needs_scores,
            past=cache.past(module.layer_idx),
        )
    cache.fill(module.layer_idx, keys.detach(), values, scores)
    return _output(module, output), None


def _project(module, hidden_states, position_embeddings) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries and keys after RoPE, and values: `(batch, heads or kv_heads, tokens, head_dim)`.

    Under autocast all are of its dtype, in which the model's own attention would multiply them.
    """
    shape = (*hidden_states.shape[:-1], -1, module.head_dim)
    queries, keys, values = (
        projection(hidden_states).view(shape).transpose(1, 2)
        for projection in (module.q_proj, module.k_proj, module.v_proj)
    )
    queries, keys = apply_rotary_pos_emb(queries, keys, *position_embeddings)
    device = hidden_states.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        return queries.to(dtype), keys.to(dtype), values.to(dtype)
    return queries, keys, values


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """No dtype is changed inside: attention here has float32 softmax and sums, and products into buffers."""
    on = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


def _output(module, attended):
    return module.o_proj(attended.transpose(1, 2).flatten(2))


def _decode(module, hidden_states, position_embeddings, layer: SqueezeLayer):
    """Self-attention of a decode step."""
    queries, keys, values = _project(module, hidden_states, position_embeddings)
    with _without_autocast(queries.device):
        layer.write(keys.detach(), values.detach())
        attended = attention.decode(queries.to(layer.keys.dtype), layer, module.scaling)
    return _output(module, attended.to(queries.dtype))


def _decode_block(block, hidden_states, position_embeddings, layer: SqueezeLayer):
    """A decode step of a whole decoder layer, for `torch.compile`: it sees nothing that differs between layers."""
    normed = block.input_layernorm(hidden_states)
    hidden_states = hidden_states + _decode(block.self_attn, normed, position_embeddings, layer)
    return hidden_states + block.mlp(block.post_attention_layernorm(hidden_states))


@torch.compiler.disable
def _block_forward(step, block, original, hidden_states, **kwargs):
    """Stands in for a decoder layer's forward pass where the decode step is compiled."""
    cache = _squeeze_cache(kwargs)
    if cache is None or not cache.compressed:
        return original(hidden_states, **kwargs)
    return step(block, hidden_states, kwargs["position_embeddings"], cache.layers[block.self_attn.layer_idx])
