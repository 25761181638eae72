"""The patch: puts stand-ins and hooks in place on one Hugging Face model, and takes them away again.

Everything happens in memory and on one model instance: no class is changed and no installed file is written. A
forward pass without a SqueezeCache runs the model's own code.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from squeeze.allocations.base import Allocation
from squeeze.config import SqueezeConfig, as_config
from squeeze.engine.compiling import compiled
from squeeze.engine.decoder import decoder_forward
from squeeze.engine.decoder_layer import after_attention, attention_forward, before_layer, block_forward, decode_block
from squeeze.engine.generate import no_continuous_batching, prepare_cache
from squeeze.engine.squeezed_model import SqueezedModel
from squeeze.engine.unwrap import unwrap
from squeeze.evictors import Evictor
from squeeze.models.rope import LengthwiseRope, depends_on_length, forward_name

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
    """Put stand-ins and hooks on the model; `undo` takes them away again."""
    if "_prepare_cache_for_generation" in vars(model):
        raise ValueError("the model is squeezed already: leave the outer `with squeezed(...)` first")
    run = SqueezedModel(model, config)
    step = compiled(decode_block, model.device) if config.compile else None
    decoder = model.model
    _replace(undo, model, "_prepare_cache_for_generation", partial(prepare_cache, run))
    _replace(undo, model, "init_continuous_batching", no_continuous_batching)
    _replace(undo, decoder, "forward", partial(decoder_forward, run, decoder.forward))
    if depends_on_length(model.config):
        run.rope = _lengthwise(undo, decoder.rotary_emb)
    for layer in decoder.layers:
        hook = layer.register_forward_pre_hook(partial(before_layer, run), with_kwargs=True)
        undo.callback(hook.remove)
        hook = layer.post_attention_layernorm.register_forward_pre_hook(partial(after_attention, run))
        undo.callback(hook.remove)
        module = layer.self_attn
        name = forward_name(module)
        _replace(undo, module, name, partial(attention_forward, run, module, getattr(module, name)))
        if step is not None:
            _replace(undo, layer, "forward", partial(block_forward, step, layer, layer.forward))
    return run


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
    current = vars(rotary).get(name)
    if isinstance(current, LengthwiseRope):
        return current
    lengthwise = LengthwiseRope(rotary)
    _replace(undo, rotary, name, lengthwise)
    return lengthwise
