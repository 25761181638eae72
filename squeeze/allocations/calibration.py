"""The file of a model's loss curves under an eviction method, which `--allocation calibrated` makes budgets from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import numpy as np
from msgspec import Meta

from squeeze.errors import InputError
from squeeze.evictors import EVICTORS, Evictor
from squeeze.storage.files import read_bytes, read_object
from squeeze.storage.paths import config_file
from squeeze.storage.schema import Count, Nats, Positive, check, shown
from squeeze.text import file_name

#: Of the file's format.
VERSION = 3

AGAIN = "make it again with python -m squeeze.calibrate"

#: Nats: what uniform budgets lose counts as no less where it is divided by.
LEAST = 1e-6

#: Exactly as `Fraction` writes it.
Ratio = Annotated[str, Meta(pattern=r"^[0-9]{1,40}(/[1-9][0-9]{0,39})?\Z")]


class AnyCurves(TypedDict):
    """Fields of the file that are read."""

    algorithm: str
    start_size: Count | None
    shares: Annotated[list[Ratio], Meta(min_length=1)]
    multiples: Annotated[list[Ratio], Meta(min_length=1)]
    model: dict[str, Any]
    loss: list[list[list[list[Nats]]]]
    kv_heads: NotRequired[Annotated[list[Positive], Meta(min_length=1)]]


class Curves(AnyCurves):
    """Fields of a built-in eviction method's file."""

    algorithm: Annotated[str, Meta(pattern=f"^({'|'.join(EVICTORS.names)})\\Z")]


class OwnCurves(AnyCurves):
    """Fields of the file of an eviction method of the user's own."""

    algorithm_parameters: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Calibration:
    """Loss curves of all layers.

    Args:
        algorithm: that evicted.
        start_size: sink tokens of an algorithm that has them; else None.
        parameters: of an algorithm that is not built in.
        shares: what every layer kept while one of them was cut, as fractions of the prompt, ascending.
        multiples: sizes of the layer that was cut, as multiples of the share, ascending.
        losses: KL divergence from the full cache in nats, `(prompts, shares, layers, multiples)`, or with `kv_heads`
            those of all layers' heads in the place of layers.
        model: what tells the model from another, see `squeeze.models.sources.identity`.
        source: the file, for errors.
        sha256: of the file.
        kv_heads: of each layer, where single heads were cut; else None.
    """

    algorithm: str
    start_size: int | None
    parameters: dict[str, Any]
    shares: tuple[Fraction, ...]
    multiples: tuple[Fraction, ...]
    losses: np.ndarray
    model: dict[str, Any]
    source: str
    sha256: str
    kv_heads: tuple[int, ...] | None = None

    @property
    def per(self) -> str:
        """What was cut: a `layer`, or a `head`."""
        return "layer" if self.kv_heads is None else "head"

    @property
    def name(self) -> str:
        """The file's name."""
        return Path(self.source).name

    def first(self, ini_size: Fraction) -> int:
        """Index of the smallest share that serves a total size: the first of no less, or the largest of all."""
        return next((index for index, share in enumerate(self.shares) if share >= ini_size), len(self.shares) - 1)

    def measurements(self, ini_size: Fraction) -> np.ndarray:
        """Curves for a total size, `(measurements, layers, multiples)`: of all prompts, at `ini_size` and above.

        More measurements are less noise, and those where the other layers keep more serve smaller sizes as well
        (docs/budgets.md).
        """
        return self.losses[:, self.first(ini_size) :].reshape(-1, *self.losses.shape[2:])

    def relative(self, index: int) -> np.ndarray:
        """Curves at one of the shares, to be looked at: in them no prompt outweighs the others.

        Returns:
            Mean over prompts of the losses in multiples of what uniform budgets lose, `(layers, multiples)`.
        """
        losses = self.losses[:, index]
        uniform = losses[:, :1, self.multiples.index(Fraction(1)), None]
        return (losses / np.maximum(uniform, LEAST)).mean(axis=0)

    def check(self, algorithm: str, evictor: Evictor, layers: int, model: dict[str, Any] | None = None) -> None:
        """Raises InputError unless the curves are those of this eviction method and, where it is given, this model."""
        if self.algorithm != algorithm:
            raise InputError(f"{self.source} was measured with {self.algorithm}, not with {algorithm}: {AGAIN}")
        if self.start_size not in (None, evictor.sinks):
            raise InputError(
                f"{self.source} was measured with start_size {self.start_size}, not {evictor.sinks}: {AGAIN}"
            )
        own = EVICTORS.record(algorithm, evictor).get("algorithm_parameters", {})
        if self.parameters != own:
            raise InputError(f"{self.source} was measured with parameters {self.parameters}, not {own}: {AGAIN}")
        if self.losses.shape[2] != layers or (model is not None and self.model != model):
            raise InputError(f"{self.source} was measured on another model than this one: {AGAIN}")


def curves_file(name: str, algorithm: str, per: str = "layer", to_write: bool = False) -> Path:
    """Path of the file of a model and an eviction method, or of the one to make: see `config_file`.

    Args:
        per: `layer`, or `head` for curves of KV heads.
    """
    heads = "-heads" if per == "head" else ""
    return config_file(f"calibration/{name}-{file_name(algorithm)}{heads}.json", to_write)


def read_calibration(path: Path | str) -> Calibration:
    """Read and check a file of loss curves.

    Raises:
        InputError: it is not there, of an unknown version, or not whole.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path} is not there: python -m squeeze.calibrate makes it")
    try:
        content = read_object(path)
        version = content.get("version")
        if version != VERSION:
            raise InputError(f"{path} is of version {shown(version)}, and {VERSION} is known here")
        curves = check(content, OwnCurves if "algorithm_parameters" in content else Curves, str(path))
    except InputError as error:
        raise InputError(f"{error}: {AGAIN}") from None
    shares, multiples = (tuple(map(Fraction, ratios)) for ratios in (curves["shares"], curves["multiples"]))
    ascending = all(list(ratios) == sorted(set(ratios)) and ratios[0] > 0 for ratios in (shares, multiples))
    try:
        losses = np.array(curves["loss"], dtype=np.float64)
    except ValueError:  # curves of different lengths
        losses = np.empty(0)
    kv_heads = curves.get("kv_heads")
    whole = losses.ndim == 4 and losses.shape[1::2] == (len(shares), len(multiples)) and losses.size > 0
    whole = whole and (kv_heads is None or losses.shape[2] == sum(kv_heads))
    if not (whole and ascending and shares[-1] <= 1 and Fraction(1) in multiples):
        raise InputError(f"{path} is damaged, its curves are not whole: {AGAIN}")
    return Calibration(
        algorithm=curves["algorithm"],
        start_size=curves["start_size"],
        parameters=content.get("algorithm_parameters", {}),
        shares=shares,
        multiples=multiples,
        losses=losses,
        model=curves["model"],
        source=str(path),
        sha256=hashlib.sha256(read_bytes(path)).hexdigest(),
        kv_heads=None if kv_heads is None else tuple(kv_heads),
    )
