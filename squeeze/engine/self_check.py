"""Before a model is squeezed for the first time: does a cache with room for every token give what it gives without?

This, and no list of versions or architectures, decides whether a model can be squeezed: the probe looks at how a model
computes attention, and this at what comes out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from transformers import DynamicCache, PreTrainedModel

from squeeze.compatibility import cache_argument
from squeeze.devices import input_device
from squeeze.engine.autocast import without_autocast
from squeeze.engine.squeezed_model import SqueezedModel
from squeeze.errors import InputError
from squeeze.evictors.h2o import H2O
from squeeze.evictors.sliding_window import SlidingWindow

#: Tokens of the prompt, and those that are fed one by one after it.
PROMPT, STEPS = 12, 3

#: Texts that are tried until one passes, where numbers are coarse: where two experts are about as good, rounding makes
#: a router take another one, and what comes out is far off. A fault would be there in every text.
TEXTS = 4

#: How far logits may be apart, as a fraction of the largest one.
TOLERANCE = {torch.float32: 2e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}

#: The same of a quantized model, some of which round what goes into a layer to 8 bits (bitsandbytes' int8).
QUANTIZED = 2e-1

#: Models that have passed, and with which findings and methods.
_passed: WeakKeyDictionary[PreTrainedModel, set[tuple[int, bool]]] = WeakKeyDictionary()


@torch.no_grad()
def self_check(run: SqueezedModel, scored: bool) -> None:
    """Compare the model with itself on a squeezed cache, on a few tokens; once for a model and a kind of method.

    A model that is being trained is not looked at: dropout would differ.

    Args:
        scored: whether the method's evictor needs scores.
    Raises:
        InputError: they differ, by more than rounding; the message says from which layer on.
    """
    model, key = run.model, (id(run.findings), scored)
    # No more than a layer's own window: a method may keep what that has left behind.
    count = min(layer.reach(PROMPT + STEPS) for layer in run.layers)
    if model.training or count < 2 or key in _passed.get(model, set()):
        return
    vocabulary = model.config.get_text_config().vocab_size
    device = input_device(model)
    tolerance = QUANTIZED if getattr(model, "is_quantized", False) else TOLERANCE.get(model.dtype, 5e-2)
    with without_autocast(device), _built_in_evictor(run, scored):
        for text in range(1 if tolerance == TOLERANCE[torch.float32] else TEXTS):
            tokens = (torch.arange(count, device=device) * (7919 + 104 * text) % (vocabulary - 1) + 1)[None]
            [own], [squeezed] = _logits(run, tokens, by_layer=False)
            error = _apart(squeezed, own)
            if error <= tolerance:
                _passed.setdefault(model, set()).add(key)
                return
        errors = [_apart(mine, theirs) for theirs, mine in zip(*_logits(run, tokens, by_layer=True), strict=True)]
    first = next((number for number, each in enumerate(errors) if each > error / 4), len(errors) - 1)
    raise InputError(
        f"a {model.config.model_type} model cannot be squeezed here: with room for every token its logits differ from "
        f"its own by {error:.2g} of the largest, and its hidden states from decoder layer {max(first - 1, 0)} on"
    )


@contextmanager
def _built_in_evictor(run: SqueezedModel, scored: bool) -> Iterator[None]:
    """A block in which the model is looked at and no evictor of the user's own, which may have faults."""
    own, run.evictor = run.evictor, H2O() if scored else SlidingWindow()
    try:
        yield
    finally:
        run.evictor = own


def _logits(run: SqueezedModel, tokens: torch.Tensor, by_layer: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Logits after each of the last tokens, on the model's own cache and on a squeezed one, `(STEPS, vocabulary)`.

    With `by_layer`, the hidden states of every layer, `(STEPS, hidden)`, in their place.
    """
    count, asked = tokens.shape[1], {"output_hidden_states": True} if by_layer else {}
    first = max(count - STEPS, 1)  # a window may be as short as that
    prompt = tokens[:, :first]
    # Its own steps, and not one pass: in a state-space layer these are not always the same (Zamba 2).
    hybrid = run.findings.others or any(layer.hybrid for layer in run.layers)
    own = DynamicCache(config=run.findings.decoder.config) if hybrid else DynamicCache()
    run.model(prompt, **{cache_argument(): own}, use_cache=True)
    squeezed = run.fork(run.prefill(prompt), [[count] * len(run.layers)], count - first)
    found = []
    for cache in (own, squeezed):
        steps = []
        for position in range(first, count):
            output = run.step(tokens[:, position : position + 1], position, cache, **asked)
            steps.append([*output.hidden_states] if by_layer else [output.logits])
        found.append([torch.cat(parts, dim=1)[0] for parts in zip(*steps, strict=True)])
    return found[0], found[1]


def _apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference of two tensors, as a fraction of the largest number in the second."""
    wanted = wanted.float()
    difference = (found.float().to(wanted.device) - wanted).abs().max() / wanted.abs().max().clamp(min=1e-9)
    return float(difference) if difference.isfinite() else float("inf")
