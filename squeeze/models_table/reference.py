"""What a squeezed model must compute, slowly and by the model's own code: nothing is evicted, everything is masked.

One sequence without padding, through the unpatched model with its eager attention. Every token's keys and values stay;
at every decode step each attention layer gets a mask of the tokens that it would still hold, made anew from lists of
positions. Where StreamingLLM moves sink tokens, their keys are moved by a matrix that was fitted to the model's own
keys at two positions, not by anybody's idea of RoPE.

Of the probe's findings are used: which modules attend, the index, KV heads, key width, window and chunk of their
layer in the cache, and whether positions are added to the tokens.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import eager_mask

from squeeze.compatibility import cache_argument
from squeeze.evictors.base import Future
from squeeze.models_table.kept import Kept, kept

if TYPE_CHECKING:
    from squeeze.engine.findings import AttentionLayer
    from squeeze.evictors import Evictor

#: A layer's keys and values, or what moves them.
Pair = tuple[Any, Any]
#: The name of eager attention that is listened to; see `eager`.
STAND_IN = "eager_stand_in"


class WholeCache(DynamicCache):
    """transformers' cache, which here keeps all tokens of a layer with a window, too, and can show sink tokens moved.

    Attributes:
        given: keys and values of the last forward pass, by layer.
        sinks: how many tokens at the start are moved.
        moves: matrices that the keys and values of sink tokens are multiplied by when they are shown, by layer.
    """

    def __init__(self, config: Any, sinks: int = 0):
        super().__init__(config=config)
        for index, layer in enumerate(self.layers):
            if type(layer) is DynamicSlidingWindowLayer:
                self.layers[index] = DynamicLayer()
        self.given: dict[int, Pair] = {}
        self.sinks, self.moves = sinks, dict[int, Pair]()

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Pair:
        self.given[layer_idx] = key_states, value_states
        held = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        keys, values = map(self._moved, held, self.moves.get(layer_idx, (None, None)))
        return keys, values

    def shown(self, index: int) -> Pair:
        """Keys and values of a layer's tokens so far, `(batch, kv_heads, tokens, dim)`, none of them moved."""
        layer: Any = self.layers[index]
        return layer.keys, layer.values

    def _moved(self, states: torch.Tensor, move: torch.Tensor | None) -> torch.Tensor:
        if move is None:
            return states
        return torch.cat([states[:, :, : self.sinks] @ move, states[:, :, self.sinks :]], dim=2)


