"""SqueezeCache: a transformers Cache whose attention layers each own one buffer, as large as their budgets.

It is the model's own cache with these layers in the place of its own; what is no attention (state space, linear
attention) stays what it is. During prefill a layer holds the whole prompt: until it is filled, where its budgets are
known by then, else until all layers are. What the evictor keeps is then copied into a buffer allocated once; from
there on a new token is written into one slot in place, and nothing is ever concatenated.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.cache_utils import Cache

from squeeze.engine import states
from squeeze.engine.findings import Findings
from squeeze.engine.layer import SqueezeLayer
from squeeze.engine.passes import Seen, Step
from squeeze.engine.schedule import Held, Rows, Schedule
from squeeze.evictors import Evictor


class SqueezeCache(Cache):
    """One `SqueezeLayer` an attention layer, and the sequence lengths that they share.

    Args:
        evictor: which tokens survive.
        findings: what the probe found out about the model.
        max_new_tokens: how many tokens may be generated; no buffer is made for more.

    Attributes:
        layers: all of the model's cache, in its own order.
        squeezed: those of them that are squeezed.
        by_module: the layer that an attention module attends to.
        owner: the model that the cache was made for, and the evictor of its run then.
        whole: whether the prompt is only to be read, and never cut (`SqueezedModel.prefill`).
        whole_buffers: whether decode steps attend to empty slots, too, and mask them: then shapes stay what they are,
            and a compiled step is compiled once.
        graph: its steps as one CUDA graph, a `squeeze.engine.graph.GraphedStep`; None: kernel by kernel.
        prompt_lengths: tokens of each sequence's prompt, padding excluded.
        columns: tokens of the longest prompt, to which the others are padded on the left.
        budgets: of each layer, tokens `(batch, kv_heads)`; none until every layer is cut.
        compressed: whether every layer is cut, and decode steps can follow.
        steps: decode steps so far.
        seen: columns of the prompts that are read already, while they are read in chunks.
        broken: whether one has failed in the middle: some layers hold its token then, and others do not.
    """

    squeezed: list[SqueezeLayer]
    by_module: dict[nn.Module, SqueezeLayer]

    def __init__(self, evictor: Evictor, findings: Findings, max_new_tokens: int):
        super().__init__(layers=[])
        self.findings = findings
        self._make_layers(evictor)
        self.owner: tuple[Any, Evictor] = None, evictor
        self.whole = self.whole_buffers = False
        self.graph: Any = None
        self.max_new_tokens = max_new_tokens
        self.prompt_lengths: list[int] = []
        self.columns = 0
        self.budgets: list[np.ndarray] = []
        self.schedules: list[Schedule] = []
        self.compressed = False
        self.steps = 0
        self.broken = False
        self.seen = 0

    def _make_layers(self, evictor: Evictor) -> None:
        self.layers = states.own_layers(self.findings)
        self.squeezed, self.by_module = [], {}
        for facts in self.findings.layers:
            layer = states.squeeze_layer(evictor, facts, self.layers[facts.index])
            self.layers[facts.index] = layer
            self.squeezed.append(layer)
            self.by_module |= dict.fromkeys(facts.users, layer)

    def begin(self, batch: int, columns: int, attention_mask: torch.Tensor | None) -> None:
        """Take note of prompts, `(batch, columns)`, before they are read.

        Raises:
            ValueError: right padding, or an empty sequence.
        """
        self.columns = columns
        self.prompt_lengths = _prompt_lengths(batch, columns, attention_mask)

    def compress(self, budgets: Sequence[np.ndarray], most: Sequence[Sequence[int]] | None = None) -> None:
        """Cut every layer to its budgets, `(sequences, kv_heads)` tokens: decode steps can follow.

        A layer may hold fewer sequences than the batch has, the first ones.

        Args:
            most: see `SqueezeLayer.compress`.
        """
        for index, (layer, own) in enumerate(zip(self.squeezed, budgets, strict=True)):
            layer.compress(self.prompt_lengths[: len(own)], own, None if most is None else most[index])
        self.end_prefill()

    def end_prefill(self) -> None:
        """Take note that every layer was cut to its budgets: decode steps can follow."""
        self.budgets = [layer.layout.budgets for layer in self.squeezed]
        for layer in self.squeezed:
            layer.reading = None
        alike: dict[tuple[Any, ...], list[SqueezeLayer]] = {}
        for layer in self.squeezed:
            shapes = layer.layout.batch, layer.layout.heads, layer.keys.shape[1], layer.values.shape[1]
            alike.setdefault((layer.keys.device, *shapes, id(layer.facts.rotation)), []).append(layer)
        self.schedules = [Schedule(layers, self.prompt_lengths) for layers in alike.values()]
        self.rows = Rows([layer.layout for layer in self.squeezed])
        self.compressed = True

    def forget(self) -> None:
        """Let go of a prompt whose prefill has failed: it can be read again."""
        self._make_layers(self.squeezed[0].evictor)
        self.schedules, self.compressed, self.seen = [], False, 0

    @contextmanager
    def step(self, batch: int) -> Iterator[None]:
        """A decode step of one token for each sequence, whose pass over the layers runs inside the block.

        Raises:
            ValueError: an earlier step failed, or the cache was made for fewer sequences or tokens.
        """
        held = self.held(batch)
        with self.counted():
            self.begin_step(held)
            yield

    def held(self, batch: int) -> Held:
        """What the next step finds, worked out on the host, for which no step waits. Raises as `step` does."""
        self._check_step(batch)
        return self.rows.held(self._seen(), self.whole_buffers, self.graph is not None)

    def begin_step(self, held: Held) -> None:
        """Tell the layers what they do in the step that begins."""
        for layer, step, seen in self._next_step(held):
            layer.begin(step, seen)

    @contextmanager
    def counted(self) -> Iterator[None]:
        """A block in which a step is done: until its end the lengths are those before it, which positions are
        derived from."""
        self.broken = True  # until the last layer has run
        yield
        self.steps += 1
        self.broken = False

    @property
    def takes_several(self) -> bool:
        """Whether a pass may bring several tokens, which each layer takes in one by one, as single steps would.

        Not where something else than this cache remembers tokens, or makes keys of what is cached.
        """
        facts = [layer.facts for layer in self.squeezed]
        plain = all(one.interface and one.as_cached and len(one.users) == 1 for one in facts)
        alone = len(self.layers) == len(facts) and not any(one.hybrid or one.regrouped for one in facts)
        late = any(schedule.sinks_come_late for schedule in self.schedules)
        return plain and alone and not late and not self.whole_buffers

    @contextmanager
    def several(self, batch: int, tokens: int) -> Iterator[None]:
        """A pass that brings several tokens of each sequence, inside the block; see `step`."""
        self._check_step(batch)
        before = self.steps
        for layer in self.squeezed:
            layer.following = []
        for _ in range(tokens):
            for layer, step, seen in self._next_step(self.rows.held(self._seen(), self.whole_buffers)):
                layer.following.append((step, seen))
            self.steps += 1
        self.steps, self.broken = before, True
        yield
        for layer in self.squeezed:
            layer.following = []
        self.steps, self.broken = before + tokens, False

    def _check_step(self, batch: int) -> None:
        if self.broken:
            raise ValueError("a step on this cache has failed in the middle: read the prompt again with a new cache")
        if batch != len(self.prompt_lengths):
            raise ValueError(f"the cache holds {len(self.prompt_lengths)} sequences, got a batch of {batch}")
        if self.steps >= self.max_new_tokens:
            raise ValueError(f"the cache was made for {self.max_new_tokens} new tokens, and they are used up")

    def copy(self) -> SqueezeCache:
        """A cache that goes on by itself from here, such as for one of several questions on a text.

        Raises:
            ValueError: there is no cut prompt in it, or a step on it has failed.
        """
        if not self.compressed or self.broken:
            raise ValueError("only a cache whose prompt is cut, and on which no step has failed, can be copied")
        other = copy.copy(self)
        made = {layer: layer.copy() for layer in self.squeezed}
        kept = states.copied(self.layers)
        other.layers = [made.get(layer, copy.copy(layer)) for layer in self.layers]
        states.restore(other.layers, kept)
        other.squeezed = [made[layer] for layer in self.squeezed]
        other.by_module = {module: made[layer] for module, layer in self.by_module.items()}
        other.graph = None if self.graph is None else self.graph.of_a_copy()
        other.schedules = [schedule.of([made[layer] for layer in schedule.layers]) for schedule in self.schedules]
        return other

    def _seen(self) -> np.ndarray:
        """Tokens that each sequence has seen, the next step's included."""
        return np.array(self.prompt_lengths) + self.steps + 1

    def _next_step(self, held: Held) -> Iterator[tuple[SqueezeLayer, Step, list[Seen]]]:
        """What each layer does in the next step."""
        attended = dict(zip(self.squeezed, held.seen, strict=True))
        for schedule in self.schedules:
            for layer, step in zip(schedule.layers, schedule.advance(held.evicting), strict=True):
                yield layer, step, attended[layer]

    @property
    def kv_bytes(self) -> int:
        """Bytes of all key and value tensors."""
        return sum(layer.kv_bytes for layer in self.squeezed)

    @property
    def state_bytes(self) -> int:
        """Bytes of all scores and positions (H2O), and of the sinks as they came (StreamingLLM)."""
        return sum(layer.state_bytes for layer in self.squeezed) + sum(part.state_bytes for part in self.schedules)

    def own_bytes(self) -> list[tuple[float, float]]:
        """Bytes of keys and values, and of states, that each sequence would have alone."""
        batch = len(self.prompt_lengths)
        found: list[tuple[float, float]] = []
        for row in range(batch):
            slots = [layer.layout.alone(row).slots for layer in self.squeezed]
            pairs = list(zip(self.squeezed, slots, strict=True))
            keys_values = sum(layer.kv_bytes // layer.layout.slots * count for layer, count in pairs)
            states = sum(layer.state_bytes // layer.layout.slots * count for layer, count in pairs)
            found.append((keys_values, states + sum(part.state_bytes for part in self.schedules) / batch))
        return found

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, padding included: what positions and masks are counted by, not what is held."""
        return self.columns + self.steps if self.compressed else self.seen

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Tokens that a mask is made for, and the first of them: asked where a model makes its own."""
        return self.get_seq_length() + query_length, 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        raise ValueError("beam search is not supported with a squeezed cache: use greedy decoding or sampling")

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError("assisted decoding is not supported with a squeezed cache: evicted tokens cannot come back")

    batch_repeat_interleave = batch_select_indices = reorder_cache


def _prompt_lengths(batch: int, columns: int, attention_mask: torch.Tensor | None) -> list[int]:
    """Tokens of each sequence that are no padding; `attention_mask` is `(batch, columns)`."""
    if columns == 0:
        raise ValueError("the prompt has no tokens: nothing can follow it")
    if attention_mask is None:
        return [columns] * batch
    if attention_mask.shape != (batch, columns):
        raise ValueError(f"attention_mask must have shape {(batch, columns)}, got {tuple(attention_mask.shape)}")
    mask = attention_mask.bool()
    lengths = mask.sum(dim=1).tolist()
    if 0 in lengths:
        raise ValueError(f"sequence {lengths.index(0)} of the batch is empty: leave it out, nothing can follow it")
    if (mask[:, :-1] & ~mask[:, 1:]).any():
        raise ValueError("prompts of different lengths must be padded on the left (tokenizer.padding_side = 'left')")
    return lengths
