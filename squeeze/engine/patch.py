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

from transformers import PreTrainedModel

from squeeze.allocations.base import Allocation
from squeeze.config import SqueezeConfig, as_config
from squeeze.engine.compiling import CompiledBlock, check_blocks, compiled, decode_block, forget
from squeeze.engine.decoder import decoder_forward
from squeeze.engine.generate import no_continuous_batching, prepare_cache
from squeeze.engine.interface import registered
from squeeze.engine.own_attention import listen
from squeeze.engine.replay import stand_in
from squeeze.engine.self_check import self_check
from squeeze.engine.squeezed_model import SqueezedModel
from squeeze.engine.unwrap import unwrap
from squeeze.evictors import Evictor
from squeeze.models.rope import find_lengthwise, forward_name

#: Held while a model is patched, or put back: threads may want the same one.
_patching = threading.Lock()

#: The `id` of every configuration object by which a squeezed model's modules look up their attention function.
_configs: set[int] = set()


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
        options: `attn`, `compile`, `cuda_graph`, `prefill_chunk`, see SqueezeConfig.
    Raises:
        InputError: the model's architecture is not supported, or `config` does not fit the model.
        UntestedVersion: the installed transformers is not one that the patch was tested with.
        ValueError: the model is squeezed already. From `generate`, and from calls of the model itself: what a squeezed
            cache cannot do (beams, assisted decoding, attention probabilities), and a call
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
    findings = run.findings
    undo.enter_context(registered())
    for own in findings.configs:
        if id(own) in _configs:
            raise ValueError(
                "the model shares its configuration object with another one that is squeezed: give it a copy, "
                "such as copy.deepcopy(config)"
            )
    _configs.update(map(id, findings.configs))
    undo.callback(_configs.difference_update, [id(own) for own in findings.configs])
    stand_in(undo, model, "_prepare_cache_for_generation", partial(prepare_cache, run))
    stand_in(undo, model, "init_continuous_batching", no_continuous_batching)
    decoder = findings.decoder
    stand_in(undo, decoder, "forward", partial(decoder_forward, run, decoder.forward, run.decoder_arguments))
    for rotary, lengthwise in find_lengthwise(model):
        name = forward_name(rotary)
        if vars(rotary).get(name) is not lengthwise:
            stand_in(undo, rotary, name, lengthwise)
        run.ropes.append(lengthwise)
    for layer in findings.layers:
        if not layer.interface:
            undo.callback(listen(layer))
    self_check(run, run.evictor.observed is None)
    run.self_check = partial(self_check, run)
    if config.compile:
        check_blocks(findings)
        step = compiled(decode_block, model.device)
        undo.callback(forget)
        for number, layer in enumerate(findings.layers):
            stand_in(undo, layer.block, "forward", CompiledBlock(step, number, layer))
    return run
