"""Before a model is squeezed for the first time: does a cache with room for every token give what it gives without?

This, and no list of versions or architectures, decides whether a model can be squeezed: the probe looks at how a model
computes attention, and this at what comes out.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from transformers import DynamicCache, PreTrainedModel

from squeeze.compatibility import cache_argument
from squeeze.engine.squeezed_model import SqueezedModel
from squeeze.errors import InputError

#: Tokens of the prompt, and those that are fed one by one after it.
PROMPT, STEPS = 12, 3

#: How far logits may be apart, as a fraction of the largest one; what rounding does, and routers of experts after it.
TOLERANCE = {torch.float32: 2e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}

#: Models that have passed, and with which findings and methods.
_passed: WeakKeyDictionary[PreTrainedModel, set[tuple[int, bool]]] = WeakKeyDictionary()


@torch.no_grad()
def self_check(run: SqueezedModel) -> None:
    """Compare the model with itself on a squeezed cache, on a few tokens; once for a model and a kind of method.

    Raises:
        InputError: they differ, by more than rounding; the message says from which layer on.
    """
    model, key = run.model, (id(run.findings), run.evictor.needs_scores)
    if model.training or key in _passed.get(model, set()):
        return
    device, vocabulary = model.get_input_embeddings().weight.device, model.config.get_text_config().vocab_size
    length = min(
        layer.reach(PROMPT + STEPS) for layer in run.layers
    )  # a method may keep what a window has left behind
    tokens = (torch.arange(length, device=device) * 7919 % (vocabulary - 1) + 1)[None]
    # Its own cache, since a step of a state-space layer is not always what a pass over all tokens gives (Zamba 2).
    own_cache = DynamicCache(config=run.findings.decoder.config)
    model(tokens[:, : length - STEPS], **{cache_argument(): own_cache}, use_cache=True)
    cache = run.fork(run.prefill(tokens[:, : length - STEPS]), [[length] * len(run.layers)], STEPS)
    for position in range(length - STEPS, length):
        ids, positions = tokens[:, position : position + 1], torch.tensor([[position]], device=device)
        places = {"position_ids": positions} if "position_ids" in run.decoder_arguments else {}
        own, step = (
            model(ids, **{cache_argument(): each}, use_cache=True, output_hidden_states=True, **places)
            for each in (own_cache, cache)
        )
        error = _apart(step.logits, own.logits)
        if error > TOLERANCE.get(model.dtype, 5e-2):
            layers = zip(step.hidden_states, own.hidden_states, strict=True)
            errors = [_apart(mine, theirs) for mine, theirs in layers]
            first = next((number for number, each in enumerate(errors) if each > error / 4), len(errors) - 1)
            raise InputError(
                f"a {model.config.model_type} model cannot be squeezed here: with room for every token its logits "
                f"differ from its own by {error:.2g} of the largest after {position + 1} tokens, and its hidden "
                f"states from decoder layer {max(first - 1, 0)} on"
            )
    _passed.setdefault(model, set()).add(key)


def _apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference of two tensors, as a fraction of the largest number in the second."""
    wanted = wanted.float()
    difference = (found.float().to(wanted.device) - wanted).abs().max() / wanted.abs().max().clamp(min=1e-9)
    return float(difference) if difference.isfinite() else float("inf")
