"""A sweep's YAML file → the runs of its grid.

A key of the file is one of `pred.py`'s flags; a list of values makes it an axis of the grid. The full cache and a
uniform budget of every `ini_size` are added as baselines.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal, localcontext
from fractions import Fraction
from pathlib import Path

import yaml

from squeeze.allocations import ALLOCATIONS, DEFAULT
from squeeze.cli.arguments import check_text
from squeeze.errors import InputError
from squeeze.numbers import MOST_DIGITS, parse_fraction
from squeeze.runs.spec import FLAGS, SQUEEZED, RunSpec
from squeeze.text import shortened

#: Flags that a sweep may have, and those that it decides on by itself.
KEYS = {name: flag for name, flag in FLAGS.items() if flag.in_sweeps}
OWN = ("help", *(name for name in FLAGS if name not in KEYS))

#: Flags that may have several values: each names its runs' folders.
AXES = tuple(sorted((name for name in KEYS if KEYS[name].axis), key=lambda name: KEYS[name].axis))

#: Flags whose several values are parts of one run.
LISTS = ("datasets", "lengths", "depths")

#: Of a sweep's file, and of its grid: what is larger was not meant, and would take hours to read or to look at.
MOST_BYTES, MOST_POINTS = 1_000_000, 100_000

#: YAML's words for no value, where they are not in quotes.
NOTHING = ("", "~", "null", "Null", "NULL")


@dataclass(frozen=True)
class Grid:
    """The points of a sweep.

    Args:
        runs: each run, or the error in its values.
        left_out: points that cannot be, with the reason.
    """

    runs: list[RunSpec | InputError]
    left_out: list[str]


def read_grid(path: Path, changes: Sequence[str] = ()) -> Grid:
    """Read a sweep's file.

    Args:
        changes: `key=value`, in place of what the file says.
    Raises:
        InputError: it is no YAML file of known keys, each once, a size is no number, or the grid is empty or too
            large.
    """
    nodes = _keys(_compose(_read(path), str(path)), str(path))
    changed = set()
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            raise InputError(f"{shortened(change)} is no change of {path}: write key=value, such as model=Mistral")
        if key in changed:
            raise InputError(f"{shortened(key)} is changed twice: write its values as one list, key=[..., ...]")
        changed.add(key)
        nodes[key] = _compose(value.encode(), shortened(change))
    return expand({key: _values(path, key, node) for key, node in nodes.items()}, str(path))


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            text = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    if len(text) > MOST_BYTES:
        raise InputError(f"{path} is no sweep: it has more than {MOST_BYTES:,} bytes")
    return text


def _compose(text: bytes, where: str) -> yaml.Node | None:
    """A YAML document, all values as text, so that 0.03 is 3/100 and not the nearest binary number."""
    try:
        return yaml.compose(text.decode("utf-8"), Loader=yaml.BaseLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{where} is not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise InputError(f"{where} is no sweep: its values lie in one another without an end") from None


def _keys(node: yaml.Node | None, where: str) -> dict[str, yaml.Node | None]:
    """A file's keys, each of which is there once."""
    if not isinstance(node, yaml.MappingNode):
        raise InputError(f"{where} is no sweep: it has no keys such as model, datasets, ini_size and KV_class3")
    nodes: dict[str, yaml.Node | None] = {}
    lines: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise InputError(f"{where} line {line}: a key is not text")
        if key.value in nodes:
            raise InputError(
                f"{where} has {shortened(key.value)} twice, in lines {lines[key.value]} and {line}: "
                "write its values as one list"
            )
        nodes[key.value], lines[key.value] = value, line
    return nodes


def _values(path: Path, key: str, node: yaml.Node | None) -> list[str]:
    """A key's values as text."""
    check_text(f"{path}: a key", key)
    if key in OWN:
        raise InputError(f"{path}: {key} is not for sweeps, which decide on it by themselves")
    if key not in KEYS:
        near = difflib.get_close_matches(key, KEYS, n=1, cutoff=0.4) if len(key) < 100 else []
        hint = f": did you mean {near[0]}?" if near else f": a key is one of pred.py's flags, {', '.join(KEYS)}"
        raise InputError(f"{path}: there is no {shortened(key)}{hint}")
    values = _texts(node)
    if values is None:
        raise InputError(f"{path}: {key} must be a value or a list of values")
    for value in values:
        check_text(f"{path}: {key}", value)
    if key in LISTS:
        return [",".join(values)] if values else []
    if len(values) > 1 and key not in AXES:
        raise InputError(f"{path}: {key} must be one value; lists are for {', '.join((*LISTS, *AXES))}")
    switch = KEYS[key].read is None
    if switch and not {value.lower() for value in values} <= {"true", "false"}:
        raise InputError(f"{path}: {key} must be true or false, got {shortened(', '.join(values))}")
    return [value.lower() if switch else value for value in dict.fromkeys(values)]


def _texts(node: yaml.Node | None) -> list[str] | None:
    """The texts that a node is made of, those that say something; None if it is made of anything else."""
    tags = yaml.resolver.BaseResolver
    is_list = isinstance(node, yaml.SequenceNode) and node.tag == tags.DEFAULT_SEQUENCE_TAG
    nodes = node.value if is_list and node else [node] if node is not None else []
    if not all(isinstance(child, yaml.ScalarNode) and child.tag == tags.DEFAULT_SCALAR_TAG for child in nodes):
        return None
    return [child.value for child in nodes if child.value not in NOTHING or (child.style and child.value)]


