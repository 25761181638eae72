"""A model and its configuration: the budgets of every prefill, and prefills that several configurations share.

Of the model it knows its sizes, its embeddings and its RoPE; `patch.py` makes its forward passes tell of themselves.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NoReturn

import numpy as np
import torch
from transformers import PreTrainedModel

from squeeze.allocations.base import Budgets, LossCurves, PromptFacts, check_budgets
from squeeze.allocations.explicit import Explicit
from squeeze.compatibility import check_transformers
from squeeze.config import DEFAULT_ALGORITHM, SqueezeConfig
from squeeze.devices import section
from squeeze.engine import loss_curves
from squeeze.engine.cache import SqueezeCache
from squeeze.engine.prefill import KeptPrefill, Prefill, PrefillResult
from squeeze.errors import InputError
from squeeze.models.cached_layers import OwnLayer
from squeeze.models.folder_config import own_window
from squeeze.models.rope import LengthwiseRope, depends_on_length
from squeeze.numbers import whole_number


class SqueezedModel:
    """A model whose `generate` keeps a squeezed cache, and the result of its last prefill.

    Attributes:
        config: the configuration, its algorithm filled in.
        evictor: of the configuration's algorithm.
        window: the model's own sliding window, in tokens, or None.
        layers: those with a cache of their own.
        rope: the angles of a model whose RoPE depends on the length of a sequence; None for others.
        lock: held by a forward pass; threads that use the model take turns by it.
        share_prefills: keep the last prefill, all of its keys and values, for other configurations on the same prompts
            (`use`); what they give is the same as without.
        kept_prefill: the prefill that is kept, between two passes.
        under_way: the prefill under way; None between two passes, and in those that are no prefill.
        last: the result of the last prefill; `similarities`, `classes`, `budgets`, `kv_bytes`, `state_bytes`, `notes`
            and `shared_seconds` read it.
    """

    def __init__(self, model: PreTrainedModel, config: SqueezeConfig):
        check_transformers()
        self.model = model
        self.lock = threading.RLock()
        self.rope: LengthwiseRope | None = None
        self.compiled = config.compile
        self.use(config)
        self.share_prefills = False
        self.kept_prefill: KeptPrefill | None = None
        self.under_way: Prefill | None = None
        self.last = PrefillResult()

    # Of the last prefill: see `PrefillResult`.
    similarities = property(lambda self: self.last.similarities)
    classes = property(lambda self: self.last.classes)
    budgets = property(lambda self: self.last.budgets)
    kv_bytes = property(lambda self: self.last.kv_bytes)
    state_bytes = property(lambda self: self.last.state_bytes)
    notes = property(lambda self: self.last.notes)
    shared_seconds = property(lambda self: self.last.shared_seconds)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise ValueError("a squeezed model cannot be copied or pickled: leave the `with squeezed(...)` block first")

    def use(self, config: SqueezeConfig) -> None:
        """Go on with another configuration, from the next prompt on.

        Raises:
            InputError: it does not fit the model.
            ValueError: it is to be compiled and the first one was not, or the reverse.
        """
        model = self.model
        architecture = model.config.model_type
        if architecture not in DEFAULT_ALGORITHM:
            raise InputError(
                f"the model is of type {architecture}; supported are {', '.join(sorted(DEFAULT_ALGORITHM))}"
            )
        algorithm = config.algorithm_name or DEFAULT_ALGORITHM[architecture]
        if config.algorithm is None:
            config = replace(config, algorithm=algorithm)
        if config.compile != self.compiled:
            raise ValueError("compiling is decided on when the model is squeezed: leave the `with` block first")
        evictor, window = config.evictor, own_window(model.config)
        sizes = model.config
        head_dim = getattr(sizes, "head_dim", None) or sizes.hidden_size // sizes.num_attention_heads
        layers = (OwnLayer(sizes.num_key_value_heads, head_dim, head_dim, window),) * sizes.num_hidden_layers
        config.allocator.check(algorithm, evictor, len(layers))
        if window is not None and window < evictor.minimum_budget:
            raise InputError(
                f"{algorithm} needs {evictor.minimum_budget} tokens a layer, and the model's own "
                f"sliding window is {window}"
            )
        if evictor.sinks and depends_on_length(model.config):
            rope = model.config.rope_parameters["rope_type"]
            raise InputError(f"{algorithm} moves sink tokens by fixed angles; the model's RoPE is of type {rope}")
        if config.compile and len(set(getattr(model, "hf_device_map", {}).values())) > 1:
            raise InputError("compile needs the model on one device, and this one was spread by a device_map")
        with self.lock:  # nothing is changed by a configuration that is refused
            self.config, self.evictor, self.window, self.layers = config, evictor, window, layers

    def forget_prefill(self) -> None:
        """Let go of the prefill that is kept for other configurations."""
        self.kept_prefill = None

    def cache(self, max_new_tokens: int) -> SqueezeCache:
        """An empty cache for one prompt or batch and up to `max_new_tokens` tokens after it.

        Raises:
            InputError: `max_new_tokens` is no whole number, or below 0.
        """
        whole_number("max_new_tokens", max_new_tokens, 0)
        inv_freq = self.model.model.rotary_emb.inv_freq
        made = SqueezeCache(self.evictor, self.model.config.num_hidden_layers, max_new_tokens, inv_freq)
        made.owner = self.model, self.evictor
        return made

    def prefill(self, tokens: torch.Tensor) -> KeptPrefill:
        """Prefill prompts of one length, `(batch, tokens)`, and return all of it for `fork`.

        A prefill that is kept for other configurations is let go of first, unless the prefill under way takes it over.
        """
        self.forget_prefill()
        inputs = tokens.to(self.model.get_input_embeddings().weight.device)
        cache = self.cache(0)
        cache.whole = True
        output = self.model.model(input_ids=inputs, past_key_values=cache, use_cache=True, return_dict=True)
        layers = [layer.contents for layer in cache.layers]
        return KeptPrefill(inputs, cache.prompt_lengths, self.config.attn, layers, [], output.last_hidden_state)

    def fork(self, prefill: KeptPrefill, budgets: Sequence[Sequence[int]], max_new_tokens: int) -> SqueezeCache:
        """A cache that goes on after one prompt's prefill, with other budgets in each sequence of its batch.

        Args:
            prefill: of a batch of one.
            budgets: `(sequences, layers)` tokens.
            max_new_tokens: that can be decoded.
        Raises:
            ValueError: the configuration that it was made in had an evictor without scores, and this one's needs them.
        """
        if self.evictor.needs_scores and not prefill.scored:
            raise ValueError("the prefill has no scores for this evictor: make it again after run.use(...)")
        cache = self.cache(max_new_tokens)
        cache.begin(len(budgets), prefill.inputs.shape[1], None)
        for layer, parts in zip(cache.layers, prefill.layers, strict=True):
            layer.fill(*(part.expand(len(budgets), -1, *part.shape[2:]) if part.numel() else part for part in parts))
        cache.compress(np.array(budgets).T)
        return cache

    @contextmanager
    def apart(self) -> Iterator[None]:
        """A forward pass of its own: a prefill of another one is not under way in it, and its own ends with it."""
        outer, self.under_way = self.under_way, None
        try:
            yield
        finally:
            self.under_way = outer

    @contextmanager
    def prefilling(self, cache: SqueezeCache, inputs: torch.Tensor | None, plain: bool) -> Iterator[Prefill]:
        """The prefill of the prompts that `cache` has begun with, whose forward pass runs inside the block.

        At the block's end the cache is cut. What must be measured on the prompts for their budgets, by forward passes
        of its own, is measured before the block begins.

        Args:
            inputs: token ids, `(batch, columns)`; None where there are embeddings in their place.
            plain: whether the pass gives nothing that a kept prefill does not have.
        Raises:
            InputError: the allocation is `measured`, and there are no token ids or too few; or hidden states are not
                finite.
        """
        prefill = self._begin_prefill(cache, inputs, plain)
        self.under_way = prefill
        try:
            yield prefill
            if not cache.whole:
                self._end_prefill(cache, prefill)
        except BaseException:
            cache.forget()
            raise

    def _begin_prefill(self, cache: SqueezeCache, inputs: torch.Tensor | None, plain: bool) -> Prefill:
        """A prefill, its loss curves where they are needed, and its budgets where they are known already."""
        config = self.config
        prefill = Prefill(cache.layers, cache.prompt_lengths, cache.columns, self.window, config.attn)
        if cache.whole:
            return prefill
        prefill.chunk, prefill.measured = config.prefill_chunk, not isinstance(config.allocator, Explicit)
        if plain and self.share_prefills and inputs is not None and prefill.chunk is None:
            prefill.shared = True
            if self.kept_prefill is not None and prefill.may_take_over(self.kept_prefill, inputs):
                prefill.kept = self.kept_prefill
            self.kept_prefill = None  # let go of another one before this one is made
        prefill.losses = self._loss_curves(cache.prompt_lengths, inputs)
        if config.allocator.needs != "similarities" and not prefill.shared:
            prefill.budgets = np.array([budgets.tokens for budgets in self._allocated(cache, prefill, None)]).T
        return prefill

    def _end_prefill(self, cache: SqueezeCache, prefill: Prefill) -> None:
        """Turn what was measured into budgets, cut the cache to them if it is not yet, and publish the result."""
        similarities = prefill.mean_similarities()
        if similarities is not None and not np.isfinite(similarities).all():
            raise InputError(f"the model's hidden states are not finite in {self.model.dtype}: use another dtype")
        allocated = self._allocated(cache, prefill, similarities)
        if prefill.budgets is None:
            cache.compress(np.array([budgets.tokens for budgets in allocated]).T)
        else:
            cache.end_prefill(prefill.budgets)
        if prefill.shared:
            self.kept_prefill = prefill.kept
        self.last = PrefillResult(
            similarities,
            None if similarities is None else np.array([budgets.classes for budgets in allocated]),
            cache.budgets.T,
            cache.kv_bytes,
            cache.state_bytes,
            [list(budgets.notes) for budgets in allocated],
            prefill.shared_seconds,
        )

    def _allocated(self, cache: SqueezeCache, prefill: Prefill, similarities: np.ndarray | None) -> list[Budgets]:
        """Budgets of each sequence; `similarities` are `(batch, layers)`, or None where budgets do not need them."""
        with section("importance", self.model.device):
            return [
                self._allocate(
                    None if prefill.losses is None else prefill.losses[row],
                    None if similarities is None else similarities[row],
                    length,
                    cache.max_new_tokens,
                )
                for row, length in enumerate(cache.prompt_lengths)
            ]

    def _loss_curves(self, lengths: Sequence[int], inputs: torch.Tensor | None) -> list[LossCurves] | None:
        """Curves measured on each sequence, where the allocation needs them."""
        allocation = self.config.allocator
        if allocation.needs != "loss_curves":
            return None
        if inputs is None:
            raise InputError(f"the allocation {allocation} needs a prompt's token ids, and got embeddings")
        prompts = [row[-length:] for row, length in zip(inputs, lengths, strict=True)]
        losses = [np.array(loss_curves.measure(self, prompt, [self.config.share])) for prompt in prompts]
        return [LossCurves(loss_curves.MULTIPLES, of_prompt) for of_prompt in losses]

    def _allocate(
        self, losses: LossCurves | None, similarities: np.ndarray | None, length: int, max_new_tokens: int
    ) -> Budgets:
        allocation = self.config.allocator
        facts = PromptFacts.of(
            self.layers,
            length,
            max_new_tokens,
            self.evictor.minimum_budget,
            similarities if allocation.needs == "similarities" else None,
            losses,
        )
        budgets = allocation.allocate(facts)
        check_budgets(budgets, facts, allocation)
        if similarities is None or budgets.classes is not None:
            return budgets
        return replace(budgets, classes=allocation.classify(similarities))
