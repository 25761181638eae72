"""From a run's description to what lies on disk: the model, the loss curves of its calibration, and its folder."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from squeeze.allocations import calibration
from squeeze.config import SqueezeConfig
from squeeze.errors import InputError
from squeeze.models import sources
from squeeze.runs.folder import run_folder
from squeeze.runs.spec import RunSpec

#: Calls a function with arguments, or gives what it gave before: `reader()` makes one.
Reader = Callable[..., Any]


def reader() -> Reader:
    """A function that calls its first argument with the others and remembers the answer as long as it lives, so that
    models and data are read once however many runs want them."""
    return cache(lambda read, *arguments: read(*arguments))


@dataclass(frozen=True)
class Model:
    """A run's model before it is loaded, and the configuration of its cache.

    Args:
        source: its name, and where that points to.
        folder: where its files are.
        kind: its architecture, transformers' `model_type`.
        positions: the most tokens of a sequence, see `squeeze.models.folder_config.positions`.
        identity: what tells it from another, see `squeeze.models.sources.identity`; None where weights are not needed.
        config: of the cache, complete; None for the full one.
    """

    source: sources.ModelSource
    folder: Path
    kind: str
    positions: int
    identity: dict[str, Any] | None
    config: SqueezeConfig | None


def resolve(spec: RunSpec, read: Reader, weights: bool = True) -> Model:
    """Find a run's model and complete the configuration of its cache: the architecture's algorithm where none is asked
    for, and the loss curves where the allocation needs them.

    Args:
        read: see `reader`.
        weights: False where the config and tokenizer will do; then curves are not read either.
    Raises:
        InputError: the model is not there or of another architecture than `--model_arch`, or there are no such curves.
    """
    source = read(sources.resolve, spec.model, spec.model_path)
    folder = read(sources.fetch, source, spec.allow_pickle, False)  # what a wrong model's gigabytes need not wait for
    from squeeze.models.folder_config import model_config, positions  # which take seconds to import

    described = read(model_config, folder)
    kind, most = described.model_type, positions(described)
    sources.check_arch(spec.model_arch, kind)
    config = spec.config(kind)
    if not weights:
        return Model(source, folder, kind, most, None, config)
    folder = read(sources.fetch, source, spec.allow_pickle, True)
    identity = read(sources.identity, source, folder, spec.allow_pickle)
    return Model(source, folder, kind, most, identity, with_curves(config, source.name, identity))


def with_curves(config: SqueezeConfig | None, name: str, model: dict[str, Any]) -> SqueezeConfig | None:
    """`config` with the loss curves of the model called `name`, where it needs them.

    Args:
        model: what tells it from another, see `squeeze.models.sources.identity`.
    Raises:
        InputError: there are none, or they are another model's.
    """
    if config is None or not config.allocator.has("calibration"):
        return config
    algorithm = config.algorithm_name
    assert algorithm is not None
    per = "head" if config.per == "head" else "layer"
    path = calibration.curves_file(name, algorithm, per)
    if not path.exists():
        raise InputError(
            f"{path} is not there, from which the allocation {config.allocation} makes budgets: "
            f"python -m squeeze.calibrate --model {name} --algorithm {shlex.quote(algorithm)}"
            f"{' --per head' if per == 'head' else ''}"
        )
    curves = calibration.read_calibration(path)
    curves.check(algorithm, config.evictor, curves.losses.shape[2], model)
    return dataclasses.replace(config, calibration=curves)


def named_folder(spec: RunSpec) -> Path:
    """The folder of a run whose model need not be at hand.

    Raises:
        InputError: the sizes are none.
    """
    assert spec.model is not None
    model_type = sources.guess_model_type(spec.model, spec.model_path, spec.model_arch)
    return folder_of(spec, sources.run_name(spec.model), spec.config(model_type), model_type)


def folder_of(spec: RunSpec, name: str, config: SqueezeConfig | None, model_type: str) -> Path:
    """A run's folder of predictions, of the model of that name and architecture."""
    folder = run_folder(spec.pred, name, config, model_type, spec.seed)
    return folder / "context" if spec.compress == "context" else folder
