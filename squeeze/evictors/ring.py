"""The ring that sliding window and StreamingLLM write into: a token's position alone tells its slot."""

from __future__ import annotations

import torch


def ring_slot(position: torch.Tensor, budget: torch.Tensor | int, sinks: int) -> torch.Tensor:
    """Slot of the token at `position`: the sinks first, the others around the rest of the buffer, oldest replaced.

    Args:
        position: tokens before this one in its sequence, int64, any shape.
        budget: slots in the buffer, broadcast against `position`.
        sinks: slots at the start that the ring leaves alone.
    """
    # A buffer too short for a ring (budget <= sinks) is one that the sequence never fills.
    length = (torch.as_tensor(budget) - sinks).clamp(min=1)
    return torch.where(position < sinks, position, sinks + (position - sinks) % length)


def ring_keep(length: int, budget: int, sinks: int) -> torch.Tensor:
    """Positions that survive a prompt of `length` tokens, in slot order: `(1, min(length, budget))`."""
    kept = torch.arange(length)
    if length > budget:
        kept = torch.cat([kept[:sinks], kept[length - (budget - sinks) :]])
    return kept[torch.argsort(ring_slot(kept, budget, sinks))][None]
