"""An evictor's answers: those of a user's own class are checked, and one sentence says what is wrong with them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from squeeze.errors import InputError
from squeeze.evictors.base import Evictor, Tokens
from squeeze.numbers import shown


def kept_of(evictor: Evictor, length: int, budget: int, scores: torch.Tensor, heads: int) -> torch.Tensor:
    """Positions that an evictor keeps of a prompt, `(heads, kept)` or `(1, kept)`; InputError for others."""
    kept, count = evictor.keep(length, budget, scores), min(length, budget)
    if evictor.built_in:
        return kept
    shapes = [(rows, count) for rows in (heads, 1)]
    right = isinstance(kept, torch.Tensor) and kept.dtype == torch.long and kept.shape in shapes
    if not right or bool(((kept < 0) | (kept >= length)).any()):
        raise InputError(
            f"keep of the evictor {evictor.name} must give positions from 0 to {length - 1}, an int64 tensor "
            f"of shape {shapes[0]} or {shapes[1]}, and gave {_described(kept)}"
        )
    return kept


def scores_of(evictor: Evictor, tokens: Tokens) -> torch.Tensor:
    """Scores that an evictor gives tokens, float32 `(rows, tokens)`; InputError for others."""
    scores = evictor.score(tokens)
    if evictor.built_in or torch.compiler.is_compiling():
        return scores
    shape = tokens.positions.shape
    right = isinstance(scores, torch.Tensor) and scores.is_floating_point() and scores.shape == shape
    if not right or bool(scores.isnan().any()):
        raise InputError(
            f"score of the evictor {evictor.name} must give a floating-point tensor of shape {tuple(shape)}, none "
            f"of it NaN, and gave {_described(scores)}"
        )
    return scores.float()


def slots_of(
    evictor: Evictor, position: torch.Tensor, budget: torch.Tensor, held: torch.Tensor, scores: torch.Tensor
) -> torch.Tensor:
    """Slots that an evictor chooses for new tokens, see `Evictor.slot`; InputError unless each is below its budget."""
    slots = evictor.slot(position, budget, held, scores)
    if evictor.built_in or torch.compiler.is_compiling():
        return slots
    shape: Sequence[int] = budget.shape
    right = isinstance(slots, torch.Tensor) and slots.dtype == torch.long and slots.shape == tuple(shape)
    if not right or bool(((slots < 0) | (slots >= budget)).any()):
        raise InputError(
            f"slot of the evictor {evictor.name} must give an int64 tensor of shape {tuple(shape)}, each from 0 to "
            f"its budget - 1, and gave {_described(slots)}"
        )
    return slots


def _described(given: object) -> str:
    """A value that an evictor gave, in a few words."""
    if not isinstance(given, torch.Tensor):
        return shown(given)
    ends = f" from {given.min().item()} to {given.max().item()}" if given.numel() else ""
    return f"{str(given.dtype).removeprefix('torch.')} of shape {tuple(given.shape)}{ends}"
