"""The probe's forward pass through a model, and the notes that are taken in it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface, DynamicCache, PretrainedConfig, PreTrainedModel

from squeeze.compatibility import cache_argument
from squeeze.devices import input_device
from squeeze.engine.residual import Call
from squeeze.engine.rotation import inverse_frequencies
from squeeze.errors import InputError

#: Of the sequences with the same token, one each; another token comes last, so that sums must hold for two streams.
POSITIONS = (1, 2, 38)
#: Arguments by which a module gets positions that are added to its attention's logits (ALiBi, arXiv 2108.12409).
BIASES = ("alibi", "position_bias")


class Update(NamedTuple):
    """What a module gave to its cache layer, float32 on the CPU, and what it got; `(sequences, kv_heads, 1, dim)`."""

    module: nn.Module
    keys: torch.Tensor
    values: torch.Tensor
    held: tuple[torch.Tensor, torch.Tensor]


class Attended(NamedTuple):
    """A call of the attention function.

    Args:
        module: whose it is.
        layer: of the cache, that it attends to.
        arguments: beside queries, keys and values.
        as_cached: whether keys and values are what the cache returned, and no tensors made of it.
        regrouped: whether they are others than those of the cached heads.
    """

    module: nn.Module
    layer: int
    arguments: dict[str, Any]
    as_cached: bool
    regrouped: bool


class ProbePass:
    """A forward pass of short sequences, one token each, and what was seen in it.

    Attributes:
        cache: what the model was given, a DynamicCache.
        calls: of all modules in the decoder, in the order in which they returned.
        attended: calls of the attention function; none where attention does not go through the interface.
        frequencies: RoPE's inverse frequencies, as they were used.
        positioned: whether the decoder's forward pass takes positions; else all sequences were at the same one.
        stateful: modules that kept a tensor of their own for the next pass.
        biased: modules that were given ALiBi.
    """

    def __init__(self, decoder: PreTrainedModel):
        self.decoder, self.config = decoder, decoder.config.get_text_config(decoder=True)
        self.running: list[nn.Module] = []
        self.given: list[torch.Tensor | None] = []
        self.calls: list[Call] = []
        self.attended: list[Attended] = []
        self.cache = _NotingCache(self.config, self.running)
        self.frequencies: list[torch.Tensor] = []
        self.positioned = "position_ids" in inspect.signature(decoder.forward).parameters
        self.stateful: list[nn.Module] = []
        self.biased: set[nn.Module] = set()

    def run(self, implementation: str | None) -> None:
        """Run the decoder, which stays as it is.

        Args:
            implementation: of attention, as transformers names it; None: the one that takes notes.
        Raises:
            InputError: a cache layer is updated twice, or attention reads what is in none.
        """
        device = input_device(self.decoder)
        token = self.config.vocab_size // 2
        inputs = {"input_ids": torch.tensor([token] * len(POSITIONS) + [token - 1], device=device)[:, None]}
        if self.positioned:
            inputs["position_ids"] = torch.tensor([*POSITIONS, POSITIONS[0]], device=device)[:, None]
        with ExitStack() as undo:
            undo.enter_context(torch.no_grad())
            undo.enter_context(self._as_it_was())
            name = implementation or undo.enter_context(self._registered())
            undo.enter_context(_implementation(self.decoder, name))
            for module in self.decoder.modules():
                if module is not self.decoder:
                    undo.callback(module.register_forward_pre_hook(self._enter, with_kwargs=True).remove)
                    undo.callback(module.register_forward_hook(self._leave).remove)
            self.decoder(**inputs, **{cache_argument(): self.cache}, use_cache=True)
            self.frequencies = inverse_frequencies(self.decoder)

    def attend(
        self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *mask: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        """Attention of one token to itself alone: its value, `(sequences, 1, heads, dim)`."""
        layer, self.cache.current = self.cache.current, None
        if layer is None:  # attention to what another module cached (Gemma 3n), or once more to the same (DiffLlama)
            layers = [layer for layer, update in self.cache.updates.items() if update.held[0] is key]
            layers += [call.layer for call in reversed(self.attended) if call.module is module]
            if not layers:
                raise InputError(f"{type(module).__name__} attends to keys that are in no layer of the cache")
            layer = layers[0]
        held = self.cache.updates[layer].held
        as_cached = key is held[0] and value is held[1]
        alike = all(a.shape == b.shape and torch.equal(a, b) for a, b in zip((key, value), held, strict=True))
        if mask:
            kwargs["attention_mask"] = mask[0]
        self.attended.append(Attended(module, layer, kwargs, as_cached, held[0].shape[1] > 1 and not alike))
        return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1).transpose(1, 2), None

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.running.append(module)
        self.given.append(_copy(args[0] if args else kwargs.get("hidden_states")))
        if any(kwargs.get(name) is not None for name in BIASES):
            self.biased.add(module)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.running.pop()
        output = output[0] if isinstance(output, tuple | list) and output else output
        if not isinstance(output, torch.Tensor):
            output = getattr(output, "last_hidden_state", None)
        self.calls.append(Call(module, self.given.pop(), _copy(output)))

    @contextmanager
    def _registered(self) -> Iterator[str]:
        """The name of `attend` in transformers' AttentionInterface; there is no mask by this name, so none is made."""
        name = f"squeeze_probe_{id(self)}"
        AttentionInterface.register(name, self.attend)
        try:
            yield name
        finally:
            del AttentionInterface._global_mapping[name]

    @contextmanager
    def _as_it_was(self) -> Iterator[None]:
        """No dropout; afterwards all modules have the attributes and buffers, and RoPE the angles, of before."""
        before = [(module, dict(vars(module)), dict(module._buffers)) for module in self.decoder.modules()]
        angles = [(b, b.clone()) for name, b in self.decoder.named_buffers() if "inv_freq" in name]
        try:
            for module, *_ in before:
                vars(module)["training"] = False
            yield
        finally:
            for module, attributes, buffers in before:
                self._put_back(module, vars(module), attributes)
                self._put_back(module, module._buffers, buffers)
            for buffer, values in angles:
                if not buffer.is_meta and not torch.equal(buffer, values):
                    buffer.copy_(values)

    def _put_back(self, module: nn.Module, now: dict[str, Any], before: dict[str, Any]) -> None:
        for name in [name for name in now if name not in before or now[name] is not before[name]]:
            value = now.pop(name)
            if isinstance(value, torch.Tensor) and value.ndim > 1 and len(value) == len(POSITIONS) + 1:
                self.stateful.append(module)
            if name in before:
                now[name] = before[name]


