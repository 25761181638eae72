"""How positions are in what a layer caches, and how RoPE moves a cached key to another one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch
from transformers import PreTrainedModel

Encoding = Literal["rope", "none", "absolute", "unknown"]


@dataclass(frozen=True, eq=False)
class Rotation:
    """How a cached key (or value: latent attention) moves to another position by RoPE (arXiv 2104.09864).

    Attributes:
        part: what turns: `keys`, or `values` where latent attention caches its rotary part as the latter.
        start: first dimension that turns; `2 * len(inv_freq)` of them do.
        interleaved: the two dimensions of a pair are neighbours; else they are half of the rotary dimensions apart.
        direction: 1, or -1 where a model turns the other way (NanoChat).
        inv_freq: angle of each pair from one position to the next, `(rotary dimensions / 2,)`, float32.
    """

    part: Literal["keys", "values"]
    start: int
    interleaved: bool
    direction: int
    inv_freq: torch.Tensor

    def __call__(self, vectors: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Turn `(…, dim)` by `positions` `(…, 1)`, computed in float32; the dtype stays."""
        angles = positions.float() * self.inv_freq.to(vectors.device)
        cos, sin = angles.cos(), angles.sin()
        if self.direction < 0:
            sin = -sin
        stop = self.start + self.dims
        turning = vectors[..., self.start : stop].float()
        first, second = (turning[..., ::2], turning[..., 1::2]) if self.interleaved else turning.chunk(2, dim=-1)
        pair = first * cos - second * sin, second * cos + first * sin
        turned = torch.stack(pair, dim=-1).flatten(-2) if self.interleaved else torch.cat(pair, dim=-1)
        turned = turned.to(vectors.dtype)
        if self.dims == vectors.shape[-1]:
            return turned
        return torch.cat([vectors[..., : self.start], turned, vectors[..., stop:]], dim=-1)

    @property
    def dims(self) -> int:
        """Dimensions that turn."""
        return 2 * self.inv_freq.numel()

    def described(self) -> str:
        """As in `keys 0-15, halves`."""
        pairs = "neighbours" if self.interleaved else "halves"
        backwards = "" if self.direction > 0 else ", backwards"
        return f"{self.part} {self.start}-{self.start + self.dims - 1}, {pairs}{backwards}"


def inverse_frequencies(decoder: PreTrainedModel) -> list[torch.Tensor]:
    """RoPE's inverse frequencies as the rotary modules of `decoder` hold them now, each once: `(pairs,)`, float32."""
    named = decoder.named_buffers()
    held = [b for name, b in named if "inv_freq" in name and "original_inv_freq" not in name and not b.is_meta]
    width = getattr(decoder.config.get_text_config(decoder=True), "rotary_dim", None)
    if not held and width is not None:  # GPT-J and CodeGen keep sines and cosines alone
        held.append(10000.0 ** (-torch.arange(0, width, 2) / width))
    different: list[torch.Tensor] = []
    for buffer in held:
        with torch.inference_mode(False):  # they are used elsewhere, too
            frequencies = buffer.detach().to("cpu", torch.float32, copy=True)
        if not any(torch.equal(frequencies, other) for other in different):
            different.append(frequencies)
    return different


class Rotations:
    """Finds the rotation of each layer among those that a model's frequencies allow; layers that turn alike share it.

    Args:
        frequencies: see `inverse_frequencies`.
        positions: of the sequences, one token each, that the layers were given.
        tolerance: relative error that is rounding.
    """

    def __init__(self, frequencies: Sequence[torch.Tensor], positions: Sequence[int], tolerance: float):
        self.frequencies, self.tolerance = frequencies, tolerance
        self.by = torch.tensor([position - positions[0] for position in positions]).view(-1, 1, 1, 1)
        self.known: dict[tuple[object, ...], Rotation] = {}

    def find(
        self, stream: torch.Tensor | None, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[Encoding, Rotation | None]:
        """How positions are in `keys` and `values`, `(sequences, kv_heads, 1, dim)`, of sequences with the same token.

        Args:
            stream: what the layer was given, `(…, sequences, 1, hidden)`; of all three, the first sequences count.
        """
        count = len(self.by)
        keys, values = keys[:count], values[:count]
        if stream is None:
            return "unknown", None
        if not self._alike(stream.narrow(-3, 0, count), -3):
            return "absolute", None
        parts = {"keys": keys, "values": values}
        moving = [name for name, part in parts.items() if not self._alike(part, 0)]
        if not moving:
            return "none", None
        if len(moving) > 1:
            return "unknown", None
        part = parts[moving[0]]
        first = part[:1].expand_as(part)
        errors = {rotation: relative_error(rotation(first, self.by), part) for rotation in self._all(moving[0], part)}
        best = min(errors, key=errors.__getitem__, default=None)
        return ("rope", best) if best is not None and errors[best] < self.tolerance else ("unknown", None)

    def _all(self, name: str, part: torch.Tensor) -> list[Rotation]:
        """Each set of frequencies at the start and at the end of a head, in each way to pair and to turn."""
        found = []
        width = part.shape[-1]
        for number, inv_freq in enumerate(self.frequencies):
            spare = width - 2 * inv_freq.numel()
            for start, direction, interleaved in product(sorted({0, spare}), (1, -1), (False, True)):
                if spare >= 0:
                    key = name, number, start, direction, interleaved
                    new = Rotation(name, start, interleaved, direction, inv_freq)  # type: ignore[arg-type]
                    found.append(self.known.setdefault(key, new))
        return found

    def _alike(self, rows: torch.Tensor, dim: int) -> bool:
        return relative_error(rows, rows.narrow(dim, 0, 1).expand_as(rows)) < self.tolerance


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference over the norm of `wanted`."""
    norm = torch.linalg.vector_norm
    return (norm(found - wanted) / norm(wanted).clamp(min=1e-12)).item()
