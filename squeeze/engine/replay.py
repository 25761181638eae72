"""Decoder layers that need not run: where a pass gives them what an earlier one gave, they give the same again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from squeeze.engine.cache import SqueezeCache
from squeeze.engine.findings import AttentionLayer
from squeeze.engine.interface import current_cache

#: Of each decoder layer, what its forward pass gave at every step: a hidden state `(1, 1, hidden)`, alone or as the
#: first of a tuple.
Outputs = dict[nn.Module, list[Any]]


@contextmanager
def recorded(layers: Sequence[AttentionLayer], outputs: Outputs, cache: SqueezeCache) -> Iterator[None]:
    """A block whose decode steps on a cache of one sequence are recorded in `outputs`, which are whole at its end.

    Left out are decoder layers that hold several attention layers, or one that others use as well, and those that give
    something else than a hidden state (Gemma 3n).

    Args:
        layers: all of a model's attention layers.
    """
    counts, before = Counter(layer.block for layer in layers), cache.steps
    blocks = [layer.block for layer in layers if counts[layer.block] == len(layer.users) == 1]

    def record(block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if current_cache() is cache:  # and no other pass, of a hook or of another thread
            outputs.setdefault(block, []).append(output)
        return output

    with ExitStack() as undo:
        for block in blocks:
            stand_in(undo, block, "forward", partial(record, block, block.forward))
        yield
    for block, steps in list(outputs.items()):
        if len(steps) != cache.steps - before or not all(map(_is_hidden, steps)):
            del outputs[block]


@contextmanager
def replayed(outputs: Outputs, cache: SqueezeCache) -> Iterator[None]:
    """A block in whose decode steps these decoder layers do not run, and give what they gave, to each sequence."""
    sequences = len(cache.prompt_lengths)

    def replay(steps: Iterator[Any], forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if current_cache() is not cache:
            return forward(*args, **kwargs)
        output = next(steps)
        if isinstance(output, tuple):
            return tuple(_for_each(value, sequences) for value in output)
        return _for_each(output, sequences)

    with ExitStack() as undo:
        for block, steps in outputs.items():
            stand_in(undo, block, "forward", partial(replay, iter(steps), block.forward))
        yield


def stand_in(undo: ExitStack, owner: object, name: str, value: object) -> None:
    """Set an instance attribute; `undo` puts back what was there, or that nothing was."""
    own = vars(owner)
    if name in own:
        undo.callback(setattr, owner, name, own[name])
    else:
        undo.callback(delattr, owner, name)
    setattr(owner, name, value)


def _is_hidden(output: Any) -> bool:
    hidden = output[0] if isinstance(output, tuple) else output
    return isinstance(hidden, torch.Tensor) and hidden.shape[:-1] == (1, 1)


def _for_each(value: Any, sequences: int) -> Any:
    """A tensor of one sequence for several; a copy, which the next layer may write to."""
    if not isinstance(value, torch.Tensor) or value.ndim == 0 or value.shape[0] != 1:
        return value
    return value.expand(sequences, *value.shape[1:]).clone(memory_format=torch.contiguous_format)
