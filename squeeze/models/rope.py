"""RoPE whose angles depend on how long a sequence is: `dynamic` (NTK) and `longrope`.

transformers takes the longest sequence of a batch for all of them, and `dynamic` goes on with the angles of an
earlier, longer one. Here every sequence's angles follow from its own length and from nothing else, as they do where a
model reads one sequence, its first one, alone.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from squeeze.errors import InputError
from squeeze.models.folder_config import positions, rope_parameters

LENGTH_DEPENDENT = ("dynamic", "longrope")


def length_dependent(config: PretrainedConfig) -> list[dict[str, Any]]:
    """The parameters of a model's kinds of RoPE whose angles depend on the length of a sequence, and not on positions
    alone."""
    return [rope for rope in rope_parameters(config) if rope["rope_type"] in LENGTH_DEPENDENT]


def depends_on_length(config: PretrainedConfig) -> bool:
    """Whether a model has RoPE of such a kind."""
    return bool(length_dependent(config))


def unscaled_length(config: PretrainedConfig) -> int:
    """The most tokens of a sequence whose angles are the same as those of any shorter one."""
    lengths = [
        rope["original_max_position_embeddings"]
        for rope in length_dependent(config)
        if rope["rope_type"] == "longrope"
    ]
    return min([*lengths, positions(config)]) if len(lengths) < len(length_dependent(config)) else min(lengths)


def forward_name(module: nn.Module) -> str:
    """The forward pass to replace: accelerate keeps the one it wrapped, and its wrapper must stay outside of ours."""
    return "_old_forward" if hasattr(module, "_hf_hook") else "forward"


class LengthwiseRope:
    """Stands in for the forward pass of a model's rotary embedding, and asks that code for one length at a time.

    Attributes:
        lengths: tokens of each sequence, `(batch,)` or `(1,)`, where the forward pass under way does not show them: a
            chunk of a prompt has the angles of the whole prompt. None: the last position of each sequence, plus one.
    """

    def __init__(self, rotary: nn.Module):
        self.rotary = copy(rotary)  # what lengths leave behind in it stays here
        self.rotary._buffers = {name: buffer.clone() for name, buffer in rotary.named_buffers(recurse=False)}
        for name in ("forward", "_old_forward", "_hf_hook"):
            vars(self.rotary).pop(name, None)
        self.lengths: torch.Tensor | None = None

    @torch.no_grad()
    def __call__(self, states: torch.Tensor, position_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the rotary embedding gives, such as cosines and sines in the dtype of `states`, `(batch, tokens, dim)`.

        Args:
            states: the stream, `(batch, tokens, hidden)`, for its device and dtype.
            position_ids: `(batch, tokens)` or `(1, tokens)`.
            args, kwargs: what else the architecture passes, such as the kind of a layer.
        """
        lengths = position_ids.amax(dim=-1) + 1 if self.lengths is None else self.lengths
        batch = max(len(lengths), len(position_ids))
        rows: dict[int, list[int]] = {}
        for row, length in enumerate(lengths.expand(batch).tolist()):
            rows.setdefault(length, []).append(row)
        order = torch.tensor([row for same in rows.values() for row in same], device=position_ids.device)
        everywhere = position_ids.expand(batch, -1)
        found = [self._angles(states, everywhere[same], length, *args, **kwargs) for length, same in rows.items()]
        joined = [torch.cat(parts)[order.argsort()] for parts in zip(*found, strict=True)]
        return tuple(joined) if len(joined) > 1 else joined[0]

    def _angles(
        self, states: torch.Tensor, position_ids: torch.Tensor, length: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, ...]:
        """Of sequences of one length. A last position says how long they are, and the first of all, before, takes back
        what a longer sequence left."""
        forward, end = type(self.rotary).forward, position_ids[:, :1]
        forward(self.rotary, states, torch.zeros_like(end), *args, **kwargs)
        whole = torch.cat([position_ids, torch.full_like(end, length - 1)], dim=1)
        found = forward(self.rotary, states, whole, *args, **kwargs)
        return tuple(part[:, :-1] for part in (found if isinstance(found, tuple) else (found,)))


def find_lengthwise(model: PreTrainedModel) -> list[tuple[nn.Module, LengthwiseRope]]:
    """A model's rotary embeddings whose angles depend on the length, each with what stands in for its forward pass:
    the one that it has already, or a new one.

    Raises:
        InputError: there is none, though the configuration says so, or it does not give its own angles again.
    """
    wanted = length_dependent(model.config)
    found = [(module, _stand_in(module)) for module in model.modules() if wanted and _kinds(module)]
    if wanted and not found:
        raise InputError(
            f"the model's RoPE is of type {wanted[0]['rope_type']}, and nothing in a {model.config.model_type} model "
            "was found that computes it: its angles for each sequence cannot be computed"
        )
    return found


def _kinds(rotary: nn.Module) -> list[dict[str, Any]]:
    """What a rotary embedding's forward pass is asked beside positions, for each kind that depends on the length."""
    kind = getattr(rotary, "rope_type", None)
    if isinstance(kind, dict):
        return [{"layer_type": name} for name, value in kind.items() if value in LENGTH_DEPENDENT]
    return [{}] if kind in LENGTH_DEPENDENT else []


def _stand_in(rotary: nn.Module) -> LengthwiseRope:
    current = vars(rotary).get(forward_name(rotary))
    if isinstance(current, LengthwiseRope):
        return current
    made, long = LengthwiseRope(rotary), 2 * unscaled_length(rotary.config)
    states = torch.zeros(1, 1, 1, device=next(rotary.buffers()).device)
    for more in _kinds(rotary):
        for position in (1, long, 1):  # short, long, and short again
            at, alone = torch.tensor([[position]], device=states.device), LengthwiseRope(rotary).rotary
            with torch.no_grad():
                type(rotary).forward(alone, states, torch.zeros_like(at), **more)
                expected = type(rotary).forward(alone, states, at, **more)
            if not all(map(torch.equal, made(states, at, **more), expected)):
                raise InputError(
                    f"{type(rotary).__name__} gives other angles at position {position} after a longer sequence than "
                    "before it: each sequence's own cannot be computed"
                )
    return made
