"""A model and its configuration: the budgets of every prefill, and prefills that several configurations share.

Of the model it knows what the probe found out; `patch.py` makes its forward passes tell of themselves.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np
import torch
from transformers import Cache, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from squeeze.allocations.base import Budgets, LossCurves, PromptFacts, check_budgets, heads_of
from squeeze.allocations.explicit import Explicit
from squeeze.compatibility import cache_argument, check_transformers
from squeeze.config import SqueezeConfig, default_algorithm
from squeeze.devices import input_device, section
from squeeze.engine import loss_curves, states
from squeeze.engine.cache import SqueezeCache
from squeeze.engine.findings import AttentionLayer, squeezable
from squeeze.engine.graph import GraphedStep, Recorder, check_device
from squeeze.engine.interface import NAME
from squeeze.engine.layout import by_layer, by_sequence
from squeeze.engine.prefill import KeptPrefill, Prefill, PrefillResult
from squeeze.engine.probe import probe
from squeeze.errors import InputError
from squeeze.evictors import Evictor
from squeeze.models.rope import LengthwiseRope, depends_on_length
from squeeze.numbers import whole_number


class SqueezedModel:
    """A model whose `generate` keeps a squeezed cache, and the result of its last prefill.

    Attributes:
        configs: the configuration, its algorithm filled in; or several, each for an equal part of a batch.
        config: the first of them: in what it says beside budgets, all agree.
        evictor: of the configuration's algorithm.
        findings: what the probe found out about the model.
        decoder_arguments: names of what its decoder's forward pass takes, in order.
        ropes: the angles of a model whose RoPE depends on the length of a sequence; none of others.
        recorder: of decode steps as CUDA graphs, where the configuration asks for them.
        lock: held by a forward pass; threads that use the model take turns by it.
        share_prefills: keep the last prefill, all of its keys and values, for other configurations on the same prompts
            (`use`); what they give is the same as without.
        kept_prefill: the prefill that is kept, between two passes.
        last: the result of the last prefill; `similarities`, `classes`, `budgets`, `kv_bytes`, `own_bytes`,
            `state_bytes`, `notes` and `shared_seconds` read it.
    """

    def __init__(self, model: PreTrainedModel, config: SqueezeConfig):
        check_transformers()
        self.model, self.findings = model, probe(model)
        self.decoder_arguments = tuple(inspect.signature(type(self.findings.decoder).forward).parameters)[1:]
        self.lock = threading.RLock()
        self.ropes: list[LengthwiseRope] = []
        self.compiled = config.compile
        self.self_check: Callable[[bool], None] | None = None  # once the model is patched
        self.use(config)
        self.share_prefills = False
        self.kept_prefill: KeptPrefill | None = None
        self.last = PrefillResult()

    # Of the last prefill: see `PrefillResult`.
    similarities = property(lambda self: self.last.similarities)
    classes = property(lambda self: self.last.classes)
    budgets = property(lambda self: self.last.budgets)
    kv_bytes = property(lambda self: self.last.kv_bytes)
    own_bytes = property(lambda self: self.last.own_bytes)
    state_bytes = property(lambda self: self.last.state_bytes)
    notes = property(lambda self: self.last.notes)
    shared_seconds = property(lambda self: self.last.shared_seconds)

    @property
    def layers(self) -> tuple[AttentionLayer, ...]:
        """The attention layers with a cache of their own: those that have budgets."""
        return self.findings.layers

    @property
    def kv_heads(self) -> list[int]:
        """KV heads of each of these layers."""
        return [layer.kv_heads for layer in self.layers]

    @property
    def attention(self) -> str | None:
        """The attention function of a pass on a squeezed cache; None: the one that the model has."""
        if all(layer.interface for layer in self.layers):
            return NAME
        # Eager attention alone gives probabilities.
        return "eager" if self.evictor.observed != 0 or self.evictor.watches else None

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise ValueError("a squeezed model cannot be copied or pickled: leave the `with squeezed(...)` block first")

    def use(self, *configs: SqueezeConfig) -> None:
        """Go on with another configuration, from the next prompt on; or with several, from the next batch on, of which
        each configuration has an equal part, one after the other. What every part has is prefilled once: one prompt,
        or the same prompts in the same order.

        Raises:
            InputError: one does not fit the model, or they do not agree in what a batch has in common.
            ValueError: one is to be compiled and the first one was not, or the reverse.
        """
        checked = [self._checked(config) for config in configs]
        first, evictor = checked[0][0], checked[0][0].evictor
        for name in ("evictor", "per", "attn", "cuda_graph", "prefill_chunk"):
            if any(getattr(config, name) != getattr(first, name) for config, _ in checked):
                raise InputError(f"the configurations of one batch must agree in {name}, and these do not")
        if len({config.allocator.observed for config, _ in checked} - {0}) > 1:
            raise InputError("the allocations of one batch must look at the attention of as many queries each")
        with self.lock:  # nothing is changed by a configuration that is refused
            if self.self_check is not None:
                self.self_check(evictor.observed is None)
            self.configs, self.config, self.evictor = [config for config, _ in checked], first, evictor
            self.per_head = any(per_head for _, per_head in checked)
            self.recorder = Recorder(self.model.device)

    def _checked(self, config: SqueezeConfig) -> tuple[SqueezeConfig, bool]:
        """A configuration, its algorithm filled in, and whether it has budgets of KV heads; see `use`."""
        model = self.model
        algorithm = config.algorithm_name or default_algorithm(model.config.model_type)
        if config.algorithm is None:
            config = replace(config, algorithm=algorithm)
        if config.compile != self.compiled:
            raise ValueError("compiling is decided on when the model is squeezed: leave the `with` block first")
        evictor = config.evictor
        config.check_scores(evictor)
        config.allocator.check(algorithm, evictor, sum(self.kv_heads) if config.per == "head" else len(self.layers))
        if config.allocator.needs == "attention" and config.allocator.observed < 2:
            raise InputError(
                f"the allocation {config.allocator} needs attention: observed must say of how many queries, 2 or more"
            )
        needed = {need: config.allocator.needs == need for need in ("similarities", "attention")}
        per_head = config.per != "layer"
        if isinstance(config.allocator, Explicit):
            config.allocator.check_heads(self.kv_heads)
            per_head = per_head or config.allocator.per_head
        chunk = config.prefill_chunk
        squeezable(self.findings, evictor, per_head=per_head, prefill_chunk=chunk, **needed)
        for name in ("compile", "cuda_graph"):
            if getattr(config, name) and len(set(getattr(model, "hf_device_map", {}).values())) > 1:
                raise InputError(f"{name} needs the model on one device, and this one was spread by a device_map")
        if config.cuda_graph:
            self._check_graph(evictor)
        if config.attn != "auto" and not all(layer.interface for layer in self.layers):
            raise InputError(
                f"attn {config.attn} has no effect on a model that computes attention by itself: leave it out"
            )
        return config, per_head

    def _check_graph(self, evictor: Evictor) -> None:
        """Raises InputError where decode steps cannot be recorded."""
        model, findings = self.model, self.findings
        check_device(model.device)
        if not evictor.built_in:
            raise InputError(
                f"cuda_graph is for the eviction methods of this project: what {evictor.name} answers is checked at "
                "every step, for which a GPU would wait"
            )
        other = findings.others or any(layer.hybrid or not layer.interface for layer in findings.layers)
        if other or depends_on_length(model.config) or "position_ids" not in self.decoder_arguments:
            raise InputError(
                "cuda_graph needs a model that caches nothing but attention, which goes through transformers' "
                "AttentionInterface, takes its tokens' positions and has RoPE whose angles do not depend on the "
                "length: leave cuda_graph out"
            )

    def forget_prefill(self) -> None:
        """Let go of the prefill that is kept for other configurations."""
        self.kept_prefill = None

    def cache(self, max_new_tokens: int) -> SqueezeCache:
        """An empty cache for one prompt or batch and up to `max_new_tokens` tokens after it.

        Raises:
            InputError: `max_new_tokens` is no whole number, or below 0.
        """
        whole_number("max_new_tokens", max_new_tokens, 0)
        made = SqueezeCache(self.evictor, self.findings, max_new_tokens)
        made.owner = self.model, self.evictor
        graphed = self.config.cuda_graph and self.recorder.failed is None
        made.whole_buffers = self.compiled or graphed
        made.graph = GraphedStep(self.recorder) if graphed else None
        return made

    def prefill(
        self, tokens: torch.Tensor, positions: torch.Tensor | None = None, mask: torch.Tensor | None = None
    ) -> KeptPrefill:
        """Prefill prompts, `(batch, tokens)`, and return all of it, for `fork` where it is one prompt.

        A prefill that is kept for other configurations is let go of first, unless the prefill under way takes it over.

        Args:
            positions: of the tokens, where they are not 0, 1, ….
            mask: 0 where there is padding, on the left; `(batch, tokens)`.
        """
        cache = self.cache(0)
        cache.whole = True
        given: dict[str, Any] = {"input_ids": tokens.to(input_device(self.model)), cache_argument(): cache}
        given |= {} if positions is None else {"position_ids": positions}
        given |= {} if mask is None else {"attention_mask": mask}
        with self.lock:
            self.forget_prefill()
            self.findings.decoder(**given, use_cache=True, return_dict=True)
            kept, self.kept_prefill = self.kept_prefill, None
        assert kept is not None
        return kept

    def fork(
        self,
        prefill: KeptPrefill,
        budgets: Sequence[Sequence[Any]],
        max_new_tokens: int,
        running: Sequence[int] | None = None,
    ) -> SqueezeCache:
        """A cache that goes on after one prompt's prefill, with other budgets in each sequence of its batch.

        Args:
            prefill: of a batch of one.
            budgets: of each sequence and layer, tokens, or those of each KV head.
            max_new_tokens: that can be decoded.
            running: of each layer, for how many sequences, from the first on, it will run (`squeeze.engine.replay`):
                it holds no others, though always the first. None: for all.
        Raises:
            ValueError: it is of several prompts, or the configuration that it was made in had an evictor that observed
                other queries.
        """
        if len(prefill.prompt_lengths) != 1:
            raise ValueError(f"a prefill of one prompt can be forked, and this is of {len(prefill.prompt_lengths)}")
        if self.evictor.observed not in (0, prefill.observed):
            raise ValueError("the prefill has no scores for this evictor: make it again after run.use(...)")
        cache, sequences = self.cache(max_new_tokens), len(budgets)
        cache.graph = None  # a replay would pass by what stands in for decoder layers (`squeeze.engine.replay`)
        cache.begin(sequences, prefill.inputs.shape[1], None)
        counts = [sequences] * len(cache.squeezed) if running is None else [max(count, 1) for count in running]
        for layer, parts in zip(cache.squeezed, prefill.layers, strict=True):
            layer.fill(*parts)
        rows = [sequences] * len(cache.layers)
        for facts, count in zip(self.layers, counts, strict=True):
            rows[facts.index] = count
        states.restore(cache.layers, prefill.states, rows)
        own = by_layer(budgets, self.kv_heads)
        cache.compress([tokens[:count] for tokens, count in zip(own, counts, strict=True)])
        return cache

    def step(self, tokens: torch.Tensor, position: int, cache: Cache, **more: Any) -> CausalLMOutputWithPast:
        """The model's output of a decode step, of `tokens` `(batch, 1)` that all stand at one position."""
        if "position_ids" in self.decoder_arguments:
            more["position_ids"] = torch.full_like(tokens, position)
        return self.model(tokens, **{cache_argument(): cache}, use_cache=True, **more)

    @contextmanager
    def prefilling(
        self, cache: SqueezeCache, inputs: torch.Tensor | None, positions: torch.Tensor | None, plain: bool
    ) -> Iterator[Prefill]:
        """The prefill of the prompts that `cache` has begun with, whose forward pass runs inside the block.

        At the block's end the cache is cut. What must be measured on the prompts for their budgets, by forward passes
        of its own, is measured before the block begins.

        Args:
            inputs: token ids, `(batch, columns)`; None where there are embeddings in their place.
            positions: of the tokens, where they are given.
            plain: whether the pass takes and gives nothing that a kept prefill does not have.
        Raises:
            InputError: the allocation is `measured`, and there are no token ids or too few; or hidden states are not
                finite.
        """
        prefill = self._begin_prefill(cache, inputs, positions, plain)
        try:
            with prefill.listening():
                yield prefill
            if cache.whole:
                self.kept_prefill = prefill.kept
            else:
                self._end_prefill(cache, prefill)
        except BaseException:
            cache.forget()
            raise

    def _begin_prefill(
        self, cache: SqueezeCache, inputs: torch.Tensor | None, positions: torch.Tensor | None, plain: bool
    ) -> Prefill:
        """A prefill, its loss curves where they are needed, and its budgets where they are known already."""
        prefill, allocators = Prefill(cache, self.config.attn), [config.allocator for config in self.configs]
        known = all(layer.residual is not None for layer in self.layers)
        prefill.measured = known and not all(isinstance(one, Explicit) for one in allocators)
        prefill.looking = max(one.observed if one.needs == "attention" else 0 for one in allocators)
        if cache.whole:
            return prefill
        batch = len(cache.prompt_lengths)
        if batch % len(allocators) != 0:
            raise ValueError(f"run.use(...) had {len(allocators)} configurations, and the batch has {batch} sequences")
        prefill.chunk = self.config.prefill_chunk
        if plain and inputs is not None and prefill.chunk is None:
            prefill.copies = _copies(cache, inputs, positions, len(allocators))
            if self.share_prefills:
                prefill.shared = True
                if self.kept_prefill is not None and prefill.may_take_over(self.kept_prefill, inputs, positions):
                    prefill.kept = self.kept_prefill
                self.kept_prefill = None  # let go of another one before this one is made
        prefill.losses = self._loss_curves(cache.prompt_lengths, inputs)
        if not any(one.needs_prefill for one in allocators) and not prefill.shared and prefill.copies == 1:
            prefill.budgets = self._by_layer(self._allocated(cache, prefill, None))
            prefill.most = self._most(cache)
        return prefill

    def _end_prefill(self, cache: SqueezeCache, prefill: Prefill) -> None:
        """Turn what was measured into budgets, cut the cache to them if it is not yet, and publish the result."""
        if not prefill.shared:
            prefill.kept = None  # so that each layer's whole prompts are let go of when it is cut
        similarities = prefill.mean_similarities()
        if similarities is not None and not np.isfinite(similarities).all():
            raise InputError(f"the model's hidden states are not finite in {self.model.dtype}: use another dtype")
        allocated = self._allocated(cache, prefill, similarities)
        if prefill.budgets is None:
            cache.compress(self._by_layer(allocated), self._most(cache))
        else:
            cache.end_prefill()
        if prefill.shared:
            self.kept_prefill = prefill.kept
        classes = [budgets.classes for budgets in allocated]
        self.last = PrefillResult(
            similarities,
            None if any(own is None for own in classes) else np.array(classes),
            by_sequence(cache.budgets, self.per_head),
            cache.kv_bytes,
            cache.state_bytes,
            cache.own_bytes(),
            [list(budgets.notes) for budgets in allocated],
            prefill.shared_seconds,
        )

    def _allocated(self, cache: SqueezeCache, prefill: Prefill, similarities: np.ndarray | None) -> list[Budgets]:
        """Budgets of each sequence; `similarities` are `(batch, layers)`, or None where budgets do not need them."""
        with section("importance", self.model.device):
            spreads = prefill.spreads()
            return [
                self._allocate(
                    self._config_of(row, len(cache.prompt_lengths)),
                    length,
                    cache.max_new_tokens,
                    None if similarities is None else similarities[row],
                    spread=None if spreads is None else spreads[row],
                    curves=prefill.losses[row],
                )
                for row, length in enumerate(cache.prompt_lengths)
            ]

    def _config_of(self, row: int, batch: int) -> SqueezeConfig:
        """The configuration of a sequence of a batch, which may have as many neighbours for each."""
        return self.configs[row * len(self.configs) // batch]

    def _by_layer(self, allocated: Sequence[Budgets]) -> list[np.ndarray]:
        return by_layer([budgets.tokens for budgets in allocated], self.kv_heads)

    def _most(self, cache: SqueezeCache) -> list[list[int]] | None:
        """Of each layer and sequence the most tokens that a head can hold, where heads share by scores; else None."""
        if self.config.per != "adakv":
            return None
        lengths = [length + cache.max_new_tokens for length in cache.prompt_lengths]
        return [[layer.reach(length) for length in lengths] for layer in self.layers]

    def _loss_curves(self, lengths: Sequence[int], inputs: torch.Tensor | None) -> list[LossCurves | None]:
        """Curves measured on each sequence; None of those whose allocation does not need them."""
        found: list[LossCurves | None] = []
        for row, length in enumerate(lengths):
            config = self._config_of(row, len(lengths))
            if config.allocator.needs != "loss_curves":
                found.append(None)
                continue
            if inputs is None:
                raise InputError(f"the allocation {config.allocator} needs a prompt's token ids, and got embeddings")
            losses = loss_curves.measure(self, inputs[row, -length:], [config.share], per_head=config.per == "head")
            found.append(LossCurves(loss_curves.MULTIPLES, np.array(losses)))
        return found

    def _allocate(
        self,
        config: SqueezeConfig,
        length: int,
        max_new_tokens: int,
        similarities: np.ndarray | None,
        **measured: Any,
    ) -> Budgets:
        allocation, per_head = config.allocator, config.per == "head"
        facts = PromptFacts.of(
            heads_of(self.layers) if per_head else self.layers,
            length,
            max_new_tokens,
            self.evictor.minimum_budget,
            similarities=similarities if allocation.needs == "similarities" else None,
            **measured,
        )
        budgets = allocation.allocate(facts)
        check_budgets(budgets, facts, allocation)
        if per_head:
            budgets = budgets.of_heads(self.kv_heads)
        if similarities is None or budgets.classes is not None or isinstance(allocation, Explicit):
            return budgets
        return replace(budgets, classes=allocation.classify(similarities))


def _copies(cache: SqueezeCache, inputs: torch.Tensor, positions: torch.Tensor | None, configs: int) -> int:
    """How many times a batch for some configurations has the same prompts, one time after the other.

    Args:
        inputs, positions: `(batch, tokens)`.
    """
    if configs == 1 or (positions is not None and positions.ndim != 2):
        return 1
    lengths, parts = cache.prompt_lengths, [inputs]
    parts += [] if positions is None or len(positions) == 1 else [positions]
    for prompts in (1, len(inputs) // configs):
        again = len(inputs) // prompts
        same = lengths == lengths[:prompts] * again
        if same and all(bool((part.unflatten(0, (again, prompts)) == part[:prompts]).all()) for part in parts):
            return again
    return 1
