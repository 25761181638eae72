"""Binds importance, allocation, evictors and cache to a Hugging Face model. The only file that knows its internals.

Everything happens in memory and on one model instance: no class is changed and no installed file is written. A
forward pass without a SqueezeCache runs the model's own code.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.generation import GenerationMode
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb
from transformers.models.mistral.modeling_mistral import MistralAttention

from squeeze import attention
from squeeze.allocation import Budgets, allocate, classify
from squeeze.cache import SqueezeCache, SqueezeLayer
from squeeze.clock import now
from squeeze.compatibility import check_transformers
from squeeze.compiling import compiled
from squeeze.config import DEFAULT_ALGORITHM, InputError, SqueezeConfig
from squeeze.evictors import make_evictor
from squeeze.importance import similarity

#: What the patched forward pass uses of an attention module.
ATTENTION_CLASSES: dict[str, Any] = {"llama": LlamaAttention, "mistral": MistralAttention}
ATTENTION_ATTRIBUTES = ("q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "scaling", "layer_idx")


@dataclass
class Prefill:
    """A prefill that other configurations can take over: nothing in it depends on budgets.

    Args:
        inputs: token ids, `(batch, tokens)`.
        lengths: of the prompts, padding excluded.
        way: what else it depends on, of the configuration.
        layers: keys, values and scores of each.
        measured: similarities of each layer, `(batch,)`.
        states: what the decoder gave, `(batch, tokens, hidden)`.
        seconds: that it took.
    """

    inputs: torch.Tensor
    lengths: list[int]
    way: tuple[bool, str]
    layers: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    measured: list[torch.Tensor]
    states: torch.Tensor
    seconds: float


class SqueezedModel:
    """A model whose `generate` keeps a squeezed cache, and what the last prefill told about it.

    Attributes:
        config: the configuration, its algorithm filled in.
        similarities: `(batch, layers)` float32, mean cosine similarity per layer; None with explicit budgets.
        classes: `(batch, layers)` 1, 2 or 3; None with explicit budgets.
        budgets: `(batch, layers)` tokens.
        kv_bytes: bytes of all key and value tensors held after the prefill.
        state_bytes: bytes of H2O's scores and positions, or of StreamingLLM's sinks as they came.
        notes: of each sequence, sentences that the user should see, such as that minimum budgets made the total grow.
        share_prefills: keep the last prefill, all of its keys and values, for other configurations on the same prompts
            (`use`); what they give is the same as without.
        shared_seconds: what the last prefill took if it was taken over from an earlier one, else 0.
    """

    def __init__(self, model: PreTrainedModel, config: SqueezeConfig):
        check_transformers()
        self.model = model
        self.compiled = config.compile
        self.use(config)
        self.similarities: np.ndarray | None = None
        self.classes: np.ndarray | None = None
        self.budgets: np.ndarray | None = None
        self.kv_bytes = 0
        self.state_bytes = 0
        self.notes: list[list[str]] = []
        self.share_prefills = False
        self.shared_seconds = 0.0
        self._prefill: Prefill | None = None
        self._entering: torch.Tensor | None = None
        self._lengths: tuple[list[int], list[int]] = [], []
        self._measured: list[torch.Tensor] = []

    def use(self, config: SqueezeConfig) -> None:
        """Go on with another configuration, from the next prompt on.

        Raises:
            InputError: it does not fit the model.
            ValueError: it is to be compiled and the first one was not, or the reverse.
        """
        model = self.model
        architecture = model.config.model_type
        if architecture not in ATTENTION_CLASSES:
            raise InputError(f"the model is of type {architecture}; supported are {', '.join(ATTENTION_CLASSES)}")
        layers = model.config.num_hidden_layers
        if config.budgets is not None and len(config.budgets) != layers:
            raise InputError(f"budgets must have one entry a layer: {layers}, got {len(config.budgets)}")
        algorithm = config.algorithm or DEFAULT_ALGORITHM[architecture]
        if config.compile != self.compiled:
            raise ValueError("compiling is decided on when the model is squeezed: leave the `with` block first")
        self.config = replace(config, algorithm=algorithm)
        self.evictor = make_evictor(algorithm, config.start_size)
        self.window = getattr(model.config, "sliding_window", None)
        if config.budgets is not None and min(config.budgets) < self.evictor.minimum_budget:
            raise InputError(
                f"budgets must be at least {self.evictor.minimum_budget} tokens for {algorithm}, "
                f"got {min(config.budgets)} in layer {int(np.argmin(config.budgets))}"
            )
        if self.window is not None and self.window < self.evictor.minimum_budget:
            raise InputError(
                f"{algorithm} needs {self.evictor.minimum_budget} tokens a layer, and the model's own "
                f"sliding window is {self.window}"
            )
        if config.allocation == "calibrated":
            if config.calibration is None:
                raise InputError("the allocation calibrated needs loss curves: calibration=read_calibration(FILE)")
            config.calibration.check(algorithm, config.start_size, layers)
        rope = model.config.rope_parameters["rope_type"]
        if self.evictor.sinks and rope in ("dynamic", "longrope"):
            raise InputError(f"streaming moves sink tokens by fixed angles; the model's RoPE is of type {rope}")
        if config.compile and len(set(getattr(model, "hf_device_map", {}).values())) > 1:
            raise InputError("compile needs the model on one device, and this one was spread by a device_map")

    def forget_prefill(self) -> None:
        """Let go of the prefill that is kept for other configurations."""
        self._prefill = None

    def cache(self, max_new_tokens: int) -> SqueezeCache:
        """An empty cache for one prompt or batch and up to `max_new_tokens` tokens after it."""
        inv_freq = self.model.model.rotary_emb.inv_freq
        return SqueezeCache(self.evictor, self.model.config.num_hidden_layers, max_new_tokens, inv_freq)

    def prefill(self, tokens: torch.Tensor) -> Prefill:
        """Prefill prompts of one length, `(batch, tokens)`, and keep all of it for `fork`."""
        share, self.share_prefills = self.share_prefills, True
        inputs = tokens.to(self.model.get_input_embeddings().weight.device)
        self.model.model(input_ids=inputs, past_key_values=self.cache(1), use_cache=True)
        self.share_prefills = share
        assert self._prefill is not None
        return self._prefill

    def fork(self, prefill: Prefill, budgets: Sequence[Sequence[int]], max_new_tokens: int) -> SqueezeCache:
        """A cache that goes on after one prompt's prefill in several ways, one a sequence of its batch.

        Args:
            prefill: of a batch of one.
            budgets: `(sequences, layers)` tokens.
            max_new_tokens: that can be decoded.
        """
        cache = self.cache(max_new_tokens)
        cache.begin(prefill.inputs.shape[1], len(budgets), None)
        for layer, held in zip(cache.layers, prefill.layers, strict=True):
            layer.fill(*(part.expand(len(budgets), -1, *part.shape[2:]) if part.numel() else part for part in held))
        cache.compress(budgets)
        return cache

    def begin_prefill(self, cache: SqueezeCache) -> None:
        """Tell the cache its budgets, where they are known already and no other configuration shares the prefill."""
        self._measured = []
        if not self.config.needs_similarities and (self.config.prefill_chunk or not self.share_prefills):
            known = [self._allocate(None, length, cache.max_new_tokens) for length in cache.prompt_lengths]
            cache.budgets = np.array([budgets.tokens for budgets in known]).T

    def finish_prefill(self, cache: SqueezeCache) -> None:
        """Turn what was measured into budgets, sequence by sequence, and cut the cache to them if it is not yet."""
        measured = None
        if self._measured:
            by_chunk = torch.stack([values.cpu() for values in self._measured]).unflatten(0, (-1, len(cache.layers)))
            measured = by_chunk.sum(dim=0).T.numpy()
        self._measured = []
        if measured is not None and not np.isfinite(measured).all():
            raise InputError(f"the model's hidden states are not finite in {self.model.dtype}: use another dtype")
        allocated = [
            self._allocate(None if measured is None else measured[row], length, cache.max_new_tokens)
            for row, length in enumerate(cache.prompt_lengths)
        ]
        cache.compress([budgets.tokens for budgets in allocated])
        self.similarities = measured
        self.classes = None if measured is None else np.array([budgets.classes for budgets in allocated])
        self.budgets = cache.budgets.T
        self.kv_bytes, self.state_bytes = cache.kv_bytes, cache.state_bytes
        self.notes = [list(budgets.notes) for budgets in allocated]

    def _allocate(self, similarities: np.ndarray | None, length: int, max_new_tokens: int) -> Budgets:
        cap = length + max_new_tokens
        if self.window is not None:
            cap = min(cap, self.window)
        if self.config.budgets is not None:
            return Budgets([min(tokens, cap) for tokens in self.config.budgets])
        if similarities is None:  # not measured yet, and these budgets are the same whatever they will be
            similarities = np.zeros(self.model.config.num_hidden_layers)
        if self.config.calibration is not None:
            tokens = self.config.calibration.budgets(self.config.share, length, cap, self.evictor.minimum_budget)
            return Budgets(tokens, classify(similarities))
        ini_size, kv_class3 = self.config.fractions
        return allocate(
            similarities,
            allocation=self.config.allocation,
            ini_size=ini_size,
            kv_class3=kv_class3,
            length=length,
            cap=cap,
            minimum=self.evictor.minimum_budget,
        )


@contextmanager
def squeezed(model: PreTrainedModel, config: SqueezeConfig) -> Iterator[SqueezedModel]:
    """Give `model.generate` a per-layer KV budget inside the `with` block; afterwards the model is what it was.

    For inference: no gradient flows through attention on a squeezed cache.

    >>> with squeezed(model, SqueezeConfig(algorithm="h2o", ini_size=0.2, kv_class3=0.1)) as run:
    ...     tokens = model.generate(**inputs, max_new_tokens=64)
    ...     print(run.budgets, run.kv_bytes)

    Raises:
        InputError: the model's architecture is not supported, or `config` does not fit the model.
        ImportError: the installed transformers is not one that the patch was tested with.
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
        run.begin_prefill(cache)
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
    known = run._prefill
    if (
        known is None
        or (known.way, known.lengths) != (way, cache.prompt_lengths)
        or not torch.equal(known.inputs, inputs)
    ):
        run._prefill = known = None  # let go of the old one first
        start = now(inputs.device)
        output = original(*args, **kwargs)
        seconds = now(inputs.device) - start
        layers = [(layer.keys, layer.values, layer.scores) for layer in cache.layers]
        run._prefill = Prefill(
            inputs, cache.prompt_lengths, way, layers, run._measured, output.last_hidden_state, seconds
        )
        run.shared_seconds = 0.0
        return output
    for layer, held in zip(cache.layers, known.layers, strict=True):
        layer.fill(*held)
    run._measured, run.shared_seconds = known.measured, known.seconds
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
    run._entering = None
    if cache is not None and not cache.compressed and run.config.budgets is None:
        run._entering = args[0] if args else kwargs["hidden_states"]
        run._lengths = cache.lengths, cache.prompt_lengths


def _mix(run: SqueezedModel, norm, args):
    """Before the post-attention norm: its input is the stream after self-attention."""
    if run._entering is not None:
        run._measured.append(similarity(run._entering, args[0], *run._lengths))
        run._entering = None


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
