"""SqueezeCache: a transformers Cache whose layers each own one buffer, as large as their budget and no larger.

During prefill a layer holds the whole prompt: until it is filled, where its budgets are known by then, else until all
layers are. What the evictor keeps is then copied into a buffer allocated once; from there on a new token is written
into one slot in place, and nothing is ever concatenated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache

from squeeze.engine.layer import SqueezeLayer
from squeeze.engine.schedule import Schedule
from squeeze.evictors import Evictor


class SqueezeCache(Cache):
    """One `SqueezeLayer` a layer, and the sequence lengths that they share.

    Args:
        evictor: which tokens survive.
        layers: how many decoder layers the model has.
        max_new_tokens: how many tokens may be generated; no buffer is made for more.
        inv_freq: RoPE's inverse frequencies, `(head_dim / 2,)`, float32, by which StreamingLLM's sinks are moved.

    Attributes:
        owner: the model that the cache was made for, and the evictor of its run then.
        broken: whether a decode step has failed in the middle: some layers hold its token then, and others do not.
        budgets: tokens, `(layers, batch)`; with no columns until they are known. Set between `begin` and the first
            layer's `fill`, they bound the prefill: no more than one layer holds the whole prompt at a time.
        seen, lengths: of the prefill under way, tokens of each sequence before the present chunk, and in it.
    """

    def __init__(self, evictor: Evictor, layers: int, max_new_tokens: int, inv_freq: torch.Tensor):
        super().__init__(layers=[SqueezeLayer(evictor) for _ in range(layers)])
        self.owner: tuple[Any, Evictor] = None, evictor
        self.broken = False
        self.max_new_tokens = max_new_tokens
        self.inv_freq = inv_freq
        self.prompt_lengths: list[int] = []
        self.seen: list[int] = []
        self.lengths: list[int] = []
        self.budgets = np.empty((layers, 0), dtype=int)
        self.schedules: list[Schedule] = []
        self.padded_length = 0
        self.steps = 0
        self.compressed = False

    def begin(self, tokens: int, batch: int, attention_mask: torch.Tensor | None) -> None:
        """Take note of a forward pass over `tokens` new tokens before its first layer runs.

        Raises:
            ValueError: right padding, an empty sequence, a prompt in more than one piece, or more tokens than the
                cache was made for.
        """
        if self.broken:
            raise ValueError("a step on this cache has failed in the middle: read the prompt again with a new cache")
        if self.compressed:
            if tokens != 1:
                raise ValueError(f"after prefill a squeezed cache takes one token at a time, got {tokens}")
            if batch != len(self.prompt_lengths):
                raise ValueError(f"the cache holds {len(self.prompt_lengths)} sequences, got a batch of {batch}")
            if self.steps >= self.max_new_tokens:
                raise ValueError(f"the cache was made for {self.max_new_tokens} new tokens, and they are used up")
            self._begin_step()
            return
        self.budgets = self.budgets[:, :0]
        self.padded_length = tokens
        self.prompt_lengths = _prompt_lengths(tokens, batch, attention_mask)
        self.begin_chunk(0, tokens)

    def begin_chunk(self, start: int, end: int) -> None:
        """Take note of a chunk of the prefill, columns `start` to `end` of the left-padded prompts."""
        padding = [self.padded_length - length for length in self.prompt_lengths]
        self.seen = [max(start - columns, 0) for columns in padding]
        self.lengths = [max(end - columns, 0) - seen for columns, seen in zip(padding, self.seen, strict=True)]

    def _begin_step(self) -> None:
        """Lengths are worked out on the host as well, so that a decode step never waits for its device."""
        seen = np.array(self.prompt_lengths) + self.steps + 1
        held = np.minimum(seen, self.budgets)
        longest = held.max(axis=1)
        ragged = held.min(axis=1) < longest
        for layer, layer_longest, layer_ragged in zip(self.layers, longest.tolist(), ragged.tolist(), strict=True):
            layer.longest, layer.ragged = layer_longest, layer_ragged
        evicting = bool((held < seen).any())
        for schedule in self.schedules:
            schedule.advance(evicting)

    def end_step(self) -> None:
        """Count a decode step, after its last layer: until then the length is what positions are derived from."""
        self.steps += 1
        self.broken = False

    def fill(self, index: int, keys: torch.Tensor, values: torch.Tensor, scores: torch.Tensor) -> None:
        """Give a layer the prompt or its next chunk, as `SqueezeLayer.fill`, and cut it if its budgets are known."""
        layer = self.layers[index]
        if any(self.seen):
            layer.extend(keys, values, self.seen, self.lengths, self.budgets[index].tolist())
            return
        layer.fill(keys, values, scores)
        if self.budgets.size:
            layer.compress(self.lengths, self.budgets[index].tolist())

    def past(self, index: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None]:
        """What a layer keeps of earlier chunks, see `SqueezeLayer.past`, sequence by sequence; None of nothing."""
        for row, seen in enumerate(self.seen):
            yield self.layers[index].past(row, seen, int(self.budgets[index, row])) if seen else None

    def compress(self, budgets: Sequence[Sequence[int]]) -> None:
        """Cut every layer to its budgets, `(batch, layers)` tokens, unless `fill` did; once, at the end of prefill."""
        if not self.budgets.size:
            self.budgets = np.array(budgets).T
            for layer, column in zip(self.layers, self.budgets.tolist(), strict=True):
                layer.compress(self.prompt_lengths, column)
        by_device: dict[torch.device, list[int]] = {}
        for index, layer in enumerate(self.layers):
            by_device.setdefault(layer.keys.device, []).append(index)
        self.schedules = [
            Schedule([self.layers[i] for i in own], self.prompt_lengths, self.budgets[own].tolist(), self.inv_freq)
            for own in by_device.values()
        ]
        self.compressed = True

    @property
    def kv_bytes(self) -> int:
        """Bytes of all key and value tensors."""
        return sum(layer.kv_bytes for layer in self.layers)

    @property
    def state_bytes(self) -> int:
        """Bytes of all scores and positions (H2O), and of the sinks as they came (StreamingLLM)."""
        return sum(part.state_bytes for part in (*self.layers, *self.schedules))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, padding included: what positions and masks are counted by, not what is held."""
        return self.padded_length + self.steps if self.compressed else 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        raise ValueError("beam search is not supported with a squeezed cache: use greedy decoding or sampling")

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError("assisted decoding is not supported with a squeezed cache: evicted tokens cannot come back")

    batch_repeat_interleave = batch_select_indices = reorder_cache


def _prompt_lengths(tokens: int, batch: int, attention_mask: torch.Tensor | None) -> list[int]:
    if tokens == 0:
        raise ValueError("the prompt has no tokens: nothing can follow it")
    if attention_mask is None:
        return [tokens] * batch
    if attention_mask.shape != (batch, tokens):
        raise ValueError(f"attention_mask must have shape {(batch, tokens)}, got {tuple(attention_mask.shape)}")
    mask = attention_mask.bool()
    lengths = mask.sum(dim=1).tolist()
    if 0 in lengths:
        raise ValueError(f"sequence {lengths.index(0)} of the batch is empty: leave it out, nothing can follow it")
    if (mask[:, :-1] & ~mask[:, 1:]).any():
        raise ValueError("prompts of different lengths must be padded on the left (tokenizer.padding_side = 'left')")
    return lengths
