"""Stand-ins and hooks inside a decoder layer: self-attention on a SqueezeCache, and what importance listens to.

They are not for Dynamo, which would trace them into scikit-learn: the graph of a model that its user compiled breaks
off here.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb
from transformers.models.mistral.modeling_mistral import MistralAttention

from squeeze.engine import attention
from squeeze.engine.cache import SqueezeCache
from squeeze.engine.layer import SqueezeLayer
from squeeze.engine.prefill import Prefill
from squeeze.engine.squeezed_model import SqueezedModel

#: The attention modules that `attention_forward` stands in for, and what it uses of them.
ATTENTION_CLASSES: dict[str, Any] = {"llama": LlamaAttention, "mistral": MistralAttention}
ATTENTION_ATTRIBUTES = ("q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "scaling", "layer_idx")


@torch.compiler.disable
def before_layer(run: SqueezedModel, layer, args, kwargs) -> None:
    """Hook before a decoder layer: its input is the residual stream, `(batch, tokens, hidden)`."""
    if run.under_way is not None:
        run.under_way.enter(args[0] if args else kwargs["hidden_states"])


def after_attention(run: SqueezedModel, norm, args) -> None:
    """Hook before the post-attention norm: its input is the residual stream after self-attention is added."""
    if run.under_way is not None:
        _measure(run.under_way, args[0])


@torch.compiler.disable  # apart, since a compiled decode step comes through `after_attention`
def _measure(prefill: Prefill, stream: torch.Tensor) -> None:
    prefill.measure(stream)


@torch.compiler.disable
def attention_forward(
    run: SqueezedModel,
    module,
    original,
    hidden_states,
    position_embeddings=None,
    attention_mask=None,
    past_key_values=None,
    **kwargs,
):
    """Stands in for the forward pass of an attention module where the cache is a SqueezeCache."""
    if not isinstance(past_key_values, SqueezeCache):
        return original(
            hidden_states=hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
    prefill, index = run.under_way, module.layer_idx
    if prefill is None:
        return _decode(module, hidden_states, position_embeddings, past_key_values.layers[index]), None
    queries, keys, values = _project(module, hidden_states, position_embeddings)
    # A copy, where they are a part of a larger product that would stay in memory with them.
    values = values.detach().contiguous()
    with _without_autocast(queries.device):
        attended, scores = attention.prefill(
            queries,
            keys,
            values,
            lengths=prefill.lengths,
            scale=module.scaling,
            window=prefill.window,
            fused=prefill.attn != "eager",
            with_scores=prefill.needs_scores,
            past=prefill.past(index),
        )
    prefill.fill(index, keys.detach(), values, scores)
    return _output(module, attended), None


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
    """A block in which no dtype is changed: attention has float32 softmax and sums, and products into buffers."""
    on = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


def _output(module, attended: torch.Tensor) -> torch.Tensor:
    """The module's output, `(batch, tokens, hidden)`, of `attended` `(batch, heads, tokens, head_dim)`."""
    return module.o_proj(attended.transpose(1, 2).flatten(2))


def _decode(module, hidden_states, position_embeddings, layer: SqueezeLayer) -> torch.Tensor:
    """Self-attention of a decode step, `(batch, 1, hidden)`."""
    queries, keys, values = _project(module, hidden_states, position_embeddings)
    with _without_autocast(queries.device):
        layer.write(keys.detach(), values.detach())
        attended = attention.decode(queries.to(layer.keys.dtype), layer, module.scaling)
    return _output(module, attended.to(queries.dtype))


def decode_block(block, hidden_states, position_embeddings, layer: SqueezeLayer) -> torch.Tensor:
    """A decode step of a whole decoder layer, for `torch.compile`: it sees nothing that differs between layers."""
    normed = block.input_layernorm(hidden_states)
    hidden_states = hidden_states + _decode(block.self_attn, normed, position_embeddings, layer)
    return hidden_states + block.mlp(block.post_attention_layernorm(hidden_states))


@torch.compiler.disable
def block_forward(step, block, original, hidden_states, past_key_values=None, **kwargs):
    """Stands in for a decoder layer's forward pass where its decode step is compiled, as `step`."""
    if not isinstance(past_key_values, SqueezeCache) or not past_key_values.compressed:
        return original(hidden_states, past_key_values=past_key_values, **kwargs)
    return step(block, hidden_states, kwargs["position_embeddings"], past_key_values.layers[block.self_attn.layer_idx])
