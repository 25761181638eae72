"""A prefill that several configurations share, and what gives one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import PreTrainedModel

from squeeze.engine.cache import SqueezeCache
from squeeze.evictors import Evictor
from squeeze.models.rope import LengthwiseRope


@dataclass
class Prefill:
    """A prefill that other configurations can take over: nothing in it depends on budgets.

    Args:
        inputs: token ids, `(batch, tokens)`.
        lengths: of the prompts, padding excluded.
        way: what else it depends on, of the configuration.
        layers: keys, values and scores of each.
        measured: similarities of each layer, `(batch,)`.
        states: what the decoder gave, `(batch, tokens, hidden)`.
        seconds: that it took.
    """

    inputs: torch.Tensor
    lengths: list[int]
    way: tuple[bool, str]
    layers: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    measured: list[torch.Tensor]
    states: torch.Tensor
    seconds: float


class Forks(Protocol):
    """A squeezed model, as far as it prefills a prompt once and goes on in several ways: see `SqueezedModel`."""

    model: PreTrainedModel
    evictor: Evictor
    window: int | None
    rope: LengthwiseRope | None

    def prefill(self, tokens: torch.Tensor) -> Prefill: ...

    def fork(self, prefill: Prefill, budgets: Sequence[Sequence[int]], max_new_tokens: int) -> SqueezeCache: ...
