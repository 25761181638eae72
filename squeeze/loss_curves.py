"""What the output loses when one layer's cache is cut, measured on a prompt.

The prompt's last tokens stand for a question about what comes before. The prompt before them is prefilled once; then
every layer in turn keeps more or less than the others, the last tokens are fed one by one, as if they were generated,
and their next-token distributions are compared with the full cache's. All of it is the engine's own decoding, with
evictions at every step, so that a curve measures what a run would do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

import torch

from squeeze.config import InputError

if TYPE_CHECKING:
    from squeeze.squeezed_model import Prefill, SqueezedModel

#: Tokens at a prompt's end that are held out.
TAIL = 48

#: Sizes of the layer that is cut, as multiples of what the others keep.
MULTIPLES = (Fraction(1, 4), Fraction(1, 2), Fraction(1), Fraction(2), Fraction(4))

#: Layers that are cut in one batch, each to all sizes: a layer's buffers are as long as its largest size.
LAYERS_AT_ONCE = 5


def cost(length: int, shares: int, layers: int) -> int:
    """Tokens that `measure` runs on a prompt of `length` tokens."""
    rows = shares * (1 + layers * (len(MULTIPLES) - 1))
    return length + (length - TAIL) + TAIL * rows


@torch.inference_mode()
def measure(
    run: SqueezedModel,
    prompt: torch.Tensor,
    shares: Sequence[Fraction],
    advance: Callable[[int], object] = lambda tokens: None,
) -> list[list[list[float]]]:
    """Loss curves of all layers on one prompt.

    Args:
        run: what `squeezed` gave; its algorithm evicts.
        prompt: token ids, (tokens,).
        shares: what every layer keeps while one of them keeps more or less, as fractions of the prompt.
        advance: is told how many tokens were run, each time.
    Returns:
        Mean KL(full || cut) over the held-out tokens in nats, for each share, layer and multiple.
    Raises:
        InputError: the prompt is too short to hold out its tail.
    """
    if len(prompt) < 4 * TAIL:
        raise InputError(
            f"a prompt of {len(prompt)} tokens is too short to measure loss curves on: it must have {4 * TAIL}, "
            f"{TAIL} of them held out; take longer ones, or an allocation that need not measure on this prompt"
        )
    layers, length = run.model.config.num_hidden_layers, len(prompt) - TAIL
    most = min(len(prompt), run.window or len(prompt))
    held = run.prefill(prompt[None, :length])
    prompt = prompt.to(held.inputs.device)
    full = run.model(prompt[None], use_cache=False, logits_to_keep=TAIL).logits[0].float().log_softmax(dim=-1)
    advance(length + len(prompt))

    def losses(budgets: list[list[int]]) -> list[float]:
        found = torch.zeros(len(budgets))
        for expected, logprobs in zip(full, _logprobs(run, held, budgets, prompt[length:]), strict=True):
            found += (expected.exp() * (expected - logprobs)).sum(dim=-1).cpu()
        advance(TAIL * len(budgets))
        return (found / TAIL).tolist()

    def tokens(size: Fraction) -> int:
        return min(max(int(size * length), run.evictor.minimum_budget), most)

    curves = []
    for share in shares:
        uniform = [tokens(share)] * layers
        [unchanged] = losses([uniform])
        curves.append([[unchanged] * len(MULTIPLES) for _ in range(layers)])
        for first in range(0, layers, LAYERS_AT_ONCE):
            cuts = [
                (layer, index)
                for layer in range(first, min(first + LAYERS_AT_ONCE, layers))
                for index, multiple in enumerate(MULTIPLES)
                if multiple != 1
            ]
            budgets = [
                [*uniform[:layer], tokens(MULTIPLES[index] * share), *uniform[layer + 1 :]] for layer, index in cuts
            ]
            for (layer, index), loss in zip(cuts, losses(budgets), strict=True):
                curves[-1][layer][index] = loss
    return curves


def _logprobs(
    run: SqueezedModel, held: Prefill, budgets: Sequence[Sequence[int]], tail: torch.Tensor
) -> Iterator[torch.Tensor]:
    """Log-probabilities after each token of the tail, `(batch, vocabulary)`, with each row's budgets."""
    cache = run.fork(held, budgets, len(tail))
    for position, token in enumerate(tail, start=held.inputs.shape[1]):
        output = run.model(
            token.expand(len(budgets), 1),
            position_ids=torch.full((len(budgets), 1), position, device=token.device),
            past_key_values=cache,
            use_cache=True,
        )
        yield output.logits[:, -1].float().log_softmax(dim=-1)
