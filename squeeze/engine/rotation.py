"""How positions are in what a layer caches, and how RoPE moves a cached key to another one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch
from transformers import PreTrainedModel

#: What is still differs by less, root mean square of relative differences, and by 2 where nothing is alike.
MOVES = 0.05

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
        first, second = self.pairs(vectors.float())
        pair = first * cos - second * sin, second * cos + first * sin
        turned = torch.stack(pair, dim=-1).flatten(-2) if self.interleaved else torch.cat(pair, dim=-1)
        turned = turned.to(vectors.dtype)
        if self.dims == vectors.shape[-1]:
            return turned
        return torch.cat([vectors[..., : self.start], turned, vectors[..., stop:]], dim=-1)

    def pairs(self, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """First and second number of each pair, `(…, rotary dimensions / 2)`."""
        turning = vectors[..., self.start : self.start + self.dims]
        if self.interleaved:
            return turning[..., ::2], turning[..., 1::2]
        first, second = turning.chunk(2, dim=-1)
        return first, second

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
        positions: of the sequences with the same token, one token each, that the layers were given.
        tolerance: by how much of its length a pair of dimensions may be off.
    """

    def __init__(self, frequencies: Sequence[torch.Tensor], positions: Sequence[int], tolerance: float):
        self.frequencies, self.tolerance = frequencies, tolerance
        self.by = torch.tensor([position - positions[0] for position in positions]).view(-1, 1, 1, 1)
        self.known: dict[tuple[object, ...], Rotation] = {}

    def find(
        self, stream: torch.Tensor | None, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[Encoding, Rotation | None]:
        """How positions are in `keys` and `values`, `(sequences, kv_heads, 1, dim)`; the sequences with the same token
        come first.

        Args:
            stream: what the layer was given, `(…, sequences, 1, hidden)`.
        """
        if stream is None or stream.ndim < 3 or stream.shape[-3] != len(keys):
            return "unknown", None
        count = len(self.by)
        parts = {"keys": keys[:count], "values": values[:count]}
        if not alike(stream.narrow(-3, 0, count), stream.narrow(-3, 0, 1)):
            return "absolute", None
        moving = [name for name, part in parts.items() if not alike(part, part[:1])]
        if not moving:
            return "none", None
        if len(moving) > 1:
            return "unknown", None
        part = parts[moving[0]]
        errors = {rotation: self._error(rotation, part) for rotation in self._all(moving[0], part)}
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

    def _error(self, rotation: Rotation, part: torch.Tensor) -> float:
        """Mean distance of the pairs from where they should be, in lengths of a pair; infinite if others move, too."""
        turned = rotation(part[:1].expand_as(part), self.by)
        stop = rotation.start + rotation.dims
        if not alike(part[..., : rotation.start], part[:1, ..., : rotation.start]) or not alike(
            part[..., stop:], part[:1, ..., stop:]
        ):
            return torch.inf
        off, lengths = (torch.stack(rotation.pairs(vectors)).square().sum(0) for vectors in (turned - part, part))
        return (off / lengths.clamp(min=1e-12)).mean().sqrt().item()


def alike(rows: torch.Tensor, first: torch.Tensor) -> bool:
    """Whether rows are the first one up to rounding, number by number: keys may have biases that dwarf what turns."""
    off = 2 * (rows - first).abs() / (rows.abs() + first.abs()).clamp(min=1e-12)
    return rows.numel() == 0 or off.square().mean().sqrt().item() < MOVES
