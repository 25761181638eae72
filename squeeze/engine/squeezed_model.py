"""A model and a configuration: what every prefill's budgets are, and prefills that several configurations share.

Of the model it knows its sizes, its embeddings and its RoPE; `patch.py` makes it listen to the forward passes.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from transformers import PreTrainedModel

from squeeze.allocations.base import Budgets, LossCurves, PromptFacts, check_budgets
from squeeze.compatibility import check_transformers
from squeeze.config import DEFAULT_ALGORITHM, SqueezeConfig
from squeeze.engine import loss_curves
from squeeze.engine.cache import SqueezeCache
from squeeze.engine.prefill import Prefill
from squeeze.errors import InputError
from squeeze.models.folder_config import own_window
from squeeze.models.rope import LengthwiseRope, depends_on_length
from squeeze.numbers import whole_number


class SqueezedModel:
    """A model whose `generate` keeps a squeezed cache, and what the last prefill told about it.

    Attributes:
        config: the configuration, its algorithm filled in.
        similarities: `(batch, layers)` float32, mean cosine similarity per layer; None with explicit budgets.
        classes: `(batch, layers)` 1, 2 or 3; None with explicit budgets.
        budgets: `(batch, layers)` tokens.
        kv_bytes: bytes of all key and value tensors held after the prefill.
        state_bytes: bytes of H2O's scores and positions, or of StreamingLLM's sinks as they came.
        notes: of each sequence, sentences that the user should see, such as that minimum budgets made the total grow.
        share_prefills: keep the last prefill, all of its keys and values, for other configurations on the same prompts
            (`use`); what they give is the same as without.
        shared_seconds: what the last prefill took if it was taken over from an earlier one, else 0.
        lock: held by a forward pass; threads that use the model take turns by it.
        rope: the angles of a model whose RoPE depends on the length of a sequence; None for others.
        kept_prefill, entering, entering_lengths, measured: of the prefill under way, for `patch.py`: the last one
            that is kept, the stream that entered a layer with the lengths in it, and similarities so far.
    """

    def __init__(self, model: PreTrainedModel, config: SqueezeConfig):
        check_transformers()
        self.model = model
        self.lock = threading.RLock()
        self.rope: LengthwiseRope | None = None
        self.compiled = config.compile
        self.use(config)
        self.similarities: np.ndarray | None = None
        self.classes: np.ndarray | None = None
        self.budgets: np.ndarray | None = None
        self.kv_bytes = 0
        self.state_bytes = 0
        self.notes: list[list[str]] = []
        self.share_prefills = False
        self.shared_seconds = 0.0
        self.kept_prefill: Prefill | None = None
        self.entering: torch.Tensor | None = None
        self.entering_lengths: tuple[list[int], list[int]] = [], []
        self.measured: list[torch.Tensor] = []
        self._curves: list[LossCurves] | None = None

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
        config.allocator.check(algorithm, evictor, model.config.num_hidden_layers)
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
            self.config, self.evictor, self.window = config, evictor, window

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

    def prefill(self, tokens: torch.Tensor) -> Prefill:
        """Prefill prompts of one length, `(batch, tokens)`, and keep all of it for `fork`."""
        before = self.config, self.share_prefills, self.kept_prefill
        inputs = tokens.to(self.model.get_input_embeddings().weight.device)
        budgets = [inputs.shape[1]] * self.model.config.num_hidden_layers
        config = SqueezeConfig(self.config.algorithm, budgets=budgets, attn=self.config.attn)
        self.config, self.share_prefills = config, True
        try:
            self.model.model(input_ids=inputs, past_key_values=self.cache(1), use_cache=True)
            assert self.kept_prefill is not None
            return self.kept_prefill
        finally:
            self.config, self.share_prefills, self.kept_prefill = before

    def fork(self, prefill: Prefill, budgets: Sequence[Sequence[int]], max_new_tokens: int) -> SqueezeCache:
        """A cache that goes on after one prompt's prefill in several ways, one a sequence of its batch.

        Args:
            prefill: of a batch of one.
            budgets: `(sequences, layers)` tokens.
            max_new_tokens: that can be decoded.
        """
        cache = self.cache(max_new_tokens)
        cache.begin(prefill.inputs.shape[1], len(budgets), None)
        for layer, held in zip(cache.layers, prefill.layers, strict=True):
            layer.fill(*(part.expand(len(budgets), -1, *part.shape[2:]) if part.numel() else part for part in held))
        cache.compress(budgets)
        return cache

    def begin_prefill(self, cache: SqueezeCache, inputs: torch.Tensor | None) -> None:
        """Tell the cache its budgets, where they are known already and no other configuration shares the prefill.

        Args:
            inputs: token ids, `(batch, tokens)`; None where there are embeddings in their place.
        Raises:
            InputError: the allocation needs loss curves of the prompt, and there are no token ids or too few.
        """
        self._curves = self._loss_curves(cache.prompt_lengths, inputs)
        self.measured = []
        known_early = self.config.allocator.needs != "similarities"
        if known_early and (self.config.prefill_chunk or not self.share_prefills):
            known = [
                self._allocate(row, None, length, cache.max_new_tokens)
                for row, length in enumerate(cache.prompt_lengths)
            ]
            cache.budgets = np.array([budgets.tokens for budgets in known]).T

    def finish_prefill(self, cache: SqueezeCache) -> None:
        """Turn what was measured into budgets, sequence by sequence, and cut the cache to them if it is not yet."""
        measured = None
        if self.measured:
            by_chunk = torch.stack([values.cpu() for values in self.measured]).unflatten(0, (-1, len(cache.layers)))
            measured = by_chunk.sum(dim=0).T.numpy()
        self.measured = []
        if measured is not None and not np.isfinite(measured).all():
            raise InputError(f"the model's hidden states are not finite in {self.model.dtype}: use another dtype")
        allocated = [
            self._allocate(row, None if measured is None else measured[row], length, cache.max_new_tokens)
            for row, length in enumerate(cache.prompt_lengths)
        ]
        cache.compress([budgets.tokens for budgets in allocated])
        self.similarities = measured
        self.classes = None if measured is None else np.array([budgets.classes for budgets in allocated])
        self.budgets = cache.budgets.T
        self.kv_bytes, self.state_bytes = cache.kv_bytes, cache.state_bytes
        self.notes = [list(budgets.notes) for budgets in allocated]

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

    def _allocate(self, row: int, similarities: np.ndarray | None, length: int, max_new_tokens: int) -> Budgets:
        allocation = self.config.allocator
        facts = PromptFacts(
            layers=self.model.config.num_hidden_layers,
            length=length,
            cap=min(length + max_new_tokens, self.window or length + max_new_tokens),
            minimum=self.evictor.minimum_budget,
            similarities=similarities if allocation.needs == "similarities" else None,
            curves=self._curves[row] if self._curves else None,
        )
        budgets = allocation.allocate(facts)
        check_budgets(budgets, facts, allocation)
        if similarities is None or budgets.classes is not None:
            return budgets
        return replace(budgets, classes=allocation.classify(similarities))
