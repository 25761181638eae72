"""What a model's attention layers are, found by running the model once and not by knowing its name.

One forward pass of sequences of one token: the same token at positions 1, 2 and 38, and another one. Nothing but
positions tells the first three apart, so what a layer caches of them differs by its positional encoding alone. What is
noted on the way says where attention sits, which cache layer it fills, how its output enters the residual stream, and
how a key turns.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from squeeze.compatibility import cache_argument
from squeeze.engine.cache_layers import CACHE_LAYERS, LinearAttentionLayer
from squeeze.engine.findings import AttentionLayer, Findings, squeezable
from squeeze.engine.probe_pass import POSITIONS, ProbePass, configs_of
from squeeze.engine.residual import Residual, find_residuals
from squeeze.engine.rotation import Rotation, Rotations
from squeeze.errors import InputError

__all__ = ["AttentionLayer", "Findings", "Residual", "Rotation", "probe", "squeezable"]

#: Relative error that is rounding, by the dtype of a model.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
#: Arguments of an attention function that change what is attended to, and that a squeezed cache cannot serve. The
#: probe asks for no mask: one that arrives all the same is the layer's own making (Doge).
FOREIGN = ("attention_mask", "position_bias", "indices", "block_indices", "sinks")
#: Model types whose attention is code of their own for which a mask over the cache's slots is enough.
OWN_ATTENTION = ("codegen", "falcon", "gpt_neox_japanese", "gptj")

#: What was found, by model, and what it depends on.
_known: weakref.WeakKeyDictionary[PreTrainedModel, tuple[tuple[Any, ...], Findings]] = weakref.WeakKeyDictionary()


def probe(model: PreTrainedModel) -> Findings:
    """The attention layers of a model, which stays as it is; looked at again only after something in it was exchanged.

    Raises:
        InputError: the model cannot be squeezed; the sentence says why.
    """
    decoder = decoder_of(model)
    settings = [copy.deepcopy(vars(config)) for config in configs_of(decoder)]
    depends = [weakref.ref(module) for module in model.modules()], decoder.dtype, decoder.device, settings
    known = _known.get(model)
    if known is not None and known[0] == depends:
        return known[1]
    findings = _probe(model, decoder)
    if decoder is not model:  # findings that hold their own key would never be let go of
        _known[model] = depends, findings
    return findings


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The module whose forward pass takes token ids and a cache: the model without its head."""
    inner = model.get_decoder()
    if inner is not model and isinstance(inner, PreTrainedModel) and inner.config is model.config:
        return inner  # of OPT, whose head goes past its base model
    if model.base_model is not model:
        return model.base_model
    return next((child for child in model.children() if isinstance(child, PreTrainedModel)), model)


def _probe(model: PreTrainedModel, decoder: PreTrainedModel) -> Findings:
    kind = model.config.model_type
    if model.config.is_encoder_decoder:
        raise InputError(f"{kind} is an encoder-decoder, and squeezed takes models that are a decoder alone")
    no_cache = InputError(f"{kind} has no attention layers with a KV cache")
    if cache_argument() not in inspect.signature(decoder.forward).parameters:
        raise no_cache
    seen = _look(decoder, kind)
    if not seen.cache.updates:
        raise no_cache
    findings = _findings(model, seen)
    why = _refused(findings, seen, kind)
    if why is not None:
        raise InputError(f"{kind} cannot be squeezed: {why}")
    return findings


def _look(decoder: PreTrainedModel, kind: str) -> ProbePass:
    """The pass; where attention does not look into the interface, one with the model's own eager attention."""
    for implementation in (None, "eager"):
        seen = ProbePass(decoder)
        try:
            seen.run(implementation)
        except InputError as error:
            raise InputError(f"{kind} cannot be squeezed: {error}") from error
        except Exception as error:
            if implementation is None:  # attention of its own may miss a mask
                continue
            raise InputError(f"{kind} cannot be squeezed: with transformers' DynamicCache it says: {error}") from error
        interface = {call.module for call in seen.attended}
        if all(update.module in interface for update in seen.cache.updates.values()):
            break
    return seen


