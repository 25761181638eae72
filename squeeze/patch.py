"""Binds importance, allocation, evictors and cache to a Hugging Face model: the file that knows its forward pass.

Everything happens in memory and on one model instance: no class is changed and no installed file is written. A
forward pass without a SqueezeCache runs the model's own code.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.generation import GenerationMode
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb
from transformers.models.mistral.modeling_mistral import MistralAttention

from squeeze import attention
from squeeze.cache import SqueezeCache, SqueezeLayer
from squeeze.clock import now
from squeeze.compiling import compiled
from squeeze.config import SqueezeConfig
from squeeze.importance import similarity
from squeeze.squeezed_model import Prefill, SqueezedModel

#: What the patched forward pass uses of an attention module.
ATTENTION_CLASSES: dict[str, Any] = {"llama": LlamaAttention, "mistral": MistralAttention}
ATTENTION_ATTRIBUTES = ("q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "scaling", "layer_idx")


@contextmanager
def squeezed(model: PreTrainedModel, config: SqueezeConfig) -> Iterator[SqueezedModel]:
    """Give `model.generate` a per-layer KV budget inside the `with` block; afterwards the model is what it was.

    For inference: no gradient flows through attention on a squeezed cache.

    >>> with squeezed(model, SqueezeConfig(algorithm="h2o", ini_size=0.2, kv_class3=0.1)) as run:
    ...     tokens = model.generate(**inputs, max_new_tokens=64)
    ...     print(run.budgets, run.kv_bytes)

    Raises:
        InputError: the model's architecture is not supported, or `config` does not fit the model.
        UntestedVersion: the installed transformers is not one that the patch was tested with.
        ValueError: the model is squeezed already; from `generate`, decoding that evicted tokens make impossible
            (beams, assisted decoding, a prompt fed in chunks).
    """
    if "_prepare_cache_for_generation" in vars(model):
        raise ValueError("the model is squeezed already: leave the outer `with squeezed(...)` first")
    run = SqueezedModel(model, config)
    step = compiled(_decode_block, model.device) if config.compile else None
    decoder = model.model
    handles = [
        decoder.register_forward_pre_hook(functools.partial(_begin, run), with_kwargs=True),
        decoder.register_forward_hook(functools.partial(_end, run), with_kwargs=True),
    ]
    undo = [
        _replace(model, "_prepare_cache_for_generation", functools.partial(_prepare_cache, run)),
        _replace(decoder, "forward", functools.partial(_decoder_forward, run, decoder.forward)),
    ]
    try:
        for layer in decoder.layers:
            handles.append(layer.register_forward_pre_hook(functools.partial(_enter, run), with_kwargs=True))
            handles.append(layer.post_attention_layernorm.register_forward_pre_hook(functools.partial(_mix, run)))
            module = layer.self_attn
            # accelerate keeps the forward it wrapped under another name; its wrapper must stay outside ours.
            name = "_old_forward" if hasattr(module, "_hf_hook") else "forward"
            undo.append(_replace(module, name, functools.partial(_forward, run, module, getattr(module, name))))
            if step is not None:
                undo.append(_replace(layer, "forward", functools.partial(_block_forward, step, layer, layer.forward)))
        yield run
    finally:
        for handle in handles:
            handle.remove()
        for restore in undo:
            restore()


def _replace(owner: object, name: str, value: object):
    """Set an instance attribute; returns a function that puts back what was there, or that nothing was."""
    missing = object()
    before = vars(owner).get(name, missing)
    setattr(owner, name, value)
    return (
        functools.partial(delattr, owner, name)
        if before is missing
        else functools.partial(setattr, owner, name, before)
    )


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
    if generation_config.use_cache is False:
        raise ValueError("use_cache=False leaves nothing to squeeze: generate outside `with squeezed(...)`")
    if cache is None:
        prompt = model_kwargs["position_ids"].shape[-1]
        # max_cache_length is one less than prompt and new tokens: the last token is never fed back.
        model_kwargs["past_key_values"] = run.cache(max_cache_length + 1 - prompt)
    return None


def _squeeze_cache(kwargs: dict) -> SqueezeCache | None:
    cache = kwargs.get("past_key_values")
    return cache if isinstance(cache, SqueezeCache) else None


def _begin(run: SqueezedModel, decoder, args, kwargs):
    """Before the decoder: lengths come from the 2-D padding mask, and transformers is spared building a 4-D one."""
    cache = _squeeze_cache(kwargs)
    if cache is None:
        return None
    inputs = args[0] if args else kwargs.get("input_ids")
    if inputs is None:
        inputs = kwargs["inputs_embeds"]
    batch, tokens = inputs.shape[:2]
    if cache.compressed:
        cache.begin(tokens, batch, None)
    else:
        cache.begin(tokens, batch, kwargs.get("attention_mask"))
        run.begin_prefill(cache, inputs if inputs.ndim == 2 else None)
    # A mask that has four dimensions is handed through as it is; the patched attention does not look at it.
    return args, kwargs | {"attention_mask": inputs.new_zeros(1, 1, 1, 1)}


def _decoder_forward(run: SqueezedModel, original, *args, **kwargs):
    """Stands in for the decoder's forward pass: a prefill that was done already is not done again."""
    cache, inputs = _squeeze_cache(kwargs), args[0] if args else kwargs.get("input_ids")
    if cache is not None and not cache.compressed and run.config.prefill_chunk is not None:
        run.shared_seconds = 0.0
        return _prefill_in_chunks(original, cache, run.config.prefill_chunk, **kwargs | {"input_ids": inputs})
    if cache is None or cache.compressed or not run.share_prefills or inputs is None:
        return original(*args, **kwargs)
    way = (run.evictor.needs_scores, run.config.attn)
    known = run.kept_prefill
    if (
        known is None
        or (known.way, known.lengths) != (way, cache.prompt_lengths)
        or not torch.equal(known.inputs, inputs)
    ):
        run.kept_prefill = known = None  # let go of the old one first
        start = now(inputs.device)
        output = original(*args, **kwargs)
        seconds = now(inputs.device) - start
        layers = [(layer.keys, layer.values, layer.scores) for layer in cache.layers]
        run.kept_prefill = Prefill(
            inputs, cache.prompt_lengths, way, layers, run.measured, output.last_hidden_state, seconds
        )
        run.shared_seconds = 0.0
        return output
    for layer, held in zip(cache.layers, known.layers, strict=True):
        layer.fill(*held)
    run.measured, run.shared_seconds = known.measured, known.seconds
    return BaseModelOutputWithPast(last_hidden_state=known.states, past_key_values=cache)


