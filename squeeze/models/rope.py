"""RoPE whose angles depend on how long a sequence is: `dynamic` (NTK) and `longrope`.

transformers takes the longest sequence of a batch for all of them, and `dynamic` goes on with the angles of an
earlier, longer one. Here every sequence's angles follow from its own length and from nothing else, as they do where a
model reads one sequence, its first one, alone.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

LENGTH_DEPENDENT = ("dynamic", "longrope")


def depends_on_length(config: PretrainedConfig) -> bool:
    """Whether a model's angles depend on the length of a sequence, and not on positions alone."""
    return config.rope_parameters["rope_type"] in LENGTH_DEPENDENT


def unscaled_length(config: PretrainedConfig) -> int:
    """The most tokens of a sequence whose angles are the same as those of any shorter one."""
    if config.rope_parameters["rope_type"] == "longrope":
        return config.rope_parameters["original_max_position_embeddings"]
    return config.max_position_embeddings


def forward_name(module: nn.Module) -> str:
    """The forward pass to replace: accelerate keeps the one it wrapped, and its wrapper must stay outside of ours."""
    return "_old_forward" if hasattr(module, "_hf_hook") else "forward"


class LengthwiseRope:
    """Stands in for the forward pass of a model's rotary embedding.

    Attributes:
        lengths: tokens of each sequence, `(batch,)` or `(1,)`, where the forward pass under way does not show them: a
            chunk of a prompt has the angles of the whole prompt. None: the last position of each sequence, plus one.
    """

    def __init__(self, rotary: nn.Module):
        self.config: PretrainedConfig = rotary.config
        self.lengths: torch.Tensor | None = None

    @torch.no_grad()
    def __call__(self, states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines in the dtype of `states`, both `(batch, tokens, head_dim)`.

        Args:
            states: the stream, `(batch, tokens, hidden)`, for its device and dtype.
            position_ids: `(batch, tokens)` or `(1, tokens)`.
        """
        lengths = position_ids.amax(dim=-1) + 1 if self.lengths is None else self.lengths
        known: dict[int, tuple[torch.Tensor, float]] = {}
        rows = [self._frequencies(length, states.device, known) for length in lengths.tolist()]
        frequencies = torch.stack([inv_freq for inv_freq, _ in rows])[:, None]
        scaling = torch.tensor([scale for _, scale in rows], device=states.device)[:, None, None]
        angles = position_ids[..., None].to(states.device).float() * frequencies
        angles = torch.cat([angles, angles], dim=-1)
        return (angles.cos() * scaling).to(states.dtype), (angles.sin() * scaling).to(states.dtype)

    def _frequencies(
        self, length: int, device: torch.device, known: dict[int, tuple[torch.Tensor, float]]
    ) -> tuple[torch.Tensor, float]:
        """Inverse frequencies, `(head_dim / 2,)` float32, and the factor of cosines and sines."""
        if length not in known:
            make = ROPE_INIT_FUNCTIONS[self.config.rope_parameters["rope_type"]]
            # A tensor, as in transformers' own forward pass: the same arithmetic, to the last bit.
            known[length] = make(self.config, device, seq_len=torch.tensor(length, device=device))
        return known[length]
