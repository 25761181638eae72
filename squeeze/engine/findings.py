"""What is known of a model's attention layers, and which eviction methods they can be used with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from squeeze.engine.residual import Residual
from squeeze.engine.rotation import Encoding, Rotation
from squeeze.errors import InputError
from squeeze.evictors import Evictor
from squeeze.evictors.base import Future
from squeeze.models.rope import length_dependent


@dataclass(frozen=True, eq=False)
class AttentionLayer:
    """One attention layer with a cache of its own.

    Attributes:
        index: of its layer in the model's cache.
        name: of the attention module, in the model.
        module: the attention module.
        block: the decoder layer around it.
        users: modules that attend to this cache, `module` first (Gemma 3n's later layers share).
        interface: attention goes through transformers' AttentionInterface.
        kv_heads: of the cache.
        key_dim, value_dim: numbers of one head's key and value in the cache.
        window: tokens that a query sees, itself included; None: all.
        chunk: tokens of a chunk outside of which a query sees nothing (Llama 4); None: there are no chunks.
        softcap: bound of the logits; None: there is none.
        sinks: attention has logits beside those of the tokens (gpt-oss).
        encoding: how positions are in the cached keys.
        rotation: of `rope`; None for the others.
        residual: None: how attention enters the stream is not known.
        as_cached: attention is given what the cache returned, and nothing that was made of it.
        regrouped: attention does not read the cached heads as they are (DiffLlama, JetMoE).
        foreign: arguments of attention that a squeezed cache cannot serve.
        hybrid: its cache layer keeps a state of linear attention, too (Falcon-H1).
    """

    index: int
    name: str
    module: nn.Module
    block: nn.Module
    users: tuple[nn.Module, ...]
    interface: bool
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None
    chunk: int | None
    softcap: float | None
    sinks: bool
    encoding: Encoding
    rotation: Rotation | None
    residual: Residual | None
    as_cached: bool
    regrouped: bool
    foreign: tuple[str, ...]
    hybrid: bool

    def reach(self, tokens: int) -> int:
        """Of so many tokens, those that the layer's own full cache holds."""
        return min(tokens, self.window or tokens, self.chunk or tokens)

    def unseen(self, positions: torch.Tensor, query: torch.Tensor) -> torch.Tensor | None:
        """Mask of the tokens at `positions` before the window or chunk of a query at `query`; None: there is neither.

        The two are broadcast against one another.
        """
        if self.window is not None:
            return positions <= query - self.window
        return None if self.chunk is None else positions < query // self.chunk * self.chunk

    def described(self) -> dict[str, Any]:
        """Numbers and names, for files; what a layer does not have is left out."""
        said = {
            "attention": type(self.module).__name__,
            "kv_heads": self.kv_heads,
            "key_dim": self.key_dim,
            "value_dim": self.value_dim,
            "positions": self.encoding if self.rotation is None else f"rope, {self.rotation.described()}",
            "stream": None if self.residual is None else self.residual.rule,
            "window": self.window,
            "chunk": self.chunk,
            "softcap": self.softcap,
            "sink_logits": self.sinks,
            "shared_by": len(self.users) if len(self.users) > 1 else None,
            "own_attention": not self.interface,
            "regrouped_heads": self.regrouped,
            "linear_attention_beside": self.hybrid,
        }
        return {name: value for name, value in said.items() if value is not None and value is not False}


@dataclass(frozen=True, eq=False)
class Findings:
    """What a model's attention layers are.

    Attributes:
        decoder: the module whose forward pass takes token ids and a cache.
        configs: by which modules look up their attention function and the masks for it.
        layers: in the order of their places in the cache.
        others: cache layers that are no attention (linear attention, state space); they stay whole.
    """

    decoder: PreTrainedModel
    configs: tuple[PretrainedConfig, ...]
    layers: tuple[AttentionLayer, ...]
    others: int

    def described(self) -> dict[str, Any]:
        """For `run.json`: layers that are alike are said once, with their numbers among the attention layers."""
        kinds: list[tuple[dict[str, Any], list[int]]] = []
        for number, layer in enumerate(self.layers):
            said = layer.described()
            known = next((numbers for kind, numbers in kinds if kind == said), None)
            if known is None:
                kinds.append((said, [number]))
            else:
                known.append(number)
        described: dict[str, Any] = {"layers": [{"layers": _ranges(numbers)} | said for said, numbers in kinds]}
        return described | ({"other_layers": self.others} if self.others else {})


def _ranges(numbers: Sequence[int]) -> str:
    """As in `0-2, 4`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def squeezable(
    findings: Findings,
    evictor: Evictor,
    *,
    similarities: bool = False,
    attention: bool = False,
    per_head: bool = False,
    prefill_chunk: int | None = None,
) -> None:
    """Check that an eviction method can be used with a model.

    Args:
        similarities: whether budgets depend on how much attention changes the residual stream.
        attention: whether they depend on how the last queries of a prompt attend.
        per_head: whether KV heads have budgets of their own.
        prefill_chunk: tokens of the prompt that are prefilled at a time; None: all of them.
    Raises:
        InputError: it cannot; the sentence says why.
    """
    config = findings.decoder.config.get_text_config(decoder=True)
    kind, expects = config.model_type, isinstance(evictor.observed, Future)
    if per_head and evictor.heads_agree:
        raise InputError(
            f"KV heads cannot have budgets of their own with {evictor}, by which all heads of a layer keep the same "
            "tokens: take budgets of layers"
        )
    for layer in findings.layers:
        if evictor.scores_prompts and layer.regrouped:
            raise InputError(
                f"{evictor} evicts for every KV head by itself, and attention of {kind} mixes them ({layer.name})"
            )
        if per_head and layer.regrouped:
            raise InputError(
                f"KV heads cannot have budgets of their own in {kind}, whose attention mixes them ({layer.name})"
            )
        if evictor.needs_keys and layer.interface and not layer.as_cached:
            raise InputError(
                f"{evictor} looks at keys, and {kind} caches something else that its attention makes them from "
                f"({layer.name})"
            )
        unknown = "are in the keys in a way not known"
        if expects and not layer.interface:
            raise InputError(f"{evictor} looks at queries, and {kind} computes attention by itself ({layer.name})")
        if expects and layer.encoding == "unknown":
            raise InputError(f"{evictor} moves queries, and positions of {kind} {unknown} ({layer.name})")
        if evictor.sinks and layer.encoding in ("absolute", "unknown"):
            how = "are added to the tokens" if layer.encoding == "absolute" else unknown
            raise InputError(f"{evictor} moves sink tokens, and positions of {kind} {how} ({layer.name})")
        for name in ("window", "chunk"):
            reach = getattr(layer, name)
            if reach is not None and reach < evictor.minimum_budget:
                raise InputError(
                    f"{evictor} needs {evictor.minimum_budget} tokens a layer, and the model's own "
                    f"attention {name} is {reach} ({layer.name})"
                )
        if similarities and layer.residual is None:
            raise InputError(
                f"how attention of {kind} enters the residual stream was not found ({layer.name}): "
                "take an allocation that needs no similarities, such as uniform or calibrated"
            )
        if attention and not layer.interface:
            raise InputError(
                f"{kind} computes attention by itself ({layer.name}), and shows none to make budgets from: take "
                "another allocation, such as uniform or calibrated"
            )
        if prefill_chunk is not None and not layer.interface:
            raise InputError(
                f"prefill_chunk cannot be used with {kind}, whose own code makes the masks of its attention, for a "
                "prompt of which nothing is cut: leave it out"
            )
        if prefill_chunk is not None and (findings.others or layer.hybrid):
            raise InputError(
                f"prefill_chunk cannot be used with {kind}, whose layers of linear attention may not go on from a "
                "chunk's state: leave it out"
            )
    changing = length_dependent(config)
    if (evictor.sinks or expects) and changing and any(layer.rotation for layer in findings.layers):
        rope, what = changing[0]["rope_type"], "queries" if expects else "sink tokens"
        raise InputError(
            f"{evictor} moves {what} by fixed angles, and those of this {kind}'s RoPE, which is of type {rope}, "
            "depend on a sequence's length"
        )
