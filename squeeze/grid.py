"""A sweep's YAML file → command lines of `pred.py`, one a run.

A key of the file is one of `pred.py`'s flags; a list of values makes it an axis of the grid. The full cache and a
uniform budget of every `ini_size` are added as baselines.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import yaml

from squeeze.config import BY_LOSS, InputError
from squeeze.files import read_bytes
from squeeze.flags import pred_parser

#: Flags that may have several values: each names its runs' folders.
AXES = ("model", "seed", "fidelity", "algorithm", "allocation", "ini_size", "KV_class3")

#: Flags that a squeezed cache has and the full one has not.
SQUEEZED = ("algorithm", "allocation", "ini_size", "KV_class3", "start_size", "compile", "prefill_chunk", "fidelity")

#: What a sweep decides on by itself.
OWN = ("help", "enable_squeeze", "overwrite")


@dataclass(frozen=True)
class Grid:
    """Args:
    runs: the flags of each run.
    left_out: points that cannot be, with the reason.
    """

    runs: list[list[str]]
    left_out: list[str]


def read_grid(path: Path, changes: Sequence[str] = ()) -> Grid:
    """Read a sweep's file.

    Args:
        changes: `key=value`, in place of what the file says.
    Raises:
        InputError: it is no YAML file of known keys, a size is no number, or the grid is empty.
    """
    found = _yaml(read_bytes(path), str(path))
    if not isinstance(found, dict):
        raise InputError(f"{path} is no sweep: it has no keys such as model, datasets, ini_size and KV_class3")
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            raise InputError(f"{change} is no change of {path}: write key=value, such as model=Mistral")
        found[key] = _yaml(value.encode(), change) or ""
    return expand({str(key): _values(path, str(key), value) for key, value in found.items()}, str(path))


def _yaml(text: bytes, where: str) -> Any:
    """What YAML says, all values as text, so that 0.03 is 3/100 and not the nearest binary number."""
    try:
        return yaml.load(text.decode("utf-8"), Loader=yaml.BaseLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{where} is not YAML: {' '.join(str(error).split())}") from None


def _values(path: Path, key: str, value: Any) -> list[str]:
    """A key's values as text."""
    flags = known_flags()
    if key in OWN:
        raise InputError(f"{path}: {key} is not for sweeps, which decide on it by themselves")
    if key not in flags:
        near = difflib.get_close_matches(key, flags, n=1, cutoff=0.4)
        hint = f": did you mean {near[0]}?" if near else f": a key is one of pred.py's flags, {', '.join(flags)}"
        raise InputError(f"{path}: there is no {key}{hint}")
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(one, str) for one in values):
        raise InputError(f"{path}: {key} must be a value or a list of values")
    values = [one for one in values if one]
    if key == "datasets":
        return [",".join(values)] if values else []
    if len(values) > 1 and key not in AXES:
        raise InputError(f"{path}: {key} must be one value; lists are for {', '.join(('datasets', *AXES))}")
    if flags[key] and not {one.lower() for one in values} <= {"true", "false"}:
        raise InputError(f"{path}: {key} must be true or false, got {', '.join(values)}")
    return [one.lower() if flags[key] else one for one in dict.fromkeys(values)]


def known_flags() -> dict[str, bool]:
    """The flags of `pred.py` that a sweep may have, and whether they are switches."""
    actions = pred_parser()._actions
    return {action.dest: action.nargs == 0 for action in actions if action.dest not in OWN}


def expand(values: dict[str, list[str]], where: str) -> Grid:
    """All points of a grid.

    Args:
        values: of each key, as text.
        where: they come from, for errors.
    """
    if not values.get("model"):
        raise InputError(f"{where}: the grid is empty, model has no value")
    if not values.get("ini_size"):
        raise InputError(f"{where}: the grid is empty, ini_size has no value")
    fixed = {key: found[0] for key, found in values.items() if key not in AXES and found}
    runs: dict[tuple[str, ...], None] = {}
    left_out: list[str] = []
    for point in _points(values, left_out):
        flags = fixed | point
        if "ini_size" not in point:
            flags = {key: value for key, value in flags.items() if key not in SQUEEZED}
        runs[tuple(command(flags))] = None
    if not runs:
        raise InputError(f"{where}: the grid is empty; left out: {'; '.join(left_out)}")
    return Grid([list(run) for run in runs], list(dict.fromkeys(left_out)))


def _points(values: dict[str, list[str]], left_out: list[str]) -> Iterator[dict[str, str]]:
    """The axes' values at each point; those that cannot be go to `left_out`."""
    for model in values["model"]:
        for seed in values.get("seed") or [""]:
            for fidelity in values.get("fidelity") or ["false"]:
                base = {"model": model, "fidelity": fidelity} | ({"seed": seed} if seed else {})
                if fidelity == "false":
                    yield base
                for algorithm in values.get("algorithm") or [""]:
                    some = base | ({"algorithm": algorithm} if algorithm else {})
                    for ini_size in (plain(number("ini_size", text)) for text in values["ini_size"]):
                        yield some | {"ini_size": ini_size, "KV_class3": ini_size}
                        for allocation in values.get("allocation") or ["squeeze"]:
                            if allocation in BY_LOSS:
                                yield some | {"allocation": allocation, "ini_size": ini_size}
                                continue
                            more = {"allocation": allocation} if allocation != "squeeze" else {}
                            for text in values.get("KV_class3") or []:
                                kv_class3 = class3(text, ini_size)
                                sizes = {"ini_size": ini_size, "KV_class3": kv_class3}
                                if number("KV_class3", kv_class3) > number("ini_size", ini_size):
                                    left_out.append(f"KV_class3 {text} is more than ini_size {ini_size}")
                                elif number("KV_class3", kv_class3) < number("ini_size", ini_size):
                                    yield some | more | sizes


def number(name: str, text: str) -> Decimal:
    """A size as an exact number; InputError if it is none."""
    try:
        found = Decimal(text)
    except InvalidOperation:
        raise InputError(f"{name} must be a number in (0, 1], got {text}") from None
    if not found.is_finite():
        raise InputError(f"{name} must be a number in (0, 1], got {text}")
    return found


def class3(text: str, ini_size: str) -> str:
    """`KV_class3` as decimal text: a fraction as it is, or a multiple of `ini_size` such as 0.5x."""
    if not text.endswith("x"):
        return plain(number("KV_class3", text))
    return plain(number("KV_class3", text[:-1]) * number("ini_size", ini_size))


def plain(size: Decimal) -> str:
    """A size as text in one way only, so that 0.20 and 0.2 are one run."""
    return f"{size.normalize():f}"


def command(flags: dict[str, str]) -> list[str]:
    """Flags as `pred.py` takes them."""
    switches = {name for name, switch in known_flags().items() if switch}
    found: list[str] = []
    for name in sorted(flags, key=list(known_flags()).index):
        if name == "ini_size":
            found.append("--enable_squeeze")
        if name not in switches:
            found += [f"--{name}", flags[name]]
        elif flags[name] == "true":
            found.append(f"--{name}")
    return found
