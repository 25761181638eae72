"""Where the rows of a layer's cache lie in its flat buffers. A row is one KV head of one sequence, and has a budget.

Rows lie one after the other, the smallest first. Neighbours of the same length are a group, which is seen as one
tensor `(rows, slots, dim)` without a copy; where rows differ by little, the shorter ones are made longer to be one, as
long as that costs hardly any memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import cached_property
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

#: What a layer's slots may grow by, so that more of its rows are attended to together.
PADDING = Fraction(1, 100)


class Group(NamedTuple):
    """Neighbours in a buffer.

    Args:
        row, rows: the first one, and how many they are.
        slot, slots: the first one's first slot, and how many each of them has.
    """

    row: int
    rows: int
    slot: int
    slots: int

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        """The group's part of a buffer `(all slots, …)`: `(rows, slots, …)`."""
        own = buffer.narrow(0, self.slot, self.rows * self.slots)
        return own.view(self.rows, self.slots, *buffer.shape[1:])

    def part(self, rows: torch.Tensor) -> torch.Tensor:
        """The group's part of a tensor `(all rows, …)`, in the order of the buffer."""
        return rows.narrow(0, self.row, self.rows)


class Layout:
    """Places of all rows of a layer.

    Args:
        budgets: tokens, `(batch, kv_heads)`.

    Attributes:
        order: numbers of the rows, sequence by sequence, in the order in which they lie in the buffer, `(rows,)`.
        first: slots where the rows begin, in that order, `(rows,)`.
        groups: of that order.
        slots: of the whole buffer.
        batch, heads: sequences, and KV heads of each.
        in_order: whether the rows lie sequence by sequence, head by head.
        alike: whether they are one group besides: then a buffer is a tensor `(batch, kv_heads, slots, …)`.
    """

    def __init__(self, budgets: np.ndarray):
        self.budgets = budgets
        self.order = budgets.ravel().argsort(kind="stable")
        sizes = budgets.ravel()[self.order].tolist()
        self.groups: list[Group] = []
        row = slot = 0
        for slots, rows in _merged([(size, len(list(same))) for size, same in groupby(sizes)], sum(sizes)):
            self.groups.append(Group(row, rows, slot, slots))
            row, slot = row + rows, slot + rows * slots
        self.slots = slot
        self.first = np.concatenate([group.slot + np.arange(group.rows) * group.slots for group in self.groups])
        # Numbers, and nothing that a compiled step would have to compute.
        self.batch, self.heads = budgets.shape
        self.in_order = bool((self.order[:-1] < self.order[1:]).all())
        self.alike = len(self.groups) == 1 and self.in_order

    @cached_property
    def starts(self) -> np.ndarray:
        """Slots where the rows begin, `(batch, kv_heads)`."""
        starts = np.empty(self.budgets.size, dtype=int)
        starts[self.order] = self.first
        return starts.reshape(self.budgets.shape)

    @cached_property
    def _lengths(self) -> np.ndarray:
        """Slots of the rows, `(batch, kv_heads)`."""
        lengths = np.empty(self.budgets.size, dtype=int)
        lengths[self.order] = np.concatenate([np.full(group.rows, group.slots) for group in self.groups])
        return lengths.reshape(self.budgets.shape)

    def alone(self, sequence: int) -> Layout:
        """The layout that a sequence would have in a batch of its own."""
        return Layout(self.budgets[sequence : sequence + 1])

    def pieces(self, sequence: int) -> list[tuple[Group, int]]:
        """A sequence's heads: neighbours of one budget that lie one after the other, and their budget.

        `Group.row` and `Group.rows` are heads here.
        """
        pieces: list[tuple[Group, int]] = []
        rows = (part[sequence].tolist() for part in (self.budgets, self.starts, self._lengths))
        for head, (budget, start, slots) in enumerate(zip(*rows, strict=True)):
            if pieces:
                before, same = pieces[-1]
                if (same, before.slots, before.slot + before.rows * slots) == (budget, slots, start):
                    pieces[-1] = before._replace(rows=before.rows + 1), budget
                    continue
            pieces.append((Group(head, 1, start, slots), budget))
        return pieces


def by_layer(budgets: Sequence[Sequence[Any]], kv_heads: Sequence[int]) -> list[np.ndarray]:
    """Budgets of each layer, `(sequences, kv_heads)`.

    Args:
        budgets: of each sequence and layer, tokens, or those of each head; more than a layer has heads are left out.
    """
    return [
        np.array([np.broadcast_to(np.atleast_1d(own[layer])[:heads], heads) for own in budgets], dtype=int)
        for layer, heads in enumerate(kv_heads)
    ]


def by_sequence(budgets: Sequence[np.ndarray], per_head: bool) -> np.ndarray:
    """Budgets of layers, `(sequences, kv_heads)` each, as one array.

    Returns:
        `(sequences, layers)`, or with `per_head` `(sequences, layers, most kv_heads)`, 0 where a layer has fewer.
    """
    if not per_head:
        return np.stack([own[:, 0] for own in budgets], axis=1)
    most = max(own.shape[1] for own in budgets)
    return np.stack([np.pad(own, ((0, 0), (0, most - own.shape[1]))) for own in budgets], axis=1)


def _merged(groups: list[tuple[int, int]], total: int) -> list[tuple[int, int]]:
    """Groups `(slots, rows)`, ascending, of which neighbours are made one where that adds least to a total.

    Together they add no more than `PADDING` of it.
    """
    left = int(PADDING * total)
    while len(groups) > 1:
        costs = [(above - slots) * rows for (slots, rows), (above, _) in pairwise(groups)]
        cheapest = min(range(len(costs)), key=costs.__getitem__)
        if costs[cheapest] > left:
            break
        left -= costs[cheapest]
        (_, rows), (above, more) = groups[cheapest : cheapest + 2]
        groups[cheapest : cheapest + 2] = [(above, rows + more)]
    return groups
