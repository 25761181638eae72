"""Decoder layers that need not run: where a pass gives them what an earlier one gave, they give the same again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from squeeze.engine.findings import AttentionLayer

#: Of each decoder layer, what came out of it at every step, `(1, 1, hidden)`, alone or first in a tuple.
Outputs = dict[nn.Module, list[Any]]


@contextmanager
def recorded(layers: Sequence[AttentionLayer]) -> Iterator[Outputs]:
    """A block whose decode steps of one sequence are recorded; what it gives is whole at its end.

    Left out are decoder layers that hold several attention layers, or one that others use as well, and those that do
    not give a hidden state `(1, 1, hidden)` (Gemma 3n).

    Args:
        layers: all of a model's attention layers.
    """
    counts = Counter(layer.block for layer in layers)
    outputs: Outputs = {layer.block: [] for layer in layers if counts[layer.block] == len(layer.users) == 1}

    def record(block: nn.Module, _: Any, output: Any) -> None:
        outputs[block].append(output)

    with ExitStack() as hooks:
        for block in outputs:
            hooks.callback(block.register_forward_hook(record).remove)
        yield outputs
    for block, steps in list(outputs.items()):
        if any(_hidden(output).shape[:-1] != (1, 1) for output in steps):
            del outputs[block]


@contextmanager
def replayed(outputs: Outputs, sequences: int) -> Iterator[None]:
    """A block in whose decode steps these decoder layers do not run, and give what they gave, to each sequence."""
    with ExitStack() as undo:
        for block, steps in outputs.items():
            stand_in(undo, block, "forward", _Replay(steps, sequences))
        yield


def stand_in(undo: ExitStack, owner: object, name: str, value: object) -> None:
    """Set an instance attribute; `undo` puts back what was there, or that nothing was."""
    own = vars(owner)
    if name in own:
        undo.callback(setattr, owner, name, own[name])
    else:
        undo.callback(delattr, owner, name)
    setattr(owner, name, value)


def _hidden(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


class _Replay:
    """Stands in for a decoder layer's forward pass."""

    def __init__(self, steps: Sequence[Any], sequences: int):
        self.steps, self.sequences = iter(steps), sequences

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = next(self.steps)
        hidden = _hidden(output).expand(self.sequences, -1, -1).contiguous()
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