class _NotingCache(DynamicCache):
    """A DynamicCache that notes who updates it with what.

    Attributes:
        running: modules whose forward passes are under way, the innermost last.
        updates: by the layer's index.
        current: the layer that was updated last, until somebody attends to it.
    """

    def __init__(self, config: PretrainedConfig, running: list[nn.Module]):
        super().__init__(config=config)
        self.running = running
        self.updates: dict[int, Update] = {}
        self.current: int | None = None

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        held = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx in self.updates:
            raise InputError(f"layer {layer_idx} of the cache is updated twice in one forward pass")
        keys, values = (part.detach().to("cpu", torch.float32, copy=True) for part in (key_states, value_states))
        self.updates[layer_idx] = Update(self.running[-1], keys, values, held)
        self.current = layer_idx
        return held


@contextmanager
def _implementation(decoder: nn.Module, name: str) -> Iterator[None]:
    """Have every module of `decoder` look up `name` for its attention."""
    configs = {id(config): config for module in decoder.modules() for config in configs_of(module)}
    before = [(config, config._attn_implementation_internal) for config in configs.values()]
    try:
        for config, _ in before:
            config._attn_implementation_internal = name
        yield
    finally:
        for config, was in before:
            config._attn_implementation_internal = was


def configs_of(module: nn.Module) -> list[PretrainedConfig]:
    """The configuration of a module, and that of its text model; none where it has none."""
    config = getattr(module, "config", None)
    if not isinstance(config, PretrainedConfig):
        return []
    text = config.get_text_config(decoder=True)
    return [config] if text is config else [config, text]


def _copy(value: Any) -> torch.Tensor | None:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return None
    return value.detach().to("cpu", torch.float32, copy=True)