def _findings(model: PreTrainedModel, seen: ProbePass) -> Findings:
    names = {module: name for name, module in model.named_modules()}
    updates = dict(sorted(seen.cache.updates.items()))
    tolerance = TOLERANCE.get(seen.decoder.dtype, TOLERANCE[torch.float32])
    around = [_around(model, names[update.module]) for update in updates.values()]
    attentions = [(update.module, modules[-1]) for update, modules in zip(updates.values(), around, strict=True)]
    said = vars(seen.config).items()
    scales = sorted({value for name, value in said if "residual" in name and isinstance(value, float)} - {0.0, 1.0})
    residuals = find_residuals(attentions, seen.calls, scales, tolerance)
    rotations = Rotations(seen.frequencies, POSITIONS, tolerance)
    layers = [
        _layer(seen, index, names[module], module, block, residual, rotations)
        for index, (module, block), residual in zip(updates, attentions, residuals, strict=True)
    ]
    looking_up = [*(module for modules in around for module in modules), *(module for module, _ in attentions)]
    configs = {id(config): config for module in looking_up for config in configs_of(module)}
    rest = (layer for index, layer in enumerate(seen.cache.layers) if index not in updates)
    others = sum(isinstance(layer, LinearAttentionLayer) for layer in rest)
    return Findings(seen.decoder, tuple(configs.values()), tuple(layers), others)


def _layer(
    seen: ProbePass,
    index: int,
    name: str,
    module: nn.Module,
    block: nn.Module,
    residual: Residual | None,
    rotations: Rotations,
) -> AttentionLayer:
    update, uses = seen.cache.updates[index], [call for call in seen.attended if call.layer == index]
    own = next((call.arguments for call in uses if call.module is module), None)
    arguments = own or {}
    stream = next(call.given for call in seen.calls if call.module is block)
    encoding, rotation = rotations.find(stream, update.keys, update.values)
    if encoding == "none" and not seen.positioned:
        encoding = "unknown"
    cached, types = seen.cache.layers[index], getattr(seen.config, "layer_types", None) or ()
    kind = types[index] if index < len(types) else ""
    # Of a window that only a mask would tell; a cache's own may come from a setting that the architecture has not.
    masked = getattr(cached, "sliding_window", None) if "sliding" in kind else None
    chunked = kind == "chunked_attention"
    return AttentionLayer(
        index=index,
        name=name,
        module=module,
        block=block,
        users=tuple(dict.fromkeys([module, *(call.module for call in uses)])),
        interface=own is not None,
        kv_heads=update.keys.shape[1],
        key_dim=update.keys.shape[-1],
        value_dim=update.values.shape[-1],
        window=arguments.get("sliding_window", masked),
        chunk=seen.config.attention_chunk_size if chunked else None,
        softcap=arguments.get("softcap"),
        sinks=arguments.get("s_aux") is not None,
        encoding=encoding,
        rotation=rotation,
        residual=residual,
        as_cached=own is not None and all(call.as_cached for call in uses),
        regrouped=any(call.regrouped for call in uses),
        foreign=tuple(name for name in FOREIGN if any(call.arguments.get(name) is not None for call in uses)),
        hybrid=isinstance(cached, LinearAttentionLayer),
    )


def _refused(findings: Findings, seen: ProbePass, kind: str) -> str | None:
    """Why no method can squeeze the model."""
    if seen.stateful:
        return f"{type(seen.stateful[0]).__name__} keeps a state of its own, outside of the cache"
    for layer in findings.layers:
        cached, attention = type(seen.cache.layers[layer.index]), type(layer.module).__name__
        if cached not in CACHE_LAYERS:
            return f"{attention} caches more than keys and values, in a {cached.__name__}"
        if layer.foreign:
            return f"{attention} is given {', '.join(layer.foreign)}, which a squeezed cache does not have"
        if not layer.interface and layer.module in seen.biased:
            return f"{attention} adds its positions (ALiBi) in code of its own"
        if not layer.interface and kind not in OWN_ATTENTION:
            return f"{attention} does not use transformers' AttentionInterface"
        if [other.module for other in findings.layers].count(layer.module) > 1:
            return f"one {attention} fills several layers of the cache"
    return None


def _around(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules around an attention module, the outermost first; the last one is the decoder layer.

    A decoder layer's name ends in a number, the last one before the attention's own name.
    """
    parts = name.split(".")
    last = max(index for index, part in enumerate(parts[:-1]) if part.isdigit())
    return [model.get_submodule(".".join(parts[:end])) for end in range(last + 2)]
