"""What a layer's cache is told of a forward pass: the prompts that it reads, or the decode step that it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from squeeze.engine.layout import Group


@dataclass(frozen=True)
class Reading:
    """The prompts that are being read, or the chunk of them, as far as a layer must know.

    Attributes:
        seen, lengths: tokens of each sequence before the chunk, and in it (0 of one that has not begun).
        budgets: tokens, `(batch, kv_heads)`, where they are known before the pass: the layer is cut as soon as it is
            filled. None: when all layers are.
        most: see `SqueezeLayer.compress`.
        fused: whether attention may use PyTorch's fused kernel.
        looking: of the prompts' last queries, how many have the spread of their attention measured.
    """

    seen: Sequence[int]
    lengths: Sequence[int]
    budgets: np.ndarray | None
    most: Sequence[int] | None
    fused: bool
    looking: int = 0


class Seen(NamedTuple):
    """What a decode step attends to of a group of rows.

    Args:
        group: which rows.
        longest: of each row's slots, the first so many; None: all of them.
        ragged: whether some of these are empty in some row.
    """

    group: Group
    longest: int | None
    ragged: bool

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        """That of a buffer `(all slots, …)`: `(rows, longest, …)`."""
        slots = self.group.view(buffer)
        return slots if self.longest is None else slots.narrow(1, 0, self.longest)


class Step(NamedTuple):
    """What a decode step tells a layer: see `SqueezeLayer`.

    Args:
        position, budget, lengths, rows: the attributes of that name.
        sinks: slots of its sinks, `(sinks of all rows,)`, and what stands there from now on; None: they stay.
    """

    position: torch.Tensor
    budget: torch.Tensor
    lengths: torch.Tensor
    rows: torch.Tensor
    sinks: tuple[torch.Tensor, torch.Tensor] | None