class Reference:
    """A model, and what it computes with a budget per layer.

    Args:
        model: on the CPU, in float32, unpatched.
        layers: its attention layers, as the probe found them.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[AttentionLayer]):
        self.model, self.layers = model, layers
        self.positional = "position_ids" in inspect.signature(type(model).forward).parameters
        self.standing: dict[int, dict[int, Pair]] = {}

    @torch.no_grad()
    def __call__(
        self, evictor: Evictor, budgets: Sequence[int | Sequence[int]], prompt: torch.Tensor, answer: torch.Tensor
    ) -> torch.Tensor:
        """Log-probabilities after a prompt and after every token of an answer, `(1 + len(answer), vocabulary)`.

        Args:
            evictor: a built-in one.
            budgets: tokens, one a layer or in each one a KV head, none above the layer's window or chunk.
            prompt: token ids, `(tokens,)`.
            answer: token ids, `(tokens,)`, that are fed to the model as if it had generated them.
        """
        held = [
            kept(evictor, budget, layer.kv_heads, layer.window, layer.chunk, layer.index)
            for budget, layer in zip(budgets, self.layers, strict=True)
        ]
        cache = WholeCache(self.model.config.get_text_config(decoder=True), evictor.sinks)
        asked: dict[nn.Module, tuple[torch.Tensor, float]] = {}
        with eager(self.model, self.layers, asked if isinstance(evictor.observed, Future) else None):
            logits = [self._forward(cache, prompt, 0, held)]
            for facts, layer in zip(self.layers, held, strict=True):
                if asked:
                    layer.queries, layer.scale = asked[facts.module]
                if facts.encoding != "absolute":
                    layer.move = partial(self._move_key, facts)
                layer.prefill(len(prompt))
            for position, token in enumerate(answer, start=len(prompt)):
                for layer in held:
                    layer.admit(position)
                if evictor.sinks:
                    cache.moves = {
                        layer.index: self._moves(layer, [position + 1 - len(own) for own in layer_held.held])
                        for layer, layer_held in zip(self.layers, held, strict=True)
                    }
                logits.append(self._forward(cache, token[None], position, held))
        return torch.stack(logits).float().log_softmax(-1)

    def _forward(self, cache: WholeCache, tokens: torch.Tensor, start: int, held: Sequence[Kept]) -> torch.Tensor:
        """Logits after the last of some tokens, whose first is at position `start`; `held` sees attention and keys."""
        mask = torch.ones(1, start + len(tokens), dtype=torch.long)
        with ExitStack() as hooks:
            for layer, layer_held in zip(self.layers, held, strict=True):
                if start:
                    for user in layer.users:
                        seen = partial(show, layer, layer_held, start)
                        hooks.callback(user.register_forward_pre_hook(seen, with_kwargs=True).remove)
                if layer_held.watches or not start:
                    hooks.callback(layer.module.register_forward_hook(partial(look, layer_held)).remove)
            positions = torch.arange(start, start + len(tokens))[None]
            logits = self._run(tokens[None], cache, positions, mask).logits[0, -1]
        for layer, layer_held in zip(self.layers, held, strict=True):
            layer_held.keys, layer_held.values = (part[0] for part in cache.shown(layer.index))
        return logits

    def _run(self, tokens: torch.Tensor, cache: WholeCache, positions: torch.Tensor, mask: torch.Tensor | None) -> Any:
        where = {"position_ids": positions} if self.positional else {}
        return self.model(input_ids=tokens, attention_mask=mask, use_cache=True, **{cache_argument(): cache}, **where)

    def _moves(self, layer: AttentionLayer, by: list[int]) -> Pair:
        """What moves the keys of each head, and its values, `(heads, dim, dim)`: see `_move`."""
        keys, values = zip(*(self._move(layer, positions) for positions in by), strict=True)
        return stacked(keys), stacked(values)

    def _move_key(self, layer: AttentionLayer, by: int) -> torch.Tensor | None:
        return self._move(layer, by)[0]

    def _move(self, layer: AttentionLayer, by: int) -> Pair:
        """What moves a layer's keys, and its values, by so many positions; None where positions are not in them.

        Fitted to the keys of single tokens that stand alone at two positions.
        """
        (key_before, value_before), (key_after, value_after) = (
            self._alone(position)[layer.index] for position in (3, 3 + by)
        )
        return fit(key_before, key_after), fit(value_before, value_after)

    def _alone(self, position: int) -> dict[int, Pair]:
        """Keys and values of many different tokens, each of them alone in its sequence, at a position."""
        if position not in self.standing:
            count = 2 * max(max(layer.key_dim, layer.value_dim) for layer in self.layers) + 16
            vocabulary = self.model.get_input_embeddings().weight.shape[0]
            tokens = torch.arange(0, vocabulary, max(vocabulary // count, 1))[:, None]
            cache = WholeCache(self.model.config.get_text_config(decoder=True))
            self._run(tokens, cache, torch.full_like(tokens, position), None)
            self.standing[position] = cache.given
        return self.standing[position]


def stacked(moves: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """Matrices of heads as one tensor `(heads, dim, dim)`, where some may stay as they are; None where all do."""
    known = next((move for move in moves if move is not None), None)
    if known is None:
        return None
    return torch.stack([torch.eye(len(known), dtype=known.dtype) if move is None else move for move in moves])


def fit(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor | None:
    """The matrix that turns vectors into others, `(batch, heads, tokens, dim)` each, by least squares.

    None where they are the same.

    Raises:
        ArithmeticError: no matrix does.
    """
    if torch.allclose(before, after, rtol=1e-4, atol=1e-5):
        return None
    given, wanted = (states.flatten(0, 2).double() for states in (before, after))
    matrix = torch.linalg.lstsq(given, wanted).solution
    error = ((given @ matrix - wanted).norm() / wanted.norm()).item()
    if not error < 1e-4:
        raise ArithmeticError(f"keys at another position are no linear function of these: an error of {error:.2g}")
    return matrix.to(before.dtype)


def show(
    layer: AttentionLayer, layer_held: Kept, position: int, module: nn.Module, args: Any, kwargs: dict[str, Any]
) -> Pair:
    """Before attention: a mask of the tokens that are held, of those in the query's chunk."""
    first = 0 if layer.chunk is None else position // layer.chunk * layer.chunk
    heads = [[other for other in held if other >= first] for held in layer_held.held]
    if all(held == heads[0] for held in heads):
        heads = heads[:1]
    mask = torch.full((len(heads), position + 1), torch.finfo(torch.float32).min)
    for head, held in enumerate(heads):
        mask[head, held] = 0.0
    if len(heads) > 1:
        mask = mask.repeat_interleave(layer_held.query_heads // len(heads), dim=0)
    return args, kwargs | {"attention_mask": mask[None, :, None]}


def look(held: Kept, module: nn.Module, args: Any, output: Any) -> None:
    """After attention: its probabilities."""
    probabilities = output[1][0].float()
    held.query_heads = len(probabilities)
    held.attended(probabilities.unflatten(0, (held.kv_heads, -1)))


@contextmanager
def eager(
    model: PreTrainedModel,
    layers: Sequence[AttentionLayer],
    asked: dict[nn.Module, tuple[torch.Tensor, float]] | None = None,
) -> Iterator[None]:
    """The model with its own eager attention, whose probabilities are those that its values are multiplied with.

    Granite's with sink logits gives probabilities from before the sinks took their share; there gpt-oss's stands in,
    which computes the same.

    Args:
        asked: gets the queries of each module in its last pass, `(heads, tokens, dim)`, and their scale; None: they
            are not looked at.
    """
    sinks = all(getattr(layer.module, "sinks", None) is not None for layer in layers)

    def attend(module: nn.Module, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if asked is not None and len(query) == 1 and query.shape[2] > 1:
            scale = kwargs.get("scaling")
            asked[module] = query[0], query.shape[-1] ** -0.5 if scale is None else scale
        home = gpt_oss if sinks else sys.modules[type(module).__module__]
        return home.eager_attention_forward(module, query, *args, **kwargs)

    name, before = "eager", model.config._attn_implementation
    if sinks or asked is not None:
        from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss

        name = STAND_IN
        AttentionInterface.register(name, attend)
        AttentionMaskInterface.register(name, eager_mask)
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
