"""A prefill: the pass over prompts while it is under way, what can be kept of it, and its result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.utils import ModelOutput

from squeeze.allocations.base import LossCurves, Spread
from squeeze.devices import section
from squeeze.engine import states
from squeeze.engine.autocast import autocast_dtype
from squeeze.engine.cache import SqueezeCache
from squeeze.engine.interface import current_cache
from squeeze.engine.passes import Reading
from squeeze.engine.residual import Residual
from squeeze.evictors.base import Future
from squeeze.importance import similarity


@dataclass(frozen=True)
class PrefillResult:
    """The result of a prefill.

    Args:
        similarities: mean cosine similarity of each layer, `(batch, layers)` float32; None with explicit budgets.
        classes: 1, 2 or 3, `(batch, layers)`; None with explicit budgets.
        budgets: tokens, `(batch, layers)`, or where KV heads have their own `(batch, layers, kv_heads)`, 0 where a
            layer has fewer heads than others; None before the first prefill.
        kv_bytes: bytes of all key and value tensors that are left.
        state_bytes: bytes of H2O's scores and positions, or of StreamingLLM's sinks as they came.
        own_bytes: of each sequence, the `kv_bytes` and `state_bytes` that it would have alone.
        notes: of each sequence, sentences that the user should see, such as that minimum budgets made the total grow.
        shared_seconds: that were saved, since the prefill was taken over from an earlier one, or the batch has prompts
            again and again, which were read once.
    """

    similarities: np.ndarray | None = None
    classes: np.ndarray | None = None
    budgets: np.ndarray | None = None
    kv_bytes: int = 0
    state_bytes: int = 0
    own_bytes: list[tuple[float, float]] = field(default_factory=list)
    notes: list[list[str]] = field(default_factory=list)
    shared_seconds: float = 0.0


@dataclass(frozen=True)
class KeptPrefill:
    """A prefill that other configurations can take over, or be forked from: nothing in it depends on budgets.

    Args:
        inputs: token ids, `(batch, tokens)`.
        positions: of the tokens, where they were given.
        autocast: its dtype; None where it was off.
        prompt_lengths: tokens of each sequence, padding excluded.
        attn: prefill attention, as in `SqueezeConfig`.
        observed: the queries that gave the scores, as in `Evictor`.
        layers: keys, values and scores of each attention layer, see `SqueezeLayer`.
        states: of the layers that are no attention, see `squeeze.engine.states`.
        similarities: of each layer, `(batch,)` float32; none where they were not measured.
        spreads: of the attention of how many last queries, and of each layer, `(batch, 2)`; see
            `prefill_attention.spread`.
        output: the decoder's, `(batch, tokens, hidden)`.
        made: the class of the decoder's output.
        seconds: that the pass took.
    """

    inputs: torch.Tensor
    positions: torch.Tensor | None
    autocast: torch.dtype | None
    prompt_lengths: list[int]
    attn: str
    observed: int | Future | None
    layers: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    states: dict[int, dict[str, Any]]
    similarities: list[torch.Tensor]
    spreads: tuple[int, list[torch.Tensor]]
    output: torch.Tensor
    made: Callable[..., ModelOutput]
    seconds: float = 0.0


@dataclass
class Prefill:
    """The prefill under way: made when prompts come in, gone once their cache is cut or the pass has failed.

    Args:
        cache: that is filled; it has begun with the prompts.
        attn: prefill attention, as in `SqueezeConfig`.
        measured: whether similarities are.
        looking: of the prompts' last queries, how many have the spread of their attention measured.
        chunk: columns of a chunk; None where the prompts are read in one pass.
        copies: how many times the batch has the same prompts, one time after the other: they are read once.
        shared: whether the prefill is kept for other configurations, and may be taken over from one that was.
        kept: the prefill that is taken over, and at the end the one to keep.
        losses: loss curves of each sequence, where budgets are made from them, as `_allocate` takes them.
        budgets: of each layer, tokens `(batch, kv_heads)`, where they are known before the pass: each layer is cut
            when it is filled, so that no more than one holds the whole prompt at a time.
        most: of each layer and sequence, tokens that a KV head can hold, where its heads share by scores.

    Attributes:
        lengths: tokens of each sequence in the present chunk.
        streams: what entered the layers under way, `(batch, tokens, hidden)`, by their numbers.
        shared_seconds: that were saved so far, see `PrefillResult`.
        similarities: of each chunk and layer so far, what its tokens add to the mean: `(batch,)` float32.
    """

    cache: SqueezeCache
    attn: str
    measured: bool = False
    looking: int = 0
    chunk: int | None = None
    copies: int = 1
    shared: bool = False
    kept: KeptPrefill | None = None
    losses: Sequence[LossCurves | None] = ()
    budgets: list[np.ndarray] | None = None
    most: list[list[int]] | None = None
    lengths: list[int] = field(default_factory=list)
    streams: dict[int, torch.Tensor] = field(default_factory=dict)
    shared_seconds: float = 0.0
    similarities: list[list[torch.Tensor]] = field(default_factory=list)

    @property
    def prompts(self) -> int:
        """The prompts of the batch, without their copies: its first sequences."""
        return len(self.cache.prompt_lengths) // self.copies

    @property
    def observed(self) -> int | Future | None:
        """The queries that the evictor observes."""
        return self.cache.squeezed[0].evictor.observed

    def begin_chunk(self, start: int, end: int) -> None:
        """Take note of the pass over columns `start` to `end`, and let the layers know."""
        cache = self.cache
        padding = [cache.columns - length for length in cache.prompt_lengths]
        seen = [max(start - padded, 0) for padded in padding]
        self.lengths = [max(end - padded, 0) - before for padded, before in zip(padding, seen, strict=True)]
        self.similarities.append([torch.empty(0)] * len(cache.squeezed) if self.measured else [])
        for index, layer in enumerate(cache.squeezed):
            budgets = None if self.budgets is None else self.budgets[index]
            most = None if self.most is None else self.most[index]
            layer.reading = Reading(seen, self.lengths, budgets, most, self.attn != "eager", self.looking)
        cache.seen = start

    @contextmanager
    def listening(self) -> Iterator[None]:
        """A block in which modules tell how attention changes the residual stream, where that is measured."""
        hooks = []
        for number, layer in enumerate(self.cache.squeezed if self.measured else ()):
            residual = layer.facts.residual
            assert residual is not None
            entering, leaving = partial(self._enter, number), partial(self._leave, number, residual)
            hooks.append(residual.entry.register_forward_pre_hook(entering, with_kwargs=True))
            hooks.append(residual.branch.register_forward_hook(leaving))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hook before attention's norm, or its decoder layer: what it is given is the residual stream."""
        if current_cache() is not self.cache:  # another pass, which a hook has started
            return
        self.streams[number] = args[0] if args else kwargs["hidden_states"]

    def _leave(self, number: int, residual: Residual, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Hook after attention: the stream after it follows from its output, `(batch, tokens, hidden)`."""
        if current_cache() is not self.cache:
            return
        change = output[0] if isinstance(output, tuple) else output
        before = self.streams.pop(number).to(change.device)
        with section("importance", change.device):
            after = _stream_after(residual, before, change)
            self.similarities[-1][number] = similarity(before, after, self.lengths, self.cache.prompt_lengths)

    def may_take_over(self, kept: KeptPrefill, inputs: torch.Tensor, positions: torch.Tensor | None) -> bool:
        """Whether a prefill of `inputs`, `(batch, tokens)` token ids, would give what `kept` holds."""
        lengths = self.cache.prompt_lengths
        if self.copies > 1:
            lengths, inputs = lengths[: self.prompts], inputs[: self.prompts]
            positions = None if positions is None else positions[: self.prompts]
        settings = lengths, self.attn, self.observed, autocast_dtype(inputs.device)
        return (
            (kept.prompt_lengths, kept.attn, kept.observed, kept.autocast) == settings
            and (bool(kept.similarities) or not self.measured)
            and self.looking in (0, kept.spreads[0])
            and torch.equal(kept.inputs, inputs)
            and _alike(kept.positions, positions)
        )

    def take_over(self, kept: KeptPrefill) -> torch.Tensor:
        """Fill the layers from a kept prefill, in place of a forward pass.

        Returns:
            The decoder's output, `(batch, tokens, hidden)`.
        """
        for layer, contents in zip(self.cache.squeezed, kept.layers, strict=True):
            layer.fill(*contents)  # of each prompt once: the layer is cut for all of its copies
        for layer, spread in zip(self.cache.squeezed, kept.spreads[1], strict=True):
            layer.spread = self._of_all(spread)
        rows = [len(self.cache.prompt_lengths)] * len(self.cache.layers)
        states.restore(self.cache.layers, kept.states, None if self.copies == 1 else rows, self.prompts)
        self.similarities = [[self._of_all(one) for one in kept.similarities]]
        self.shared_seconds = kept.seconds * self.copies
        return self._of_all(kept.output)

    def _of_all(self, part: torch.Tensor) -> torch.Tensor:
        """What the prompts have, `(prompts, …)`, for all of their copies."""
        return part.expand(self.copies, *part.shape).flatten(0, 1) if part.numel() else part

    def keep(
        self, inputs: torch.Tensor, positions: torch.Tensor | None, output: ModelOutput, seconds: float
    ) -> KeptPrefill:
        """Keep the pass that has just ended."""
        cache = self.cache
        self.kept = KeptPrefill(
            inputs,
            positions,
            autocast_dtype(inputs.device),
            cache.prompt_lengths,
            self.attn,
            self.observed,
            [layer.contents for layer in cache.squeezed],
            states.copied(cache.layers),
            self.similarities[0],
            (self.looking, [layer.spread for layer in cache.squeezed]),
            output.last_hidden_state,
            type(output),
            seconds,
        )
        return self.kept

    def spreads(self) -> list[Spread] | None:
        """How the last queries of each sequence spread their attention; None where nobody has looked at it."""
        found = [layer.spread for layer in self.cache.squeezed]
        if not self.looking or not all(spread.numel() for spread in found):
            return None
        return [Spread(*of_row) for of_row in torch.stack([spread.cpu() for spread in found], dim=2).numpy()]

    def mean_similarities(self) -> np.ndarray | None:
        """Mean cosine similarities over all chunks, `(batch, layers)` float32; None where they are not measured."""
        if not self.measured:
            return None
        by_chunk = torch.stack([torch.stack([values.cpu() for values in chunk]) for chunk in self.similarities])
        return by_chunk.sum(dim=0).T.numpy()


def _alike(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def _stream_after(residual: Residual, before: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """The residual stream after attention, in the dtype in which the model adds them."""
    if residual.of_branch != 1:
        change = change * residual.of_branch
    return before + change if residual.of_stream else change
