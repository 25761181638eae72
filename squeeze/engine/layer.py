"""One attention layer's part of a SqueezeCache: buffers of keys and values, as long as its budget.

A model calls `update` with the keys and values of each forward pass, as it does on any cache of transformers, and
hands what it returns to its attention function (`squeeze.engine.interface`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import pad
from transformers.cache_utils import CacheLayerMixin

from squeeze.engine.findings import AttentionLayer
from squeeze.errors import InputError
from squeeze.evictors import Evictor
from squeeze.numbers import shown

#: Dtypes that flash-attn's kernels take.
FLASH_DTYPES = (torch.float16, torch.bfloat16)


def decode_kernel(device: torch.device, dtype: torch.dtype, scored: bool) -> str:
    """Kernel of decode steps: `grouped` matrix products, or a fused one, `flash` (flash-attn) or `sdpa` (PyTorch).

    On CPUs, and on GPUs in float32, grouped products are faster, by measurement (docs/gpu.md). With `scored` attention
    probabilities are wanted, which fused kernels do not give.
    """
    if device.type != "cuda" or dtype not in FLASH_DTYPES or scored:
        return "grouped"
    return "flash" if importlib.util.find_spec("flash_attn") is not None else "sdpa"


def check_slots(evictor: Evictor, slots: torch.Tensor, shape: Sequence[int], budget: torch.Tensor) -> None:
    """Raises InputError unless an evictor of the user's own gave slots of this shape, each below its budget.

    Args:
        budget: of each sequence, broadcast against the slots.
    """
    if evictor.built_in or torch.compiler.is_compiling():
        return
    right = isinstance(slots, torch.Tensor) and slots.dtype == torch.long and slots.shape == tuple(shape)
    if not right or bool(((slots < 0) | (slots >= budget)).any()):
        raise InputError(
            f"slot of the evictor {evictor.name} must give an int64 tensor of shape {tuple(shape)}, each from 0 to "
            f"its budget - 1, and gave {_described(slots)}"
        )


def _described(given: object) -> str:
    """A value that an evictor gave, in a few words."""
    if not isinstance(given, torch.Tensor):
        return shown(given)
    ends = f" from {given.min().item()} to {given.max().item()}" if given.numel() else ""
    return f"{str(given.dtype).removeprefix('torch.')} of shape {tuple(given.shape)}{ends}"


@dataclass(frozen=True)
class Reading:
    """The prompts that are being read, or the chunk of them, as far as a layer must know.

    Attributes:
        seen, lengths: tokens of each sequence before the chunk, and in it (0 of one that has not begun).
        budgets: tokens of each sequence, where they are known before the pass: the layer is cut as soon as it is
            filled. None: when all layers are.
        fused: whether attention may use PyTorch's fused kernel.
    """

    seen: Sequence[int]
    lengths: Sequence[int]
    budgets: Sequence[int] | None
    fused: bool


class SqueezeLayer(CacheLayerMixin):
    """Keys and values of one attention layer, and what its evictor remembers about them.

    Args:
        evictor: which tokens survive.
        facts: what the probe found out about the layer.

    Attributes:
        keys, values: `(batch, kv_heads, slots, head_dim)`, keys after RoPE at their original positions. A sequence
            holds `min(seen, budget)` tokens, always in the first slots; the buffer is as long as the largest budget.
            Latent attention keeps two parts of another width in their places.
        scores: H2O's accumulated attention, float32, `(batch, kv_heads, slots)`; no elements for the other evictors.
        slot_positions: of the token in each slot, -1 where it is empty, int32, `(batch, kv_heads, slots)`; no elements
            where nobody asks for them.
        shared: whether other attention modules look at the layer as well (Gemma 3n).
        reading: the prompts under way; None in decode steps.
        pending: keys and values of the pass, between `update` and `take`.
        places: of each sequence, positions of the keys that `update` has returned, `(keys,)`.
        position: that the decode step under way gives each sequence's new token, int64, `(batch, 1)`.
        budget: slots that each sequence owns, `(batch, 1)`.
        lengths: tokens of each sequence after the step, `(batch, 1)`.
        rows: where the step writes in `keys` and `values` seen as `(batch * kv_heads * slots, head_dim)`, int64,
            `(batch, kv_heads)`; with scores only each buffer's first row, to which the evictor adds its slot.
        longest: slots that are attended to; None: all of them.
        ragged: whether some of these are empty in some sequence.
        kernel: of attention in decode steps, see `decode_kernel`.
    """

    is_compileable = False
    keys: torch.Tensor
    values: torch.Tensor
    position: torch.Tensor
    budget: torch.Tensor
    lengths: torch.Tensor
    rows: torch.Tensor
    longest: int | None
    ragged: bool
    kernel: str

    def __init__(self, evictor: Evictor, facts: AttentionLayer):
        super().__init__()
        self.evictor, self.facts = evictor, facts
        self.shared = len(facts.users) > 1
        self.scores = torch.empty(0)
        self.slot_positions = torch.empty(0, dtype=torch.int32)
        self.reading: Reading | None = None
        self.pending: tuple[torch.Tensor, torch.Tensor] | None = None
        self.places: list[torch.Tensor] = []

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """Take the keys and values of a forward pass, and return those to attend to.

        Args:
            keys, values: `(batch, kv_heads, tokens, head_dim)`, left-padded; one token in a decode step.
        Returns:
            The slots that are attended to in a decode step; the prompt, or what is kept of it and its next chunk.
        """
        keys, values = as_autocast(keys.detach(), values.detach())
        if self.reading is None:
            self.write(keys, values)
            if self.longest is None:
                return self.keys, self.values
            return self.keys[:, :, : self.longest], self.values[:, :, : self.longest]
        # Copies, where they are a part of a larger product that would stay in memory with them.
        self.pending = _apart(keys), values.contiguous()
        return self._with_past(*self.pending)

    def take(self, scores: torch.Tensor) -> None:
        """Hold what `update` was given, now that it has been attended to, and cut it if its budgets are known.

        Args:
            scores: of the prompt's tokens, `(batch, heads, tokens)` float32, where the evictor needs them.
        """
        assert self.reading is not None and self.pending is not None
        (keys, values), self.pending = self.pending, None
        seen, lengths, budgets = self.reading.seen, self.reading.lengths, self.reading.budgets
        if budgets is not None and any(seen):
            self.extend(keys, values, seen, lengths, budgets)
            return
        self.fill(keys, values, _by_cached_head(scores, keys.shape[1]))
        if budgets is not None:
            self.compress(lengths, budgets)

    def _with_past(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A chunk, after what is kept of earlier ones where there is any, left-padded; notes `places`."""
        assert self.reading is not None
        seen, lengths, budgets = self.reading.seen, self.reading.lengths, self.reading.budgets
        self.places = [
            torch.arange(before, before + count, device=keys.device)
            for before, count in zip(seen, lengths, strict=True)
        ]
        if not any(seen):
            return keys, values
        rows = []
        for row, (before, count) in enumerate(zip(seen, lengths, strict=True)):
            own = [part[row, :, part.shape[2] - count :] for part in (keys, values)]
            if before:
                assert budgets is not None, "a chunk needs budgets that are known before it"
                *kept, positions = self.past(row, before, budgets[row])
                own = [torch.cat(parts, dim=1) for parts in zip(kept, own, strict=True)]
                self.places[row] = torch.cat([positions, self.places[row]])
            rows.append(own)
        longest = max(map(len, self.places))
        joined_keys, joined_values = (
            torch.stack([pad(part, (0, 0, longest - part.shape[1], 0)) for part in parts])
            for parts in zip(*rows, strict=True)
        )
        return joined_keys, joined_values

    def fill(self, keys: torch.Tensor, values: torch.Tensor, scores: torch.Tensor) -> None:
        """Hold a whole left-padded prompt, `(batch, kv_heads, tokens, head_dim)`, until `compress`."""
        self.keys, self.values, self.scores = keys, values, scores
        self.is_initialized = True

    def compress(self, lengths: Sequence[int], budgets: Sequence[int]) -> None:
        """Keep what each sequence's budget allows; padding is dropped, and the prompt's own tensors let go."""
        batch, heads, slots = *self.keys.shape[:2], max(budgets)
        keys, values = (part.new_zeros(batch, heads, slots, part.shape[3]) for part in (self.keys, self.values))
        scored, placed = self.evictor.needs_scores, self.needs_positions
        scores = keys.new_zeros((batch, heads, slots) if scored else 0, dtype=torch.float32)
        slot_positions = keys.new_full((batch, heads, slots) if placed else (0,), -1, dtype=torch.int32)
        for row, (length, budget) in enumerate(zip(lengths, budgets, strict=True)):
            row_scores = self.scores[row, :, -length:] if scored else self.scores
            if scored:
                every = torch.arange(length + 1, device=row_scores.device)
                row_scores = self._in_sight(row_scores, every[:-1], every[-1:])
            kept = self._keep(length, budget, row_scores).to(keys.device).expand(heads, -1)
            count = kept.shape[1]
            for buffer, prompt in ((keys, self.keys), (values, self.values)):
                index = kept[..., None].expand(-1, -1, prompt.shape[3])
                # Straight into the buffer: what is kept never exists twice.
                torch.gather(prompt[row, :, -length:], 1, index, out=buffer[row, :, :count])
            if scored:
                scores[row, :, :count] = row_scores.gather(1, kept)
            if placed:
                slot_positions[row, :, :count] = kept
        self.keys, self.values, self.scores, self.slot_positions = keys, values, scores, slot_positions
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
            position = self._keep(before + length, budget, self.scores)[0]  # of each slot
            slots = (position >= before).nonzero()[:, 0]
            index = position[slots] - before - length
            self.keys[row][:, slots] = keys[row][:, index]
            self.values[row][:, slots] = values[row][:, index]
            if self.needs_positions:
                self.slot_positions[row][:, slots] = position[slots].int().to(self.slot_positions.device)

    def past(self, row: int, seen: int, budget: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys and values kept of one sequence's first `seen` tokens, `(kv_heads, kept, head_dim)`, in their order.

        Their positions, `(kept,)`, come third.
        """
        positions, slots = self._keep(seen, budget, self.scores)[0].sort()
        return self.keys[row][:, slots], self.values[row][:, slots], positions.to(self.keys.device)

    def _keep(self, length: int, budget: int, scores: torch.Tensor) -> torch.Tensor:
        """Positions that the evictor keeps of a prompt, `(kv_heads, kept)` or `(1, kept)`; InputError for others."""
        kept, count = self.evictor.keep(length, budget, scores), min(length, budget)
        if self.evictor.built_in:
            return kept
        shapes = [(heads, count) for heads in (self.keys.shape[1], 1)]
        right = isinstance(kept, torch.Tensor) and kept.dtype == torch.long and kept.shape in shapes
        if not right or bool(((kept < 0) | (kept >= length)).any()):
            raise InputError(
                f"keep of the evictor {self.evictor.name} must give positions from 0 to {length - 1}, an int64 tensor "
                f"of shape {shapes[0]} or {shapes[1]}, and gave {_described(kept)}"
            )
        return kept

    def write(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Place a new token per sequence, `(batch, kv_heads, 1, head_dim)`; where there is no room, evict another."""
        batch, heads, _, key_dim = keys.shape
        value_dim = values.shape[3]
        rows = self.rows
        if self.evictor.needs_scores:
            scores = self._in_sight(self.scores, self.slot_positions, self.position[..., None])
            slots = self.evictor.slot(self.position, self.budget, self.slot_positions, scores)
            check_slots(self.evictor, slots, (batch, heads), self.budget)
            rows = rows + slots
        rows = rows.view(-1)
        # Not scatter_, which for 16-bit types goes through a copy of the whole buffer on the CPU.
        self.keys.view(-1, key_dim).index_copy_(0, rows, keys.reshape(-1, key_dim).to(self.keys.dtype))
        self.values.view(-1, value_dim).index_copy_(0, rows, values.reshape(-1, value_dim).to(self.values.dtype))
        if self.evictor.needs_scores:
            self.scores.view(-1).index_fill_(0, rows, 0.0)
        if self.needs_positions:
            self.slot_positions.view(-1).index_copy_(0, rows, self.position.int().expand(batch, heads).reshape(-1))

    def _in_sight(self, scores: torch.Tensor, positions: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        """Scores of tokens: -1, less than any other, of those that the layer's own attention to a query hides."""
        unseen = self.facts.unseen(positions, query)
        return scores if unseen is None else scores.masked_fill(unseen, -1.0)

    def add_scores(self, probabilities: torch.Tensor) -> None:
        """Let scores grow by a step's attention probabilities, `(batch, heads, slots)`: see `_by_cached_head`."""
        self.scores[:, :, : probabilities.shape[2]] += _by_cached_head(probabilities, self.scores.shape[1])

    @property
    def needs_positions(self) -> bool:
        """Whether somebody asks which token lies in a slot: the evictor, or attention that ends at a chunk's edge."""
        return self.evictor.needs_scores or self.facts.chunk is not None

    @property
    def contents(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys, values and scores: what `fill` takes."""
        return self.keys, self.values, self.scores

    @property
    def kv_bytes(self) -> int:
        """Bytes of the key and value tensors."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def state_bytes(self) -> int:
        """Bytes of scores and positions."""
        return self.scores.nbytes + self.slot_positions.nbytes

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: buffers are made by `compress`, when the budgets are known."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        raise ValueError("the sizes of a mask are the cache's: SqueezeCache.get_mask_sizes()")

    def get_seq_length(self) -> int:
        raise ValueError("the logical length is the cache's: SqueezeCache.get_seq_length()")

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # what transformers up to 5.15 calls it


def as_autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors in autocast's dtype, where it is on: in which the model's own attention would multiply them."""
    dtype = autocast_dtype(tensors[0].device)
    return tensors if dtype is None else tuple(tensor.to(dtype) for tensor in tensors)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of autocast; None where it is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def _apart(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy of it where it is a view of something larger."""
    whole = tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)


def _by_cached_head(scores: torch.Tensor, heads: int) -> torch.Tensor:
    """Scores of attention's KV heads, `(batch, more heads, tokens)`, summed for the `heads` of the cache behind them.

    They are the same but in latent attention, where the model makes many heads of one that is cached.
    """
    return scores if scores.numel() == 0 or scores.shape[1] == heads else scores.unflatten(1, (heads, -1)).sum(dim=2)
