"""Strategies by name: built-in ones, those of installed packages, and classes of a user's own files.

A strategy is an evictor or an allocation: a class whose parameters are the fields of a frozen dataclass. The text that
names one is a name, or `package.module:Class`, and its parameters in brackets where they are not the defaults:
`my_file:MyEvictor(window=16)`.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import json
import os
import re
import sys
import traceback
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar, Generic, TypeVar

from squeeze.errors import InputError
from squeeze.text import shortened

#: Fields that flags of the commands give, in every strategy that has them.
FLAGS = {
    "sinks": "--start_size",
    "ini_size": "--ini_size",
    "class3": "--KV_class3",
    "calibration": "python -m squeeze.calibrate",
}

#: Types of parameters that are checked before a class sees them, by the names that annotations have.
SIMPLE: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}

#: Characters of a text that names a strategy.
MOST_TEXT = 1000


class Strategy:
    """The base of evictors and allocations.

    Attributes:
        name: what the command line calls the class; `module:Class` where it says nothing else.
        built_in: whether the class is this project's; what others give is checked while it runs.
    """

    name: ClassVar[str]
    built_in: ClassVar[bool]

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        cls.built_in = cls.__module__.startswith("squeeze.")
        if "name" not in vars(cls):
            cls.name = f"{cls.__module__}:{cls.__qualname__}"

    @property
    def parameters(self) -> dict[str, Any]:
        """Values of all fields but those that flags give, by name."""
        return {name: getattr(self, name) for name in fields_of(type(self)) if name not in FLAGS}

    @classmethod
    def has(cls, parameter: str) -> bool:
        """True if the class has that parameter."""
        return parameter in fields_of(cls)

    def __str__(self) -> str:
        return spelled(self.name, fields_of(type(self)), self.parameters)


def fields_of(kind: type) -> dict[str, Field[Any]]:
    """The parameters of a class of strategies, by name; none of a class that is no dataclass."""
    return {field.name: field for field in fields(kind) if field.init} if is_dataclass(kind) else {}


def spelled(name: str, known: Mapping[str, Field[Any]], parameters: Mapping[str, Any]) -> str:
    """A strategy as text: its name, and the parameters that are not the defaults, in the order of the fields."""
    given = [key for key in known if key in parameters and parameters[key] != known[key].default]
    return name + (f"({', '.join(f'{key}={parameters[key]!r}' for key in given)})" if given else "")


S = TypeVar("S", bound=Strategy)


@dataclass(frozen=True)
class Named(Generic[S]):
    """A class of strategies as a text names it.

    Args:
        name: without parameters.
        kind: the class.
        parameters: those that the text gives.
        label: the name in errors.
    """

    name: str
    kind: type[S]
    parameters: dict[str, Any]
    label: str

    @property
    def fields(self) -> dict[str, Field[Any]]:
        """All parameters of the class."""
        return fields_of(self.kind)

    @property
    def required(self) -> list[str]:
        """Parameters that have no default."""
        return [key for key, field in self.fields.items() if field.default is field.default_factory is MISSING]

    @property
    def text(self) -> str:
        """The spelling of all texts that mean the same, without the parameters that flags give."""
        own = {key: value for key, value in self.parameters.items() if key not in FLAGS}
        return spelled(self.name, self.fields, own)

    def make(self, given: Mapping[str, Any]) -> S:
        """Make the strategy.

        Args:
            given: values of fields beside those in the text; those that the class does not have are left out.
        Raises:
            InputError: a parameter is missing, or the class refuses its value.
        """
        values = {key: value for key, value in given.items() if key in self.fields and value is not None}
        values |= self.parameters
        missing = [key for key in self.required if key not in values]
        if missing:
            shown = ", ".join(f"{key}=..." for key in missing)
            raise InputError(f"{self.label} needs {', '.join(missing)}: write {self.name}({shown})")
        try:
            return self.kind(**values)
        except InputError:
            raise
        except Exception as error:  # whatever a class of the user's own raises over its parameters
            if self.kind.built_in:
                raise
            raise InputError(f"{self.label} refuses its parameters: {_message(error)}") from error


class Registry(Generic[S]):
    """All strategies of a kind.

    Args:
        option: what a strategy is asked for by, `algorithm` or `allocation`.
        group: entry points of installed packages that add more.
        base: the class that all of them inherit.
        built_in: where each class is, `module:Class`, by name. Nothing is imported before it is used: evictors
            import torch.
    """

    def __init__(self, option: str, group: str, base: type[S], built_in: Mapping[str, str]) -> None:
        self.option, self.group, self.base, self.built_in = option, group, base, built_in

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the built-in strategies."""
        return tuple(self.built_in)

    def check(self, text: str, option: str | None = None) -> None:
        """Raises InputError unless `text` names a strategy; `option` is what the error calls it."""
        if text not in self.built_in:
            self.find(text, option)

    def find(self, text: str, option: str | None = None) -> Named[S]:
        """The class that a text names, with the parameters in it.

        Raises:
            InputError: there is none, it cannot be imported, it is no strategy of this kind, or a parameter is wrong.
        """
        option = option or self.option
        name, parameters = _parse(text, option)
        label = f"{option} {shortened(name)}"
        if name in self.built_in:
            kind = _attribute(importlib.import_module(self.built_in[name].partition(":")[0]), self.built_in[name])
        else:
            kind = self._load(name, label, option)
        _check_parameters(kind, parameters, label)
        return Named(name, kind, parameters, label)

    def record(self, text: str, made: S) -> dict[str, Any]:
        """Every parameter of a strategy that is not built in, beside those that flags give, for files."""
        if text in self.built_in:
            return {}
        return {f"{self.option}_parameters": json.loads(json.dumps(made.parameters, default=str))}

    def _load(self, name: str, label: str, option: str) -> Any:
        """A class that is not built in."""
        path = name if ":" in name else self._entry_point(name, option).value
        if not re.fullmatch(r"[\w.]+:[\w.]+", path):
            raise InputError(f"{label} must be written package.module:Class, got {shortened(path)}")
        if os.getcwd() not in sys.path:  # commands are run where a user's own file is
            sys.path.append(os.getcwd())
        try:
            module = importlib.import_module(path.partition(":")[0])
        except Exception as error:  # whatever a file of the user's own raises
            raise InputError(f"{label} cannot be imported: {_message(error)}") from error
        kind = _attribute(module, path)
        if kind is None:
            near = difflib.get_close_matches(path.partition(":")[2], vars(module), n=1)
            hint = f": did you mean {near[0]}?" if near else ""
            raise InputError(f"{label} is not there: {module.__name__} has no {path.partition(':')[2]}{hint}")
        if not (isinstance(kind, type) and issubclass(kind, self.base)):
            raise InputError(
                f"{label} is no {self.base.__name__.lower()}: it must be a class that inherits "
                f"squeeze.{self.base.__name__}"
            )
        missing = sorted(getattr(kind, "__abstractmethods__", ()))
        if missing:
            raise InputError(f"{label} lacks {', '.join(missing)}")
        if set(inspect.signature(kind).parameters) != set(fields_of(kind)):
            raise InputError(f"{label} is no dataclass: write @dataclass(frozen=True) above the class")
        return kind

    def _entry_point(self, name: str, option: str) -> EntryPoint:
        """The entry point that an installed package registers under a name."""
        points = entry_points(group=self.group)
        matches = {point.value: point for point in points if point.name == name}
        if len(matches) > 1:
            raise InputError(f"{option} {name} is {' and '.join(sorted(matches))}: write the one that you mean")
        for point in matches.values():
            return point
        known = list(dict.fromkeys([*self.built_in, *sorted(points.names)]))
        near = difflib.get_close_matches(name, known, n=2, cutoff=0.5) if len(name) < 100 else []
        hint = f": did you mean {' or '.join(near)}?" if near else " (a class of your own is package.module:Class)"
        raise InputError(f"{option} must be one of {', '.join(known)}, got {shortened(name)}{hint}")