def _prefill_in_chunks(
    original, cache: SqueezeCache, size: int, input_ids=None, inputs_embeds=None, position_ids=None, **kwargs
) -> BaseModelOutputWithPast:
    """The decoder's forward pass over a prompt, `size` columns at a time.

    Counted from the end, where left-padded prompts meet: so the chunks of a prompt do not depend on its batch.
    """
    inputs, name = (input_ids, "input_ids") if inputs_embeds is None else (inputs_embeds, "inputs_embeds")
    tokens = inputs.shape[1]
    if position_ids is None:
        position_ids = torch.arange(tokens, device=inputs.device)[None]
    states = []
    for end in range((tokens - 1) % size + 1, tokens + 1, size):
        start = max(end - size, 0)
        cache.begin_chunk(start, end)
        chunk = {name: inputs[:, start:end], "position_ids": position_ids[:, start:end]}
        states.append(original(**kwargs, **chunk).last_hidden_state)
    return BaseModelOutputWithPast(last_hidden_state=torch.cat(states, dim=1), past_key_values=cache)


def _end(run: SqueezedModel, decoder, args, kwargs, output):
    """After the decoder: count the step, or, after the prefill, cut the cache to its budgets."""
    cache = _squeeze_cache(kwargs)
    if cache is not None:
        cache.end_step() if cache.compressed else run.finish_prefill(cache)


def _enter(run: SqueezedModel, layer, args, kwargs):
    """Before a decoder layer: remember the residual stream, if this is a prefill."""
    cache = _squeeze_cache(kwargs)
    run.entering = None
    if cache is not None and not cache.compressed and run.config.budgets is None:
        run.entering = args[0] if args else kwargs["hidden_states"]
        run.entering_lengths = cache.lengths, cache.prompt_lengths


def _mix(run: SqueezedModel, norm, args):
    """Before the post-attention norm: its input is the stream after self-attention."""
    if run.entering is not None:
        run.measured.append(similarity(run.entering, args[0], *run.entering_lengths))
        run.entering = None


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
    if cache.compressed:
        return _decode(module, hidden_states, position_embeddings, cache.layers[module.layer_idx]), None
    queries, keys, values = _project(module, hidden_states, position_embeddings)
    # A copy, where they are a part of a larger product that would stay in memory with them.
    values = values.detach().contiguous()
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
    """Queries and keys after RoPE, and values: `(batch, heads or kv_heads, tokens, head_dim)`."""
    shape = (*hidden_states.shape[:-1], -1, module.head_dim)
    queries, keys, values = (
        projection(hidden_states).view(shape).transpose(1, 2)
        for projection in (module.q_proj, module.k_proj, module.v_proj)
    )
    return *apply_rotary_pos_emb(queries, keys, *position_embeddings), values


def _output(module, attended):
    return module.o_proj(attended.transpose(1, 2).flatten(2))


def _decode(module, hidden_states, position_embeddings, layer: SqueezeLayer):
    """Self-attention of a decode step."""
    queries, keys, values = _project(module, hidden_states, position_embeddings)
    layer.write(keys.detach(), values.detach())
    return _output(module, attention.decode(queries, layer, module.scaling))


def _decode_block(block, hidden_states, position_embeddings, layer: SqueezeLayer):
    """A decode step of a whole decoder layer, for `torch.compile`: it sees nothing that differs between layers."""
    normed = block.input_layernorm(hidden_states)
    hidden_states = hidden_states + _decode(block.self_attn, normed, position_embeddings, layer)
    return hidden_states + block.mlp(block.post_attention_layernorm(hidden_states))


def _block_forward(step, block, original, hidden_states, **kwargs):
    """Stands in for a decoder layer's forward pass where the decode step is compiled."""
    cache = _squeeze_cache(kwargs)
    if cache is None or not cache.compressed:
        return original(hidden_states, **kwargs)
    return step(block, hidden_states, kwargs["position_embeddings"], cache.layers[block.self_attn.layer_idx])
