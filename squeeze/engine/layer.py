"""One attention layer's part of a SqueezeCache: flat buffers of keys and values, as long as its budgets.

A model calls `update` with the keys and values of each forward pass, as it does on any cache of transformers, and
hands what it returns to its attention function (`squeeze.engine.interface`).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from transformers.cache_utils import CacheLayerMixin

from squeeze.engine.adakv import shared
from squeeze.engine.asked import kept_of, scores_of, slots_of
from squeeze.engine.autocast import as_autocast
from squeeze.engine.findings import AttentionLayer
from squeeze.engine.kernels import decode_kernel
from squeeze.engine.layout import Group, Layout
from squeeze.engine.passes import Reading, Seen, Step
from squeeze.evictors.base import Evictor, Tokens


class SqueezeLayer(CacheLayerMixin):
    """Keys and values of one attention layer, and what its evictor remembers about them.

    Args:
        evictor: which tokens survive.
        facts: what the probe found out about the layer.

    Attributes:
        keys, values: `(slots, head_dim)`, keys after RoPE at their original positions; where each row lies, one KV
            head of one sequence, says `layout`. A row holds `min(seen, budget)` tokens, always in its first slots.
            While a prompt is read they are all of its tokens, left-padded, `(batch, kv_heads, tokens, head_dim)`.
            Latent attention keeps two parts of another width in their places.
        scores: of tokens, float32, `(slots,)`, for evictors that hold them; no elements for others. While a prompt is
            read the attention that was observed, `(batch, kv_heads, tokens)`.
        slot_positions: of the token in each slot, -1 where it is empty, int32, `(slots,)`; no elements where nobody
            asks for them.
        heads: a number of each row's KV head that no other in the model has, `(rows, 1)`; no elements where nobody
            asks for it.
        layout: of the rows, once the layer is cut to its budgets.
        bounds: first slots of the rows in that order, and the end, int32, `(rows + 1,)`.
        order: numbers of the rows as they lie in the buffers, `(rows,)`; None: sequence by sequence, head by head.
        shared: whether other attention modules look at the layer as well (Gemma 3n).
        reading: the prompts under way; None in decode steps.
        pending: keys and values of the pass, between `update` and `take`.
        spread: entropy and variance of the attention that was looked at, `(batch, 2)`; no elements where none was.
        places: of each sequence, the positions of the keys that `update` has returned, `(keys,)`, for some heads after
            the others.
        position: that the decode step under way gives the new token of each row's sequence, int64, `(rows, 1)`; here
            and below rows are in the buffers' order.
        budget: slots that each row owns, `(rows, 1)`.
        lengths: tokens of each row after the step, `(rows, 1)`.
        rows: where the step writes in `keys` and `values`, int64, `(rows,)`; with scores only each row's first slot,
            to which the evictor adds its own.
        seen: what the step attends to, group by group.
        kernel: of attention in decode steps, see `decode_kernel`.
        following: steps of the pass under way, and what each attends to, where it brings several tokens: attention
            takes them in one by one.
    """

    is_compileable = False
    keys: torch.Tensor
    values: torch.Tensor
    position: torch.Tensor
    budget: torch.Tensor
    lengths: torch.Tensor
    rows: torch.Tensor
    seen: list[Seen]
    layout: Layout
    bounds: torch.Tensor
    heads: torch.Tensor
    kernel: str

    def __init__(self, evictor: Evictor, facts: AttentionLayer):
        super().__init__()
        self.evictor, self.facts = evictor, facts
        self.shared = len(facts.users) > 1
        self.scores = torch.empty(0)
        self.slot_positions = torch.empty(0, dtype=torch.int32)
        self.reading: Reading | None = None
        self.pending: tuple[torch.Tensor, torch.Tensor] | None = None
        self.spread = torch.empty(0)
        self.places: list[list[tuple[int, torch.Tensor]]] = []
        self.order: torch.Tensor | None = None
        self.following: list[tuple[Step, list[Seen]]] = []

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """Take the keys and values of a forward pass, and return those to attend to.

        Args:
            keys, values: `(batch, kv_heads, tokens, head_dim)`, left-padded; one token in a decode step.
        Returns:
            The slots that are attended to in a decode step, or as much as was given where attention must look them up
            by itself (`apart`), or takes several in; the prompt, or what is kept of it and its next chunk.
        """
        keys, values = as_autocast(keys.detach(), values.detach())
        if self.following:
            return keys, values
        if self.reading is None:
            return self.take_in(keys, values)
        # Copies, where they are a part of a larger product that would stay in memory with them.
        self.pending = _owned(keys), values.contiguous()
        return self._with_past(*self.pending)

    def begin(self, step: Step, seen: list[Seen]) -> None:
        """Take note of a decode step, and of what it attends to."""
        self.position, self.budget, self.lengths, self.rows, sinks = step
        self.seen = seen
        if sinks is not None:
            assert self.facts.rotation is not None
            getattr(self, self.facts.rotation.part).index_copy_(0, *sinks)

    def take_in(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Place the new tokens of a decode step, and return what attention is given: see `update`."""
        self.write(keys, values)
        return (keys, values) if self.apart else (self.padded(self.keys), self.padded(self.values))

    def take(self, scores: torch.Tensor) -> None:
        """Hold what `update` was given, now that it has been attended to, and cut it if its budgets are known.

        Args:
            scores: attention that the evictor observes, to the prompt's tokens, `(batch, heads, tokens)` float32.
        """
        assert self.reading is not None and self.pending is not None
        (keys, values), self.pending = self.pending, None
        seen, lengths, budgets = self.reading.seen, self.reading.lengths, self.reading.budgets
        if budgets is not None and any(seen):
            self.extend(keys, values, seen, lengths)
            return
        self.fill(keys, values, _by_cached_head(scores, keys.shape[1]))
        if budgets is not None:
            self.compress(lengths, budgets, self.reading.most)

    def _with_past(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A chunk, after what is kept of earlier ones where there is any, left-padded; notes `places`."""
        assert self.reading is not None
        seen, lengths, budgets = self.reading.seen, self.reading.lengths, self.reading.budgets
        own = [
            torch.arange(before, before + count, device=keys.device)
            for before, count in zip(seen, lengths, strict=True)
        ]
        self.places = [[(keys.shape[1], positions)] for positions in own]
        if not any(seen):
            return keys, values
        assert budgets is not None, "a chunk needs budgets that are known before it"
        past: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in seen]
        for row, (before, positions) in enumerate(zip(seen, own, strict=True)):
            if not before:
                continue
            self.places[row] = []
            for piece, budget in self.layout.pieces(row):
                kept_keys, kept_values, kept_positions = self.past(piece, before, budget)
                past[row].append((kept_keys, kept_values))
                self.places[row].append((piece.rows, torch.cat([kept_positions, positions])))
        longest = max(len(positions) for places in self.places for _, positions in places)
        joined = []
        for which, part in enumerate((keys, values)):
            whole = part.new_zeros(*part.shape[:2], longest, part.shape[3])
            for row, count in enumerate(lengths):
                whole[row, :, longest - count :] = part[row, :, part.shape[2] - count :]
                head = 0
                for kept_parts in past[row]:
                    kept = kept_parts[which]
                    heads, tokens = kept.shape[:2]
                    whole[row, head : head + heads, longest - count - tokens : longest - count] = kept
                    head += heads
            joined.append(whole)
        return joined[0], joined[1]

    def copy(self) -> SqueezeLayer:
        """The layer, with buffers of its own."""
        other = copy.copy(self)
        for name in ("keys", "values", "scores", "slot_positions"):
            setattr(other, name, getattr(self, name).clone())
        return other

    def fill(self, keys: torch.Tensor, values: torch.Tensor, scores: torch.Tensor) -> None:
        """Hold whole left-padded prompts, `(prompts, kv_heads, tokens, head_dim)`, until `compress`."""
        self.keys, self.values, self.scores = keys, values, scores
        self.is_initialized = True

    def compress(self, lengths: Sequence[int], budgets: np.ndarray, most: Sequence[int] | None = None) -> None:
        """Keep what budgets `(batch, kv_heads)` allow; padding is dropped, and the prompts' own tensors let go.

        The batch may have the prompts that the layer was filled with again and again, each time with other budgets.

        Args:
            lengths: tokens of each sequence.
            most: of each sequence, tokens that a head can hold, where its heads share what budgets give them by the
                scores of the prompt (`squeeze.engine.adakv`); None: they keep to the budgets.
        """
        prompts = len(self.keys)
        of_prompts = self._prompt_scores(lengths[:prompts])
        if most is not None:
            least, given = self.evictor.minimum_budget, enumerate(zip(budgets[:, 0].tolist(), most, strict=True))
            budgets = np.array(
                [shared(of_prompts[row % prompts], budget, min(least, cap), cap) for row, (budget, cap) in given]
            )
        self.layout = layout = Layout(budgets)
        slots, device = layout.slots, self.keys.device
        keys, values = (part.new_zeros(slots, part.shape[3]) for part in (self.keys, self.values))
        scored, placed = self.holds_scores, self.needs_positions
        scores = keys.new_zeros(slots if scored else 0, dtype=torch.float32)
        slot_positions = keys.new_full((slots if placed else 0,), -1, dtype=torch.int32)
        for row, length in enumerate(lengths):
            for piece, budget in layout.pieces(row):
                piece_scores = piece.part(of_prompts[row % prompts]) if of_prompts else self.scores
                kept = kept_of(self.evictor, length, budget, piece_scores, piece.rows)
                kept = kept.to(device).expand(piece.rows, -1)
                count = kept.shape[1]
                for buffer, prompt in ((keys, self.keys), (values, self.values)):
                    index = kept[..., None].expand(-1, -1, prompt.shape[3])
                    # Straight into the buffer: what is kept never exists twice.
                    own = piece.part(prompt[row % prompts, :, -length:])
                    torch.gather(own, 1, index, out=piece.view(buffer)[:, :count])
                if scored:
                    piece.view(scores)[:, :count] = piece_scores.gather(1, kept)
                if placed:
                    piece.view(slot_positions)[:, :count] = kept
        self.keys, self.values, self.scores, self.slot_positions = keys, values, scores, slot_positions
        self.order = None if layout.in_order else torch.from_numpy(layout.order).to(device)
        self.bounds = torch.tensor([*layout.first, slots], dtype=torch.int32, device=device)
        self.heads = self._head_numbers(torch.from_numpy(layout.order % layout.heads).to(device))
        self.kernel = decode_kernel(device, keys.dtype, self.evictor.watches)

    def _prompt_scores(self, lengths: Sequence[int]) -> list[torch.Tensor]:
        """Scores of each prompt's tokens, `(kv_heads, length)`; none where the evictor has none."""
        if not self.evictor.scores_prompts:
            return []
        heads, device = self.keys.shape[1], self.keys.device
        numbers, found = self._head_numbers(torch.arange(heads, device=device)), []
        for row, length in enumerate(lengths):
            places = torch.arange(length + 1, device=device)
            keys, values = (part[row, :, -length:] for part in (self.keys, self.values))
            observed = self._agreed(self.scores[row, :, -length:]) if self.scores.numel() else keys.new_zeros(heads, 0)
            tokens = Tokens(places[:-1].expand(heads, -1), numbers, keys, values, observed)
            found.append(self._in_sight(scores_of(self.evictor, tokens), places[:-1], places[-1:]))
        return found

    def extend(self, keys: torch.Tensor, values: torch.Tensor, seen: Sequence[int], lengths: Sequence[int]) -> None:
        """Keep what the budgets allow of a prompt's next chunk; for evictors that need no scores.

        A token's slot is the same however long the prompt has become, so what stays needs not be moved.

        Args:
            keys, values: `(batch, kv_heads, tokens, head_dim)`, left-padded.
            seen: tokens of each sequence that came before these.
            lengths: tokens of each sequence, 0 where it has not begun.
        """
        for row, (before, length) in enumerate(zip(seen, lengths, strict=True)):
            for piece, budget in self.layout.pieces(row):
                position = kept_of(self.evictor, before + length, budget, self.scores, piece.rows)[0]  # of each slot
                slots = (position >= before).nonzero()[:, 0]
                index = position[slots] - before - length
                piece.view(self.keys)[:, slots] = piece.part(keys[row])[:, index]
                piece.view(self.values)[:, slots] = piece.part(values[row])[:, index]
                if self.needs_positions:
                    own = position[slots].int().to(self.slot_positions.device)
                    piece.view(self.slot_positions)[:, slots] = own

    def past(self, piece: Group, seen: int, budget: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys and values that some heads keep of a sequence's first `seen` tokens, `(heads, kept, head_dim)`.

        They are in the tokens' order; their positions, `(kept,)`, come third.
        """
        positions, slots = kept_of(self.evictor, seen, budget, self.scores, piece.rows)[0].sort()
        keys, values = (piece.view(part)[:, slots] for part in (self.keys, self.values))
        return keys, values, positions.to(self.keys.device)

    def write(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Place a new token per row, `(batch, kv_heads, 1, head_dim)`; where there is no room, evict another."""
        rows = self.rows
        if self.evictor.needs_scores:
            evicted = [self._slots(group) for group in self.layout.groups]
            rows = rows + (evicted[0] if len(evicted) == 1 else torch.cat(evicted))
        # Not scatter_, which for 16-bit types goes through a copy of the whole buffer on the CPU.
        self.keys.index_copy_(0, rows, self.arranged(keys.flatten(0, 2)).to(self.keys.dtype))
        self.values.index_copy_(0, rows, self.arranged(values.flatten(0, 2)).to(self.values.dtype))
        if self.holds_scores:
            self.scores.index_copy_(0, rows, self._new_scores(rows))
        if self.needs_positions:
            self.slot_positions.index_copy_(0, rows, self.position[:, 0].int())

    def _new_scores(self, rows: torch.Tensor) -> torch.Tensor:
        """Scores of the tokens that have just been written into these slots: `(rows,)`."""
        if self.evictor.updates != "fixed":
            return self.scores.new_zeros(len(rows))
        keys, values = (part.index_select(0, rows).unsqueeze(1) for part in (self.keys, self.values))
        tokens = Tokens(self.position, self.heads, keys, values, keys.new_zeros(len(rows), 0))
        return scores_of(self.evictor, tokens)[:, 0]

    def _slots(self, group: Group) -> torch.Tensor:
        """Slots that the evictor chooses for the new tokens of a group, each counted from its row's first: `(rows,)`.

        To the evictor a row is a sequence with one KV head.
        """
        position, budget = group.part(self.position), group.part(self.budget)
        held = group.view(self.slot_positions).unsqueeze(1)
        if self.holds_scores:
            scores = group.view(self.scores).unsqueeze(1)
        else:
            keys, values, places = (group.view(part) for part in (self.keys, self.values, self.slot_positions))
            nothing = keys.new_zeros(group.rows, 0)
            tokens = Tokens(places.long(), group.part(self.heads), keys, values, nothing)
            scores = scores_of(self.evictor, tokens).unsqueeze(1)
        scores = self._in_sight(scores, held, position.unsqueeze(2))
        return slots_of(self.evictor, position, budget, held, scores)[:, 0]

    @property
    def apart(self) -> bool:
        """Whether rows must be attended to group by group, and attention is given no more than the new tokens."""
        return self.facts.as_cached and not self.layout.alike

    def arranged(self, rows: torch.Tensor) -> torch.Tensor:
        """`(rows, …)`, given sequence by sequence and head by head, in the buffers' order."""
        return rows if self.order is None else rows.index_select(0, self.order)

    def restored(self, rows: torch.Tensor) -> torch.Tensor:
        """`(rows, …)`, given in the buffers' order, sequence by sequence and head by head."""
        return rows if self.order is None else torch.empty_like(rows).index_copy_(0, self.order, rows)

    def padded(self, buffer: torch.Tensor) -> torch.Tensor:
        """The slots that a step attends to, `(batch, kv_heads, longest, …)`; a copy unless all rows are alike.

        A row that is shorter repeats its last slot; `empty` tells which are there.
        """
        if self.layout.alike:
            longest = self.seen[0].longest
            rows = buffer.view(self.layout.batch, self.layout.heads, -1, *buffer.shape[1:])
            return rows if longest is None else rows.narrow(2, 0, longest)
        return buffer[self._padded_slots()]

    @property
    def padded_length(self) -> int:
        """Slots of `padded`."""
        return max(seen.group.slots if seen.longest is None else seen.longest for seen in self.seen)

    def _padded_slots(self) -> torch.Tensor:
        """Slots in the buffer, `(batch, kv_heads, longest)`, of `padded`."""
        shape = self.layout.batch, self.layout.heads, 1
        starts, budgets = (self.restored(rows).view(shape) for rows in (self.bounds[:-1], self.budget))
        return starts + torch.minimum(torch.arange(self.padded_length, device=starts.device), budgets - 1)

    def empty(self, slots: int) -> torch.Tensor:
        """Mask of `padded`'s slots that hold no token, `(batch, kv_heads, slots)`."""
        lengths = self.restored(self.lengths).view(self.layout.batch, self.layout.heads)
        return torch.arange(slots, device=lengths.device) >= lengths[..., None]

    def _in_sight(self, scores: torch.Tensor, positions: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        """Scores of tokens: -1, less than any other, of those that the layer's own attention to a query hides."""
        unseen = self.facts.unseen(positions, query)
        return scores if unseen is None else scores.masked_fill(unseen, -1.0)

    def watch(self, probabilities: torch.Tensor) -> None:
        """Update scores by a step's probabilities over `padded`, `(batch, heads, slots)`: see `_by_cached_head`."""
        probabilities = self._agreed(_by_cached_head(probabilities, self.layout.heads))
        if self.evictor.updates == "replace":
            self.scores.zero_()
        if self.layout.alike:
            self.padded(self.scores).add_(probabilities)
        else:  # 0 where a slot is a repeated one
            self.scores.index_add_(0, self._padded_slots().flatten(), probabilities.flatten())

    def watch_group(self, seen: Seen, probabilities: torch.Tensor) -> None:
        """Update scores of a group by a step's probabilities, `(rows, slots)`."""
        if self.evictor.heads_agree:  # which have one budget: a sequence's rows are neighbours
            probabilities = self._agreed(probabilities.unflatten(0, (-1, self.layout.heads))).flatten(0, 1)
        scores = seen.view(self.scores)
        scores.copy_(probabilities) if self.evictor.updates == "replace" else scores.add_(probabilities)

    def _agreed(self, attention: torch.Tensor) -> torch.Tensor:
        """Attention to tokens, `(…, kv_heads, tokens)`: of methods whose heads agree, each head's is the mean."""
        if not self.evictor.heads_agree:
            return attention
        return attention.mean(dim=-2, keepdim=True).expand_as(attention)

    def _head_numbers(self, heads: torch.Tensor) -> torch.Tensor:
        """Of heads of this layer, `(rows,)`, what `heads` says; no elements where the evictor scores no tokens."""
        return (heads + (self.facts.index << 16))[:, None] if self.evictor.scores_prompts else heads[:0]

    @property
    def holds_scores(self) -> bool:
        """Whether scores of the tokens held are kept from step to step."""
        return self.evictor.needs_scores and self.evictor.updates != "anew"

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


def _owned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy of it where it is a view of something larger."""
    whole = tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)


def _by_cached_head(scores: torch.Tensor, heads: int) -> torch.Tensor:
    """Scores of attention's KV heads, `(batch, more heads, tokens)`, summed for the `heads` of the cache behind them.

    They are the same but in latent attention, where the model makes many heads of one that is cached.
    """
    return scores if scores.numel() == 0 or scores.shape[1] == heads else scores.unflatten(1, (heads, -1)).sum(dim=2)
