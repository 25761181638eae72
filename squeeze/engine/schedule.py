"""Slots, lengths and sinks of a decode step, worked out for all layers that are alike at once.

A decode step is many small operations, and calling them is what it costs at batch 1: slots and sinks, worked out
layer by layer, would be most of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from squeeze.engine.layer import SqueezeLayer, check_slots


class Schedule:
    """Slots, lengths and sinks of layers on one device, step after step.

    StreamingLLM measures distance inside the cache: as tokens between the sinks and the recent window disappear,
    sinks move closer, by as many positions as tokens were evicted. Their keys are turned in the buffers, always from
    the angles they came with and never from the last step's.

    Args:
        layers: just cut to their budgets; of one shape, and with keys that turn alike.
        lengths: tokens that each sequence has seen.
        budgets: slots owned, `(layers, batch)`.
    """

    def __init__(
        self,
        layers: Sequence[SqueezeLayer],
        lengths: Sequence[int],
        budgets: Sequence[Sequence[int]],
    ):
        device = layers[0].keys.device
        batch, heads = layers[0].keys.shape[:2]
        self.layers, self.evictor = layers, layers[0].evictor
        rotation = layers[0].facts.rotation
        self.rotation = None if rotation is None else replace(rotation, inv_freq=rotation.inv_freq.to(device))
        # No view of another tensor, as later positions are none: a compiled step would be compiled again.
        self.position = torch.tensor([[length] for length in lengths], device=device)
        self.budgets = torch.tensor(budgets, device=device)[..., None]
        slots = torch.tensor([layer.keys.shape[2] for layer in layers], device=device)
        self.first_rows = (torch.arange(batch * heads, device=device) * slots[:, None]).view(-1, batch, heads)
        self.evicted = torch.zeros_like(self.budgets)
        self.sinks_come_late = min(lengths) < self.evictor.sinks
        self.sinks = self._sinks()

    def advance(self, evicting: bool) -> None:
        """Tell the layers about the step that begins; `evicting` if a sequence will hold less than it has seen."""
        lengths = torch.minimum(self.position + 1, self.budgets)
        if evicting and self.evictor.sinks and self.rotation is not None:
            self._turn_sinks(self.position + 1 - lengths)
        rows = self.first_rows
        if not self.evictor.needs_scores:
            first = self.layers[0]
            slots = self.evictor.slot(self.position, self.budgets, first.slot_positions, first.scores)
            check_slots(self.evictor, slots, self.budgets.shape, self.budgets)
            rows = rows + slots
        for layer, *step in zip(self.layers, self.budgets, lengths, rows, strict=True):
            layer.position = self.position
            layer.budget, layer.lengths, layer.rows = step
        self.position = self.position + 1

    @property
    def state_bytes(self) -> int:
        """Bytes of the sinks as they came."""
        return self.sinks.nbytes

    def _sinks(self) -> torch.Tensor:
        """The sinks in the buffers, `(layers, batch, kv_heads, sinks, head_dim)`; none where they do not turn."""
        if self.rotation is None:
            return torch.empty(0)
        return torch.stack([self._turning(layer) for layer in self.layers])

    def _turning(self, layer: SqueezeLayer) -> torch.Tensor:
        """Sinks of a layer: of its keys, or in latent attention of the part that turns."""
        assert self.rotation is not None
        return getattr(layer, self.rotation.part)[:, :, : self.evictor.sinks]

    def _turn_sinks(self, evicted: torch.Tensor) -> None:
        assert self.rotation is not None
        if self.sinks_come_late:  # after a prompt shorter than the sinks: until it evicts, they are as they came
            self.sinks = torch.where(self.evicted[..., None, None] == 0, self._sinks(), self.sinks)
        self.evicted = evicted
        for layer, turned in zip(self.layers, self.rotation(self.sinks, evicted[..., None, None]), strict=True):
            self._turning(layer)[:] = turned