def expand(values: dict[str, list[str]], where: str) -> Grid:
    """All points of a grid.

    Args:
        values: of each key, as text.
        where: they come from, for errors.
    """
    for key in ("model", "ini_size"):
        if not values.get(key):
            raise InputError(f"{where}: the grid is empty, {key} has no value")
    axes = {key: len(values.get(key) or [""]) for key in AXES}
    points = math.prod(axes[key] for key in ("model", "seed", "fidelity", "algorithm", "ini_size"))
    points *= (1 + axes["allocation"] * axes["KV_class3"]) * axes["per"]
    if points > MOST_POINTS:
        raise InputError(f"{where}: the grid has {points:,} points, and {MOST_POINTS:,} are the most: make several")
    fixed = {key: choices[0] for key, choices in values.items() if key not in AXES and choices}
    runs: dict[frozenset[tuple[str, str]], dict[str, str]] = {}
    left_out: list[str] = []
    for point in _points(values, left_out):
        texts = fixed | point
        if "ini_size" in point:
            texts["enable_squeeze"] = "true"
        else:
            texts = {key: text for key, text in texts.items() if key not in SQUEEZED}
        runs.setdefault(frozenset(texts.items()), texts)
    if not runs:
        raise InputError(f"{where}: the grid is empty; left out: {'; '.join(left_out)}")
    return Grid([_read_run(texts) for texts in runs.values()], list(dict.fromkeys(left_out)))


def _read_run(texts: dict[str, str]) -> RunSpec | InputError:
    try:
        return RunSpec.read(texts)
    except InputError as error:
        return error


def _points(values: dict[str, list[str]], left_out: list[str]) -> Iterator[dict[str, str]]:
    """The axes' values at each point; those that cannot be go to `left_out`."""
    known = {name: _pers(values, _by_head(name)) for name in values.get("allocation") or [DEFAULT]}
    left_out += [
        f"the allocation {name} knows only layers, and not per head" for name, pers in known.items() if not pers
    ]
    sizes = list(dict.fromkeys(plain(parse_fraction("ini_size", text)) for text in values["ini_size"]))
    for model in values["model"]:
        for seed in values.get("seed") or [""]:
            for fidelity in values.get("fidelity") or ["false"]:
                base = {"model": model, "fidelity": fidelity} | ({"seed": seed} if seed else {})
                if fidelity == "false":
                    yield base
                for algorithm in values.get("algorithm") or [""]:
                    point = base | ({"algorithm": algorithm} if algorithm else {})
                    for ini_size in sizes:
                        for per in _pers(values, by_head=False) or [{}]:  # the baseline of heads, too
                            yield point | per | {"ini_size": ini_size, "KV_class3": ini_size}
                        for allocation, pers in known.items():
                            for per in pers:
                                yield from _allocated(values, allocation, ini_size, point | per, left_out)


def _allocated(
    values: dict[str, list[str]], allocation: str, ini_size: str, point: dict[str, str], left_out: list[str]
) -> Iterator[dict[str, str]]:
    """The points of an allocation at one size."""
    if not _takes_class3(allocation, values):
        yield point | {"allocation": allocation, "ini_size": ini_size}
        return
    more = {"allocation": allocation} if allocation != DEFAULT else {}
    for text in values.get("KV_class3") or []:
        kv_class3 = class3(text, ini_size)
        larger = Fraction(kv_class3) - Fraction(ini_size)
        if larger > 0:
            left_out.append(f"KV_class3 {text} is more than ini_size {ini_size}")
        elif larger < 0:
            yield point | more | {"ini_size": ini_size, "KV_class3": kv_class3}


def _pers(values: dict[str, list[str]], by_head: bool) -> list[dict[str, str]]:
    """The values of `per` that an allocation can have; `layer`, the default, is not named."""
    named = [text for text in values.get("per") or ["layer"] if by_head or text != "head"]
    return [{} if text == "layer" else {"per": text} for text in named]


def _by_head(allocation: str) -> bool:
    """Whether an allocation can make budgets of heads; yes if there is no such one, as its run will say."""
    try:
        return ALLOCATIONS.find(allocation).kind.by_head
    except InputError:
        return True


def _takes_class3(allocation: str, values: dict[str, list[str]]) -> bool:
    """Whether an allocation's points differ by `KV_class3`; no if there is no such allocation, as its run will say."""
    try:
        strategy = ALLOCATIONS.find(allocation)
    except InputError:
        return False
    return "class3" in (strategy.fields if values.get("KV_class3") else strategy.required)


def class3(text: str, ini_size: str) -> str:
    """`KV_class3` as text: a fraction as it is, or a multiple of `ini_size` such as 0.5x."""
    if not text.endswith("x"):
        return plain(parse_fraction("KV_class3", text))
    multiple = parse_fraction("KV_class3", text[:-1])
    return plain(parse_fraction("KV_class3", multiple * Fraction(ini_size)))


def plain(size: Fraction) -> str:
    """A size as text in one way only, so that 0.20 and 0.2 are one run: decimal where it ends, else like 1/3."""
    with localcontext(prec=4 * MOST_DIGITS):  # as many as the longest decimal that ends can have
        decimal = (Decimal(size.numerator) / size.denominator).normalize()
    return f"{decimal:f}" if Fraction(decimal) == size else str(size)
