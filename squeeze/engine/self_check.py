"""Before a model is squeezed for the first time: does a cache with room for every token give what it gives without?

This, and no list of versions or architectures, decides whether a model can be squeezed: the probe looks at how a model
computes attention, and this at what comes out.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

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
    vocabulary = model.config.get_text_config().vocab_size
    device = model.get_input_embeddings().weight.device
    tokens = (torch.arange(PROMPT + STEPS, device=device) * 7919 % (vocabulary - 1) + 1)[None]
    [own], [squeezed] = _logits(run, tokens, by_layer=False)
    error = _apart(squeezed, own)
    if error > TOLERANCE.get(model.dtype, 5e-2):
        errors = [_apart(mine, theirs) for theirs, mine in zip(*_logits(run, tokens, by_layer=True), strict=True)]
        first = next((number for number, each in enumerate(errors) if each > error / 4), len(errors) - 1)
        raise InputError(
            f"a {model.config.model_type} model cannot be squeezed here: with room for every token its logits differ "
            f"from its own by {error:.2g} of the largest, and its hidden states from decoder layer "
            f"{max(first - 1, 0)} on"
        )
    _passed.setdefault(model, set()).add(key)


def _logits(run: SqueezedModel, tokens: torch.Tensor, by_layer: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Logits after each of the last tokens, of the model itself and on a squeezed cache, `(STEPS, vocabulary)`.

    With `by_layer`, the hidden states of every layer, `(STEPS, hidden)`, in their place.
    """
    model, asked = run.model, {"output_hidden_states": True} if by_layer else {}
    whole = model(tokens, use_cache=False, **asked)
    own = [*whole.hidden_states] if by_layer else [whole.logits]
    cache = run.fork(run.prefill(tokens[:, :PROMPT]), [[PROMPT + STEPS] * len(run.layers)], STEPS)
    steps = []
    for position in range(PROMPT, PROMPT + STEPS):
        step = run.step(tokens[:, position : position + 1], position, cache, **asked)
        steps.append([*step.hidden_states] if by_layer else [step.logits])
    return [states[0, PROMPT:] for states in own], [
        torch.cat([part.to(parts[0].device) for part in parts], dim=1)[0] for parts in zip(*steps, strict=True)
    ]


def _apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference of two tensors, as a fraction of the largest number in the second."""
    wanted = wanted.float()
    difference = (found.float().to(wanted.device) - wanted).abs().max() / wanted.abs().max().clamp(min=1e-9)
    return float(difference) if difference.isfinite() else float("inf")
