"""SqueezeCache: a transformers Cache whose layers each own one buffer, as large as their budget and no larger.

During prefill a layer holds the whole prompt. `SqueezeCache.compress` then copies what the evictor keeps into a
buffer allocated once; from there on a new token is written into one slot in place, and nothing is ever concatenated.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from squeeze.evictors import Evictor


def fuses(device: torch.device) -> bool:
    """Whether a fused kernel decodes faster than grouped matrix products: on GPUs; not on CPUs, by measurement."""
    return device.type == "cuda"


class SqueezeLayer(CacheLayerMixin):
    """Keys and values of one layer, and what its evictor remembers about them.

    Attributes:
        keys, values: `(batch, kv_heads, slots, head_dim)`, keys after RoPE at their original positions. A sequence
            holds `min(seen, budget)` tokens, always in the first slots; the buffer is as long as the largest budget.
        scores: H2O's accumulated attention, float32, `(batch, kv_heads, slots)`; no elements for the other evictors.
        held: position of the token in each slot, -1 where it is empty, int32, same shape as `scores`.
        seen, budget: tokens seen and slots owned by each sequence, int64, `(batch, 1)`, on the layer's device.
        fused: whether decoding uses a fused kernel, which gives no scores and reads sinks from the buffer as they are.
        sink_keys: with `fused`, StreamingLLM's sinks as they came, of which turned copies are in the buffer.
        longest: the most tokens that any sequence holds.
        ragged: whether sequences hold different numbers of tokens.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, evictor: Evictor):
        super().__init__()
        self.evictor = evictor
        self.scores = torch.empty(0)
        self.held = torch.empty(0, dtype=torch.int32)
        self.sink_keys = torch.empty(0)
        self.fused = False

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
            keys[row, :, :count] = self.keys[row, :, -length:].gather(1, index)
            values[row, :, :count] = self.values[row, :, -length:].gather(1, index)
            if scored:
                scores[row, :, :count] = row_scores.gather(1, kept)
                held[row, :, :count] = kept
        self.keys, self.values, self.scores, self.held = keys, values, scores, held
        sinks = self.evictor.sinks
        self.fused = fuses(keys.device) and not scored and min(lengths) >= sinks
        self.sink_keys = keys[:, :, : sinks if self.fused else 0].clone()
        self.seen = torch.tensor(lengths, device=keys.device)[:, None]
        self.budget = torch.tensor(budgets, device=keys.device)[:, None]
        self.set_lengths(lengths, budgets)

    def write(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Place a new token per sequence, `(batch, kv_heads, 1, head_dim)`; where there is no room, evict another."""
        batch, heads, _, head_dim = keys.shape
        slot = self.evictor.slot(self.seen, self.budget, self.held, self.scores).expand(batch, heads)[..., None]
        index = slot[..., None].expand(-1, -1, -1, head_dim)
        self.keys.scatter_(2, index, keys)
        self.values.scatter_(2, index, values)
        if self.evictor.needs_scores:
            self.scores.scatter_(2, slot, 0.0)
            self.held.scatter_(2, slot, self.seen[..., None].expand(-1, heads, -1).int())
        self.seen += 1

    def set_lengths(self, seen: Sequence[int], budgets: Sequence[int]) -> None:
        """Note on the host how many tokens the sequences hold, so that a decode step never waits for the device."""
        held = [min(pair) for pair in zip(seen, budgets, strict=True)]
        self.longest, self.ragged = max(held), len(set(held)) > 1
        self.evicted = any(tokens > budget for tokens, budget in zip(seen, budgets, strict=True))

    @property
    def kv_bytes(self) -> int:
        """Bytes of the key and value tensors."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def state_bytes(self) -> int:
        """Bytes of scores, positions and sinks kept as they came."""
        return self.scores.nbytes + self.held.nbytes + self.sink_keys.nbytes

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
    """

    def __init__(self, evictor: Evictor, layers: int, max_new_tokens: int):
        super().__init__(layers=[SqueezeLayer(evictor) for _ in range(layers)])
        self.evictor = evictor
        self.max_new_tokens = max_new_tokens
        self.prompt_lengths: list[int] = []
        self.budgets: list[list[int]] = []
        self.padded_length = 0
        self.steps = 0
        self.compressed = False

    def begin(self, tokens: int, batch: int, attention_mask: torch.Tensor | None) -> None:
        """Take note of a forward pass over `tokens` new tokens before its first layer runs.

        Raises:
            ValueError: right padding, an empty sequence, a prompt in more than one piece, or more tokens than the
                cache was made for.
        """
        if self.compressed:
            if tokens != 1:
                raise ValueError(f"after prefill a squeezed cache takes one token at a time, got {tokens}")
            if batch != len(self.prompt_lengths):
                raise ValueError(f"the cache holds {len(self.prompt_lengths)} sequences, got a batch of {batch}")
            if self.steps >= self.max_new_tokens:
                raise ValueError(f"the cache was made for {self.max_new_tokens} new tokens, and they are used up")
            seen = [length + self.steps + 1 for length in self.prompt_lengths]
            for layer, budgets in zip(self.layers, self.budgets, strict=True):
                layer.set_lengths(seen, budgets)
            return
        self.padded_length = tokens
        self.prompt_lengths = _prompt_lengths(tokens, batch, attention_mask)

    def end_step(self) -> None:
        """Count a decode step, after its last layer: until then the length is what positions are derived from."""
        self.steps += 1

    def compress(self, budgets: Sequence[Sequence[int]]) -> None:
        """Cut every layer to its budgets, `(batch, layers)` tokens; called once, at the end of prefill."""
        self.budgets = [list(column) for column in zip(*budgets, strict=True)]
        for layer, column in zip(self.layers, self.budgets, strict=True):
            layer.compress(self.prompt_lengths, column)
        self.compressed = True

    @property
    def kv_bytes(self) -> int:
        """Bytes of all key and value tensors."""
        return sum(layer.kv_bytes for layer in self.layers)

    @property
    def state_bytes(self) -> int:
        """Bytes of all scores and positions (H2O), and of sinks kept as they came (StreamingLLM on a GPU)."""
        return sum(layer.state_bytes for layer in self.layers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, padding included: what positions and masks are counted by, not what is held."""
        return self.padded_length + self.steps if self.compressed else 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        raise ValueError("beam search is not supported with a squeezed cache: use greedy decoding or sampling")

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError("assisted decoding is not supported with a squeezed cache: evicted tokens cannot come back")

    batch_repeat_interleave = batch_select_indices = reorder_cache


def _prompt_lengths(tokens: int, batch: int, attention_mask: torch.Tensor | None) -> list[int]:
    if attention_mask is None:
        return [tokens] * batch
    if attention_mask.shape != (batch, tokens):
        raise ValueError(f"attention_mask must have shape {(batch, tokens)}, got {tuple(attention_mask.shape)}")
    mask = attention_mask.bool()
    lengths = mask.sum(dim=1).tolist()
    if 0 in lengths:
        raise ValueError(f"sequence {lengths.index(0)} of the batch is empty")
    if (mask[:, :-1] & ~mask[:, 1:]).any():
        raise ValueError("prompts of different lengths must be padded on the left (tokenizer.padding_side = 'left')")
    return lengths
