"""A prefill: the pass over prompts while it is under way, what can be kept of it, and its result."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from squeeze.allocations.base import LossCurves
from squeeze.devices import section
from squeeze.engine.layer import SqueezeLayer
from squeeze.importance import similarity


@dataclass(frozen=True)
class PrefillResult:
    """The result of a prefill.

    Args:
        similarities: mean cosine similarity of each layer, `(batch, layers)` float32; None with explicit budgets.
        classes: 1, 2 or 3, `(batch, layers)`; None with explicit budgets.
        budgets: tokens, `(batch, layers)`; None before the first prefill.
        kv_bytes: bytes of all key and value tensors that are left.
        state_bytes: bytes of H2O's scores and positions, or of StreamingLLM's sinks as they came.
        notes: of each sequence, sentences that the user should see, such as that minimum budgets made the total grow.
        shared_seconds: what the prefill took if it was taken over from an earlier one, else 0.
    """

    similarities: np.ndarray | None = None
    classes: np.ndarray | None = None
    budgets: np.ndarray | None = None
    kv_bytes: int = 0
    state_bytes: int = 0
    notes: list[list[str]] = field(default_factory=list)
    shared_seconds: float = 0.0


@dataclass(frozen=True)
class KeptPrefill:
    """A prefill that other configurations can take over, or be forked from: nothing in it depends on budgets.

    Args:
        inputs: token ids, `(batch, tokens)`.
        prompt_lengths: tokens of each sequence, padding excluded.
        attn: prefill attention, as in `SqueezeConfig`.
        layers: keys, values and scores of each, see `SqueezeLayer`.
        similarities: of each layer, `(batch,)` float32; none where they were not measured.
        states: the decoder's output, `(batch, tokens, hidden)`.
        seconds: that the pass took.
    """

    inputs: torch.Tensor
    prompt_lengths: list[int]
    attn: str
    layers: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    similarities: list[torch.Tensor]
    states: torch.Tensor
    seconds: float = 0.0

    @property
    def scored(self) -> bool:
        """Whether it has what evictors need that go by scores."""
        return self.layers[0][2].numel() > 0


@dataclass
class Prefill:
    """The prefill under way: made when prompts come in, gone once their cache is cut or the pass has failed.

    Args:
        layers: of the cache that is filled.
        prompt_lengths: tokens of each sequence, padding excluded.
        columns: tokens of the longest sequence; the others are padded to it on the left.
        window: the model's own sliding window, or None.
        attn: prefill attention, as in `SqueezeConfig`.
        measured: whether similarities are.
        chunk: columns of a chunk; None where the prompts are read in one pass.
        shared: whether the prefill is kept for other configurations, and may be taken over from one that was.
        kept: the prefill that is taken over, and at the end the one to keep.
        losses: loss curves of each sequence, where budgets are made from them, as `_allocate` takes them.
        budgets: tokens, `(layers, batch)`, where they are known before the pass: each layer is cut when it is filled,
            so that no more than one holds the whole prompt at a time.

    Attributes:
        seen, lengths: tokens of each sequence before the present chunk, and in it.
        stream: what entered the layer under way, `(batch, tokens, hidden)`.
        shared_seconds: what the kept prefill took, where it was taken over.
        similarities: of each chunk and layer so far, what its tokens add to the mean: `(batch,)` float32.
    """

    layers: Sequence[SqueezeLayer]
    prompt_lengths: list[int]
    columns: int
    window: int | None
    attn: str
    measured: bool = False
    chunk: int | None = None
    shared: bool = False
    kept: KeptPrefill | None = None
    losses: list[LossCurves] | None = None
    budgets: np.ndarray | None = None
    seen: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    stream: torch.Tensor | None = None
    shared_seconds: float = 0.0
    similarities: list[list[torch.Tensor]] = field(default_factory=list)

    @property
    def needs_scores(self) -> bool:
        return self.layers[0].evictor.needs_scores

    def begin_chunk(self, start: int, end: int) -> None:
        """Take note of the pass over columns `start` to `end`."""
        padding = [self.columns - length for length in self.prompt_lengths]
        self.seen = [max(start - padded, 0) for padded in padding]
        self.lengths = [max(end - padded, 0) - seen for padded, seen in zip(padding, self.seen, strict=True)]
        self.similarities.append([])

    def enter(self, stream: torch.Tensor) -> None:
        """Take note of the residual stream that enters a layer, `(batch, tokens, hidden)`."""
        self.stream = stream if self.measured else None

    def measure(self, stream: torch.Tensor) -> None:
        """Compare it with the residual stream after self-attention, same shape."""
        if self.stream is not None:
            before = self.stream.to(stream.device)
            with section("importance", stream.device):
                self.similarities[-1].append(similarity(before, stream, self.lengths, self.prompt_lengths))
            self.stream = None

    def past(self, index: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None]:
        """Tokens that a layer keeps of earlier chunks, see `SqueezeLayer.past`, by sequence; None of none."""
        for row, seen in enumerate(self.seen):
            known = None if self.budgets is None or not seen else int(self.budgets[index, row])
            yield None if known is None else self.layers[index].past(row, seen, known)

    def fill(self, index: int, keys: torch.Tensor, values: torch.Tensor, scores: torch.Tensor) -> None:
        """Give a layer the prompts or their chunk, as `SqueezeLayer.fill`, and cut it if its budgets are known."""
        layer, budgets = self.layers[index], None if self.budgets is None else self.budgets[index].tolist()
        if budgets is not None and any(self.seen):
            layer.extend(keys, values, self.seen, self.lengths, budgets)
            return
        layer.fill(keys, values, scores)
        if budgets is not None:
            layer.compress(self.lengths, budgets)

    def may_take_over(self, kept: KeptPrefill, inputs: torch.Tensor) -> bool:
        """Whether a prefill of `inputs`, `(batch, tokens)` token ids, would give what `kept` holds."""
        return (
            (kept.prompt_lengths, kept.attn, kept.scored) == (self.prompt_lengths, self.attn, self.needs_scores)
            and (bool(kept.similarities) or not self.measured)
            and torch.equal(kept.inputs, inputs)
        )

    def take_over(self, kept: KeptPrefill) -> None:
        """Fill the layers from a kept prefill, in place of a forward pass."""
        for layer, contents in zip(self.layers, kept.layers, strict=True):
            layer.fill(*contents)
        self.similarities, self.shared_seconds = [kept.similarities], kept.seconds

    def keep(self, inputs: torch.Tensor, states: torch.Tensor, seconds: float) -> None:
        """Keep the pass that has just ended: see `KeptPrefill`."""
        layers = [layer.contents for layer in self.layers]
        self.kept = KeptPrefill(inputs, self.prompt_lengths, self.attn, layers, self.similarities[0], states, seconds)

    def mean_similarities(self) -> np.ndarray | None:
        """Mean cosine similarities over all chunks, `(batch, layers)` float32; None where they are not measured."""
        if not self.measured:
            return None
        by_chunk = torch.stack([torch.stack([values.cpu() for values in chunk]) for chunk in self.similarities])
        return by_chunk.sum(dim=0).T.numpy()
