"""One layer's part of a SqueezeCache: buffers of keys and values, as long as its budget."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from transformers.cache_utils import CacheLayerMixin

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


class SqueezeLayer(CacheLayerMixin):
    """Keys and values of one layer, and what its evictor remembers about them.

    Attributes:
        keys, values: `(batch, kv_heads, slots, head_dim)`, keys after RoPE at their original positions. A sequence
            holds `min(seen, budget)` tokens, always in the first slots; the buffer is as long as the largest budget.
        scores: H2O's accumulated attention, float32, `(batch, kv_heads, slots)`; no elements for the other evictors.
        slot_positions: of the token in each slot, -1 where it is empty, int32, same shape as `scores`.
        position: that the decode step under way gives each sequence's new token, int64, `(batch, 1)`.
        budget: slots that each sequence owns, `(batch, 1)`.
        lengths: tokens of each sequence after the step, `(batch, 1)`.
        rows: where the step writes in `keys` and `values` seen as `(batch * kv_heads * slots, head_dim)`, int64,
            `(batch, kv_heads)`; with scores only each buffer's first row, to which the evictor adds its slot.
        longest: tokens of the sequence with the most, after the step.
        ragged: whether sequences hold different numbers of tokens.
        kernel: of attention in decode steps, see `decode_kernel`.
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
        self.slot_positions = torch.empty(0, dtype=torch.int32)

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
        slot_positions = torch.full_like(scores, -1, dtype=torch.int32)
        for row, (length, budget) in enumerate(zip(lengths, budgets, strict=True)):
            row_scores = self.scores[row, :, -length:] if scored else self.scores
            kept = self._keep(length, budget, row_scores).to(keys.device).expand(heads, -1)
            index = kept[..., None].expand(-1, -1, head_dim)
            count = kept.shape[1]
            # Straight into the buffer: what is kept never exists twice.
            torch.gather(self.keys[row, :, -length:], 1, index, out=keys[row, :, :count])
            torch.gather(self.values[row, :, -length:], 1, index, out=values[row, :, :count])
            if scored:
                scores[row, :, :count] = row_scores.gather(1, kept)
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
        batch, heads, _, head_dim = keys.shape
        rows = self.rows
        if self.evictor.needs_scores:
            slots = self.evictor.slot(self.position, self.budget, self.slot_positions, self.scores)
            check_slots(self.evictor, slots, (batch, heads), self.budget)
            rows = rows + slots
        rows = rows.view(-1)
        # Not scatter_, which for 16-bit types goes through a copy of the whole buffer on the CPU.
        self.keys.view(-1, head_dim).index_copy_(0, rows, keys.reshape(-1, head_dim).to(self.keys.dtype))
        self.values.view(-1, head_dim).index_copy_(0, rows, values.reshape(-1, head_dim).to(self.values.dtype))
        if self.evictor.needs_scores:
            self.scores.view(-1).index_fill_(0, rows, 0.0)
            self.slot_positions.view(-1).index_copy_(0, rows, self.position.int().expand(batch, heads).reshape(-1))

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

    def update(self, key_states, value_states, *args, **kwargs):
        raise ValueError("a SqueezeCache is used by a model inside `with squeezed(model, config)`, not by others")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        raise ValueError("a SqueezeCache needs no mask: use it with a model inside `with squeezed(model, config)`")

    def get_seq_length(self) -> int:
        raise ValueError("the logical length is the cache's: SqueezeCache.get_seq_length()")

    def get_max_length(self) -> int:
        return -1
