"""Slots, lengths and sinks of a decode step, worked out for all layers that are alike at once.

A decode step is many small operations, and calling them is what it costs at batch 1: slots and sinks, worked out
layer by layer, would be most of them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from squeeze.engine.asked import slots_of
from squeeze.engine.layer import SqueezeLayer
from squeeze.engine.layout import Layout
from squeeze.engine.passes import Seen, Step

#: What changes of a `Schedule` from step to step.
STATE = ("position", "evicted", "sinks")


class Held(NamedTuple):
    """How far the rows of all layers are filled in a step.

    Args:
        evicting: whether some row holds less than its sequence has seen.
        filling: whether some row has room for more.
        seen: what each layer attends to.
    """

    evicting: bool
    filling: bool
    seen: list[list[Seen]]


class Rows:
    """How far the rows of all layers are filled, worked out without a device.

    Args:
        layouts: of each layer.
    """

    def __init__(self, layouts: Sequence[Layout]):
        self.layouts = layouts
        self.sequences = np.concatenate([layout.order // layout.heads for layout in layouts])
        self.budgets = np.concatenate([layout.budgets.ravel()[layout.order] for layout in layouts])
        groups = [group for layout in layouts for group in layout.groups]
        self.slots = np.array([group.slots for group in groups])
        counts = np.array([group.rows for group in groups])
        self.bounds = counts.cumsum() - counts

    def held(self, seen: np.ndarray, whole: bool, alike: bool = False) -> Held:
        """How far the rows are filled.

        Args:
            seen: tokens of each sequence.
            whole: whether empty slots are attended to.
            alike: whether all rows count as ragged as long as one has room, so that steps are of few kinds.
        """
        seen = seen[self.sequences]
        kept = np.minimum(seen, self.budgets)
        longest = self.slots if whole else np.maximum.reduceat(kept, self.bounds)
        filling = bool((kept < self.budgets).any())
        ragged = (np.minimum.reduceat(kept, self.bounds) < longest) | (alike and filling)
        all_slots = longest == self.slots
        told = zip(longest.tolist(), all_slots.tolist(), ragged.tolist(), strict=True)
        groups = [
            [
                Seen(group, None if every else count, some_empty)
                for group, (count, every, some_empty) in zip(layout.groups, told, strict=False)
            ]
            for layout in self.layouts
        ]
        return Held(bool((kept < seen).any()), filling, groups)


class Schedule:
    """Slots, lengths and sinks of layers on one device, step after step.

    StreamingLLM measures distance inside the cache: as tokens between the sinks and the recent window disappear,
    sinks move closer, by as many positions as tokens were evicted. Their keys are turned in the buffers, always from
    the angles they came with and never from the last step's.

    Args:
        layers: just cut to their budgets; of one shape, and with keys that turn alike.
        lengths: tokens that each sequence has seen.
    """

    def __init__(self, layers: Sequence[SqueezeLayer], lengths: Sequence[int]):
        device = layers[0].keys.device
        layouts = [layer.layout for layer in layers]
        heads = layouts[0].heads
        self.layers, self.evictor = layers, layers[0].evictor
        rotation = layers[0].facts.rotation
        self.rotation = None if rotation is None else replace(rotation, inv_freq=rotation.inv_freq.to(device))
        # All of these by layer and row, in the order of each layer's buffers.
        orders = [layout.order for layout in layouts]
        position = np.stack([np.array(lengths)[order // heads] for order in orders])
        budgets = np.stack([layout.budgets.ravel()[order] for layout, order in zip(layouts, orders, strict=True)])
        self.position = torch.from_numpy(position).to(device)[..., None]
        self.budgets = torch.from_numpy(budgets).to(device)[..., None]
        self.first_rows = torch.from_numpy(np.stack([layout.first for layout in layouts])).to(device)
        self.evicted = torch.zeros_like(self.budgets)
        self.sinks_come_late = min(lengths) < self.evictor.sinks
        # Of a row that is shorter than the sinks, and never full, the last slot several times.
        sinks = torch.minimum(torch.arange(self.evictor.sinks, device=device), self.budgets - 1)
        self.sink_slots = (self.first_rows[..., None] + sinks).flatten(1)
        self.sinks = self._sinks()

    def of(self, layers: Sequence[SqueezeLayer]) -> Schedule:
        """The same for copies of the layers."""
        other = copy.copy(self)
        other.layers = layers
        other.own()
        return other

    def own(self) -> list[torch.Tensor]:
        """Go on with copies of what changes from step to step, and return them."""
        state = [getattr(self, name).clone() for name in STATE]
        self.restore(state)
        return state

    def restore(self, state: Sequence[torch.Tensor]) -> None:
        """Go on with these tensors."""
        for name, tensor in zip(STATE, state, strict=True):
            setattr(self, name, tensor)

    def settle(self, state: Sequence[torch.Tensor]) -> None:
        """Write what steps have made of a state into these tensors, where a recorded step looks for it."""
        for name, tensor in zip(STATE, state, strict=True):
            if getattr(self, name) is not tensor:
                tensor.copy_(getattr(self, name))

    def advance(self, evicting: bool) -> list[Step]:
        """What each layer does in the step that begins; `evicting` if a row will hold less than was seen."""
        lengths, turned = torch.minimum(self.position + 1, self.budgets), [None] * len(self.layers)
        if evicting and self.evictor.sinks and self.rotation is not None:
            turned = self._turned_sinks(self.position + 1 - lengths)
        rows = self.first_rows
        if not self.evictor.needs_scores:
            first = self.layers[0]
            slots = slots_of(self.evictor, self.position, self.budgets, first.slot_positions, first.scores)
            rows = rows + slots[..., 0]
        steps = zip(self.position, self.budgets, lengths, rows, turned, strict=True)
        self.position = self.position + 1
        return [Step(*step) for step in steps]

    @property
    def state_bytes(self) -> int:
        """Bytes of the sinks as they came."""
        return self.sinks.nbytes

    def _sinks(self) -> torch.Tensor:
        """The sinks in the buffers, `(layers, rows, sinks, head_dim)`; none where they do not turn."""
        if self.rotation is None:
            return torch.empty(0)
        found = [self._turning(layer)[slots] for layer, slots in zip(self.layers, self.sink_slots, strict=True)]
        return torch.stack(found).unflatten(1, (self.budgets.shape[1], self.evictor.sinks))

    def _turning(self, layer: SqueezeLayer) -> torch.Tensor:
        """What turns of a layer: its keys, or in latent attention a part of them."""
        assert self.rotation is not None
        return getattr(layer, self.rotation.part)

    def _turned_sinks(self, evicted: torch.Tensor) -> list[Any]:
        """Of each layer the slots of its sinks, and what stands there when so many tokens were evicted."""
        assert self.rotation is not None
        if self.sinks_come_late:  # after a prompt shorter than the sinks: until it evicts, they are as they came
            self.sinks = torch.where(self.evicted[..., None] == 0, self._sinks(), self.sinks)
        self.evicted = evicted
        turned = self.rotation(self.sinks, evicted[..., None]).flatten(1, 2)
        return list(zip(self.sink_slots, turned, strict=True))
