"""Loss curves: how far the output moves when one layer's cache is cut, measured on a prompt.

The prompt's last tokens stand for a question about what comes before. The prompt before them is prefilled once; then
every layer in turn keeps more or less than the others, the last tokens are fed one by one, as if they were generated,
and their next-token distributions are compared with the full cache's. All of it is the engine's own decoding, with
evictions at every step, so that a curve measures what a run would do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple, Protocol

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from squeeze.allocations.base import reach
from squeeze.devices import unless_out_of_memory
from squeeze.engine.cache import SqueezeCache
from squeeze.engine.findings import AttentionLayer
from squeeze.engine.prefill import KeptPrefill
from squeeze.engine.replay import Outputs, recorded, replayed
from squeeze.errors import InputError
from squeeze.evictors import Evictor
from squeeze.models.rope import LengthwiseRope, unscaled_length

#: Tokens at a prompt's end that are held out.
TAIL = 48

#: Sizes of the layer that is cut, as multiples of what the others keep.
MULTIPLES = (Fraction(1, 4), Fraction(1, 2), Fraction(1), Fraction(2), Fraction(4))

#: Layers, or heads, that are cut in one batch, each to all sizes, by the kind of device; fewer where memory is short.
LAYERS_AT_ONCE = {"cpu": 16, "cuda": 64}


class Cut(NamedTuple):
    """Budgets that differ from uniform ones in one layer.

    Args:
        layer: its number; before it all is as with uniform budgets.
        budgets: tokens of each layer, or of its heads.
    """

    layer: int
    budgets: list[Any]


class Forks(Protocol):
    """A squeezed model, as far as it prefills a prompt once and goes on with many budgets: see `SqueezedModel`."""

    model: PreTrainedModel
    evictor: Evictor
    ropes: list[LengthwiseRope]

    @property
    def layers(self) -> Sequence[AttentionLayer]: ...

    def prefill(self, tokens: torch.Tensor) -> KeptPrefill: ...

    def fork(
        self,
        prefill: KeptPrefill,
        budgets: Sequence[Sequence[Any]],
        max_new_tokens: int,
        running: Sequence[int] | None = None,
    ) -> SqueezeCache: ...

    def step(self, tokens: torch.Tensor, position: int, cache: SqueezeCache) -> CausalLMOutputWithPast: ...


def cost(length: int, shares: int, layers: int) -> int:
    """Tokens that `measure` runs on a prompt of `length` tokens, of a model with so many layers, or KV heads."""
    rows = shares * (1 + layers * (len(MULTIPLES) - 1))
    return length + (length - TAIL) + TAIL * rows


@torch.inference_mode()
def measure(
    run: Forks,
    prompt: torch.Tensor,
    shares: Sequence[Fraction],
    advance: Callable[[int], object] = lambda tokens: None,
    per_head: bool = False,
) -> list[list[list[float]]]:
    """Loss curves of all layers, or of all their KV heads, on one prompt.

    Args:
        run: what `squeezed` gave; its algorithm evicts.
        prompt: token ids, (tokens,).
        shares: what every layer keeps while one of them keeps more or less, as fractions of what it reaches of the
            prompt (`squeeze.allocations.base.reach`).
        advance: is told how many tokens were run, each time.
        per_head: cut the heads of a layer one by one, and not together.
    Returns:
        Mean KL(full || cut) over the held-out tokens in nats, `(shares, layers, multiples)`; with `per_head` those of
        each layer's heads in the place of layers.
    Raises:
        InputError: the prompt is too short to hold out its tail, or its length changes the model's RoPE.
    """
    if len(prompt) < 4 * TAIL:
        raise InputError(
            f"a prompt of {len(prompt)} tokens is too short to measure loss curves on: it must have {4 * TAIL}, "
            f"{TAIL} of them held out; take longer ones, or an allocation that need not measure on this prompt"
        )
    if run.ropes and len(prompt) > unscaled_length(run.model.config):
        raise InputError(
            f"a prompt of {len(prompt)} tokens is too long to measure loss curves on: beyond "
            f"{unscaled_length(run.model.config)} tokens the model's RoPE depends on the length, and what a layer's "
            "cache costs cannot be told from that"
        )
    layers, heads, length = len(run.layers), [layer.kv_heads for layer in run.layers], len(prompt) - TAIL
    reached, most = reach(run.layers, length), [layer.reach(len(prompt)) for layer in run.layers]
    prefill = run.prefill(prompt[None, :length])
    prompt = prompt.to(prefill.inputs.device)
    full = run.model(prompt[None], use_cache=False, logits_to_keep=TAIL).logits[0].float().log_softmax(dim=-1)
    advance(length + len(prompt))

    def losses(cuts: list[Cut], outputs: Outputs, record: bool = False) -> list[float]:
        kl = in_parts(cuts, lambda part: divergences(run, prefill, part, prompt[length:], full, outputs, record))
        advance(TAIL * len(cuts))
        return kl

    def tokens(layer: int, size: Fraction) -> int:
        return min(max(int(size * reached[layer]), run.evictor.minimum_budget), most[layer])

    curves, at_once = [], LAYERS_AT_ONCE[prompt.device.type]
    for share in shares:
        uniform = [tokens(layer, share) for layer in range(layers)]
        outputs: Outputs = {}
        [unchanged] = losses([Cut(layers, uniform)], outputs, record=True)
        # What is cut by itself: a layer, or one of its heads.
        parts = [(layer, head) for layer in range(layers) for head in (range(heads[layer]) if per_head else [None])]
        curves.append([[unchanged] * len(MULTIPLES) for _ in parts])
        for first in range(0, len(parts), at_once):
            places = [
                (part, index)
                for part in range(first, min(first + at_once, len(parts)))
                for index, multiple in enumerate(MULTIPLES)
                if multiple != 1
            ]
            cuts = []
            for part, index in places:
                layer, head = parts[part]
                budgets: list[Any] = list(uniform)
                size = tokens(layer, MULTIPLES[index] * share)
                if head is not None:
                    budgets[layer] = [size if other == head else uniform[layer] for other in range(heads[layer])]
                else:
                    budgets[layer] = size
                cuts.append(Cut(layer, budgets))
            for (part, index), loss in zip(places, losses(cuts, outputs), strict=True):
                curves[-1][part][index] = loss
    return curves


@torch.inference_mode()
def divergences(
    run: Forks,
    prefill: KeptPrefill,
    cuts: Sequence[Cut],
    text: torch.Tensor,
    full: torch.Tensor,
    outputs: Outputs,
    record: bool = False,
) -> list[float]:
    """Distance of caches cut to different budgets from the full one, over a text that follows on a prompt.

    A layer runs for those caches only that are cut in it or before it.

    Args:
        run: what `squeezed` gave.
        prefill: of the prompt, from `run.prefill`.
        cuts: of each cache, in the order of their layers.
        text: token ids, `(tokens,)`.
        full: the full cache's log-probabilities after each of them, `(tokens, vocabulary)`.
        outputs: of the layers, where no layer is cut.
        record: fill `outputs`, by a single cache.
    Returns:
        Mean KL(full || cut) over the text in nats, of each cache.
    Raises:
        torch.OutOfMemoryError: the caches do not fit into memory.
    """
    running = [
        sum(cut.layer <= number for cut in cuts) if layer.block in outputs else len(cuts)
        for number, layer in enumerate(run.layers)
    ]
    cache = run.fork(prefill, [cut.budgets for cut in cuts], len(text), running)
    kl = torch.zeros(len(cuts), device=full.device)
    with recorded(outputs, cache) if record else replayed(outputs, running, cache):
        for position, (token, expected) in enumerate(zip(text, full, strict=True), start=prefill.inputs.shape[1]):
            output = run.step(token.expand(len(cuts), 1), position, cache)
            logprobs = output.logits[:, -1].float().log_softmax(dim=-1)
            kl += (expected.exp() * (expected - logprobs)).sum(dim=-1)
    return (kl / len(text)).tolist()


def in_parts(cuts: list[Cut], run: Callable[[list[Cut]], list[float]]) -> list[float]:
    """What `run` gives for each cut: as one batch, or as several where memory is short.

    Raises:
        torch.OutOfMemoryError: a single cache does not fit into memory.
    """
    if len(cuts) == 1:
        return run(cuts)
    found = unless_out_of_memory(lambda: run(cuts))
    if found is not None:
        return found
    half = len(cuts) // 2
    return in_parts(cuts[:half], run) + in_parts(cuts[half:], run)
