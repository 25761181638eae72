"""Decoder layers that need not run: where they are given what they were given before, they give the same again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from squeeze.engine.cache import SqueezeCache
from squeeze.engine.interface import current_cache

#: Of each decoder layer, what its forward pass gave at every step: a hidden state `(1, 1, hidden)`, alone or as the
#: first of a tuple.
Outputs = dict[nn.Module, list[Any]]


@contextmanager
def recorded(outputs: Outputs, cache: SqueezeCache) -> Iterator[None]:
    """A block whose decode steps on a cache of one sequence are recorded in `outputs`, which are whole at its end.

    Left out are decoder layers that hold several attention layers, or one that others use as well, and those that give
    something else than a hidden state (Gemma 3n).
    """
    layers = [layer.facts for layer in cache.squeezed]
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
def replayed(outputs: Outputs, running: Sequence[int], cache: SqueezeCache) -> Iterator[None]:
    """A block in whose decode steps some decoder layers run for the first sequences only: the others get `outputs`.

    Args:
        outputs: of a sequence on which all of the others agree up to where they run.
        running: of each attention layer, the sequences that it runs for, from the first on; what `fork` was given.
    """
    sequences = len(cache.prompt_lengths)

    def replay(steps: Iterator[Any], count: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if current_cache() is not cache:
            return forward(*args, **kwargs)
        output = _for_each(next(steps), sequences - count)
        if count == 0:
            return output
        args, kwargs = _first(args, count, sequences), _first(kwargs, count, sequences)
        return _joined(forward(*args, **kwargs), output)

    with ExitStack() as undo:
        for layer, count in zip(cache.squeezed, running, strict=True):
            block = layer.facts.block
            if count < sequences:
                stand_in(undo, block, "forward", partial(replay, iter(outputs[block]), count, block.forward))
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
    """What a layer gave to one sequence, for several; copies, which the next layer may write to."""
    if isinstance(value, tuple):
        return tuple(_for_each(part, sequences) for part in value)
    if not isinstance(value, torch.Tensor) or value.ndim == 0 or value.shape[0] != 1:
        return value
    return value.expand(sequences, *value.shape[1:]).clone(memory_format=torch.contiguous_format)


def _first(value: Any, count: int, sequences: int) -> Any:
    """What a layer is given for so many sequences, for the first `count` of them."""
    if isinstance(value, tuple):
        return tuple(_first(part, count, sequences) for part in value)
    if isinstance(value, dict):
        return {name: _first(part, count, sequences) for name, part in value.items()}
    batched = isinstance(value, torch.Tensor) and value.ndim > 0 and value.shape[0] == sequences
    return value[:count] if batched else value


def _joined(first: Any, others: Any) -> Any:
    """What a layer gives to some sequences, and then to others.

    Attention's probabilities, which are as wide as a cache and which no layer looks at, stay those of the first.
    """
    if isinstance(first, tuple):
        return tuple(_joined(*parts) for parts in zip(first, others, strict=True))
    batched = isinstance(first, torch.Tensor) and first.ndim > 0 and first.shape[1:] == others.shape[1:]
    return torch.cat([first, others]) if batched else first