def _attribute(module: Any, path: str) -> Any:
    """The object called `Class` in `module:Class`; None where there is none."""
    attribute = module
    for part in path.partition(":")[2].split("."):
        attribute = getattr(attribute, part, None)
    return attribute


def _parse(text: str, option: str) -> tuple[str, dict[str, Any]]:
    """A name, and the parameters behind it."""
    name, bracket, rest = text.strip().partition("(")
    if not bracket:
        return name, {}
    try:
        call = ast.parse(f"f({rest}", mode="eval").body if len(text) <= MOST_TEXT else None
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise ValueError
        parameters = {keyword.arg or "": ast.literal_eval(keyword.value) for keyword in call.keywords}
        if len(parameters) < len(call.keywords) or "" in parameters:
            raise ValueError
        json.dumps(parameters, allow_nan=False)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        raise InputError(
            f"{option} must be a name, or a name with parameters such as {name or 'name'}(window=16), which are "
            f"numbers, text, True, False, None or lists of these, got {shortened(text)}"
        ) from None
    return name.strip(), parameters


def _check_parameters(kind: type[Strategy], parameters: Mapping[str, Any], label: str) -> None:
    """Raises InputError for parameters that a class has not, that a flag gives, or that are of another type."""
    known = fields_of(kind)
    for key, value in parameters.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f": did you mean {near[0]}?" if near else f": it has {', '.join(known) or 'none'}"
            raise InputError(f"{label} has no parameter {shortened(key)}{hint}")
        if key in FLAGS and key != "sinks":
            raise InputError(f"{label}: {key} comes from {FLAGS[key]}: leave it out here")
        wanted = str(getattr(known[key].type, "__name__", known[key].type))
        if type(value) not in SIMPLE.get(wanted, (type(value),)):
            raise InputError(f"{label}: {key} must be {wanted}, got {shortened(repr(value))}")


def _message(error: Exception) -> str:
    """An exception in one line, with the place in the user's file that raised it."""
    message = " ".join(str(error).split())
    frames = traceback.extract_tb(error.__traceback__)
    loaders = (__file__, importlib.__file__)
    own = [frame for frame in frames if frame.filename[0] != "<" and frame.filename not in loaders]
    where = f" ({os.path.basename(own[0].filename)} line {own[0].lineno})" if own else ""
    return f"{type(error).__name__}: {message}{where}" if message else f"{type(error).__name__}{where}"
