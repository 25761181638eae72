"""SqueezeCache: a transformers Cache whose layers each own one buffer, as large as their budget and no larger.

During prefill a layer holds the whole prompt: until it is filled, where its budgets are known by then, else until all
layers are. What the evictor keeps is then copied into a buffer allocated once; from there on a new token is written
into one slot in place, and nothing is ever concatenated.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from squeeze.evictors import Evictor
from squeeze.schedule import Schedule

#: What flash-attn's kernels take.
FLASH_DTYPES = (torch.float16, torch.bfloat16)


def decode_kernel(device: torch.device, dtype: torch.dtype, scored: bool) -> str:
    """How to decode: `grouped` matrix products, or the fused kernel of `flash` (flash-attn) or `sdpa` (PyTorch).

    On CPUs, and on GPUs in float32, grouped products are faster, by measurement (docs/gpu.md). With `scored` attention
    probabilities are wanted, which fused kernels do not give.
    """
    if device.type != "cuda" or dtype not in FLASH_DTYPES or scored:
        return "grouped"
    return "flash" if importlib.util.find_spec("flash_attn") is not None else "sdpa"


class SqueezeLayer(CacheLayerMixin):
    """Keys and values of one layer, and what its evictor remembers about them.

    Attributes:
        keys, values: `(batch, kv_heads, slots, head_dim)`, keys after RoPE at their original positions. A sequence
            holds `min(seen, budget)` tokens, always in the first slots; the buffer is as long as the largest budget.
        scores: H2O's accumulated attention, float32, `(batch, kv_heads, slots)`; no elements for the other evictors.
        held: position of the token in each slot, -1 where it is empty, int32, same shape as `scores`.
        position, budget, lengths, rows: of the decode step under way, as `squeeze.schedule.Schedule` describes them.
        longest: the most tokens that any sequence holds.
        ragged: whether sequences hold different numbers of tokens.
        kernel: how decoding attends, see `decode_kernel`.
    """

    keys: torch.Tensor
    values: torch.Tensor
    position: torch.Tensor
    budget: torch.Tensor
    lengths: torch.Tensor
    rows: torch.Tensor
    longest: int
    ragged: bool
    kernel: str

    def __init__(self, evictor: Evictor):
        super().__init__()
        self.evictor = evictor
        self.scores = torch.empty(0)
        self.held = torch.empty(0, dtype=torch.int32)

    def fill(self, keys: torch.Tensor, values: torch.Tensor, scores: torch.Tensor) -> None:
        """Hold a whole left-padded prompt, `(batch, kv_heads, tokens, head_dim)`, until `compress`."""
        self.keys, self.values, self.scores = keys, values, scores
        self.is_initialized = True

    def compress(self, lengths: Sequence[int], budgets: Sequence[int]) -> None:
        """Keep what each sequence's budget allows; padding is dropped, and the prompt's own tensors let go."""
        batch, heads, _, head_dim = self.keys.shape
        slots = max(budgets)
        keys = self.keys.new_zeros(batch, heads, slots, head_dim)
        values = torch.zeros_like(keys)
        scored = self.evictor.needs_scores
        scores = self.scores.new_zeros((batch, heads, slots) if scored else 0)
        held = torch.full_like(scores, -1, dtype=torch.int32)
        for row, (length, budget) in enumerate(zip(lengths, budgets, strict=True)):
            row_scores = self.scores[row, :, -length:] if scored else self.scores
            kept = self.evictor.keep(length, budget, row_scores).to(keys.device).expand(heads, -1)
            index = kept[..., None].expand(-1, -1, head_dim)
            count = kept.shape[1]
            # Straight into the buffer: what is kept never exists twice.
            torch.gather(self.keys[row, :, -length:], 1, index, out=keys[row, :, :count])
            torch.gather(self.values[row, :, -length:], 1, index, out=values[row, :, :count])
            if scored:
                scores[row, :, :count] = row_scores.gather(1, kept)
                held[row, :, :count] = kept
        self.keys, self.values, self.scores, self.held = keys, values, scores, held
        self.kernel = decode_kernel(keys.device, keys.dtype, scored)

    def extend(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        seen: Sequence[int],
        lengths: Sequence[int],
        budgets: Sequence[int],
    ) -> None:
        """Keep what the budgets allow of a prompt's next chunk; for evictors that need no scores.

        A token's slot is the same however long the prompt has become, so what stays needs not be moved.

        Args:
            keys, values: `(batch, kv_heads, tokens, head_dim)`, left-padded.
            seen: tokens of each sequence that came before these.
            lengths: tokens of each sequence, 0 where it has not begun.
        """
        for row, (before, length, budget) in enumerate(zip(seen, lengths, budgets, strict=True)):
            position = self.evictor.keep(before + length, budget, self.scores)[0]  # of each slot
            slots = (position >= before).nonzero()[:, 0]
            index = position[slots] - before - length
            self.keys[row][:, slots] = keys[row][:, index]
            self.values[row][:, slots] = values[row][:, index]

    def past(self, row: int, seen: int, budget: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What is kept of one sequence's first `seen` tokens, in their order.

        Returns:
            keys and values `(kv_heads, kept, head_dim)`, and positions `(kept,)`.
        """
        positions, slots = self.evictor.keep(seen, budget, self.scores)[0].sort()
        return self.keys[row][:, slots], self.values[row][:, slots], positions.to(self.keys.device)

    def write(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Place a new token per sequence, `(batch, kv_heads, 1, head_dim)`; where there is no room, evict another."""
        batch, heads, _, head_dim = keys.shape
        rows = self.rows
        if self.evictor.needs_scores:
            rows = rows + self.evictor.slot(self.position, self.budget, self.held, self.scores)
        rows = rows.view(-1)
        # Not scatter_, which for 16-bit types goes through a copy of the whole buffer on the CPU.
        self.keys.view(-1, head_dim).index_copy_(0, rows, keys.reshape(-1, head_dim).to(self.keys.dtype))
        self.values.view(-1, head_dim).index_copy_(0, rows, values.reshape(-1, head_dim).to(self.values.dtype))
        if self.evictor.needs_scores:
            self.scores.view(-1).index_fill_(0, rows, 0.0)
            self.held.view(-1).index_copy_(0, rows, self.position.int().expand(batch, heads).reshape(-1))

    @property
    def kv_bytes(self) -> int:
        """Bytes of the key and value tensors."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def state_bytes(self) -> int:
        """Bytes of scores and positions."""
        return self.scores.nbytes + self.held.nbytes

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: buffers are made by `compress`, when the budgets are known."""

    def update(self, key_states, value_states, *args, **kwargs):
        raise ValueError("a SqueezeCache is used by a model inside `with squeezed(model, config)`, not by others")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        raise ValueError("a SqueezeCache needs no mask: use it with a model inside `with squeezed(model, config)`")

    def get_seq_length(self) -> int:
        raise ValueError("the logical length is the cache's: SqueezeCache.get_seq_length()")

    def get_max_length(self) -> int:
        return -1


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
