"""How a layer's attention enters the residual stream, found among what the modules of its block were given and gave.

The stream after attention is a sum of the stream before it and of attention's output, through a norm or not, scaled or
not. A later module of the block is given that sum, or the block gives it, alone or with other branches added (parallel
attention). Sums are tried by least squares, and the one that leaves no more than rounding is the rule.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import NamedTuple

import torch
from torch import nn

#: A factor below this is none.
SMALL = 1e-2


@dataclass(frozen=True, eq=False)
class Residual:
    """The stream after attention is `of_stream * x + of_branch * output of branch`, x the first input of `entry`.

    Attributes:
        entry: the norm before attention, or the block.
        branch: attention, or the module after it whose output is added.
        of_stream: 1, or 0 where attention adds x itself (Bloom).
        of_branch: 1, or less where a model scales its branches (Granite).
        rule: that in words, `x + 0.22·self_attn`, the branch by its name in the block.
    """

    entry: nn.Module
    branch: nn.Module
    of_stream: float
    of_branch: float
    rule: str


class Call(NamedTuple):
    """A module's first input and first output in a forward pass, float32 on the CPU; None: it is no tensor."""

    module: nn.Module
    given: torch.Tensor | None
    gave: torch.Tensor | None


class Rule(NamedTuple):
    """A Residual whose modules are named by their places in a block; the block itself is ``""``."""

    entry: str
    branch: str
    of_stream: float
    of_branch: float

    def __str__(self) -> str:
        scale = "" if self.of_branch == 1 else f"{self.of_branch:.3g}·"
        return f"{'x + ' if self.of_stream else ''}{scale}{self.branch}"


class Fit(NamedTuple):
    error: float
    rule: Rule


def find_residuals(
    attentions: Sequence[tuple[nn.Module, nn.Module]],
    calls: Sequence[Call],
    scales: Sequence[float],
    tolerance: float,
) -> list[Residual | None]:
    """The rule of each attention module; None where none is found.

    Blocks of one class get one rule, the one with the least error over all of them, unless it does not fit a block:
    in bfloat16, blocks looked at by themselves differ by their rounding.

    Args:
        attentions: attention module and the block around it, one pair a layer.
        calls: in the order in which modules returned, all modules of the decoder.
        scales: factors of a branch that the configuration speaks of.
        tolerance: relative error that is rounding.
    """
    traces = [_Trace(module, block, calls, scales, tolerance) for module, block in attentions]
    groups = defaultdict(list)
    for trace in traces:
        groups[type(trace.block), trace.names[trace.attention]].append(trace)
    found = {}
    for group in groups.values():
        rules = next(filter(None, ([fit.rule for fit in trace.fits] for trace in group)), [])
        errors = {rule: [trace.error(rule) for trace in group] for rule in rules}
        totals = {rule: sum(min(error, tolerance) for error in errors[rule]) for rule in rules}
        best = _first_of_least([Fit(total, rule) for rule, total in totals.items()])
        for index, trace in enumerate(group):
            fits = best is not None and errors[best][index] < tolerance
            found[trace] = trace.residual(best if fits else _first_of_least(trace.fits))
    return [found[trace] for trace in traces]


def _first_of_least(fits: Sequence[Fit]) -> Rule | None:
    """Of rules that differ by rounding alone the first: attention itself, and not a dropout after it."""
    least = min((fit.error for fit in fits), default=0.0)
    return next((fit.rule for fit in fits if fit.error <= 1.5 * least + 1e-6), None)


class _Trace:
    """What happened in one block around its attention.

    Attributes:
        streams: the modules that may be `entry`, with their inputs.
        branches: attention, and what is made of its output alone: wrappers, norms, dropouts; with their outputs.
        targets: what may be the stream after attention, with or without other branches: inputs of later modules, and
            the block's output.
        calls: all of the block, in the order in which they ended; beside: those of other branches.
        inner: outputs of modules inside attention.
    """

    def __init__(
        self, attention: nn.Module, block: nn.Module, calls: Sequence[Call], scales: Sequence[float], tolerance: float
    ):
        self.attention, self.block, self.scales, self.tolerance = attention, block, scales, tolerance
        self.names = {module: name for name, module in block.named_modules()}
        calls = [call for call in calls if call.module in self.names]
        where = next(index for index, call in enumerate(calls) if call.module is attention)
        own = next(call for call in calls if call.module is block)
        before, at, after = calls[:where], calls[where], calls[where + 1 :]
        norms = [call for call in before if call.given is not None and _same(call.gave, at.given)]
        self.streams = [(call.module, call.given) for call in [*norms[:1], own] if call.given is not None]
        inside, children = set(attention.modules()), set(block.children())
        self.inner = [call.gave for call in before if call.module in inside]
        self.branches, self.targets = [(attention, at.gave)], []
        self.calls, self.beside = calls, [call for call in before if call.module in children]
        for call in after:
            if call.module is block:
                self.targets.append(call.gave)
            elif self._is_around(call.module) or _same(call.given, self.branches[-1][1]):
                self.branches += [(call.module, call.gave)] if call.gave is not None else []
            else:
                self.targets.append(call.given)
                self.beside.append(call)

    @cached_property
    def others(self) -> list[torch.Tensor | None]:
        """Outputs of other branches: what no module takes, but dropouts that do nothing, is added, if anything."""
        taken = [call.given for call in self.calls if not _same(call.given, call.gave)]
        return [call.gave for call in self.beside if not any(_same(call.gave, given) for given in taken)]

    def _is_around(self, module: nn.Module) -> bool:
        return self.names[self.branches[-1][0]].startswith(self.names[module] + ".")

    @cached_property
    def fits(self) -> list[Fit]:
        """Rules that leave nothing but rounding; sums with other branches only where there is none without."""
        for entry, x in self.streams:
            tried = ([self._inside(self.names[entry], x)], self._sums(entry, x, False), self._sums(entry, x, True))
            for fits in tried:
                found = [fit for fit in fits if fit.error < self.tolerance]
                if found:
                    return found
        return []

    def _inside(self, entry: str, x: torch.Tensor) -> Fit:
        """Attention that adds the stream itself: its output is x and what a module inside it gave."""
        rule = Rule(entry, self.names[self.attention], 0.0, 1.0)
        made = _shaped([self.branches[0][1]], x)
        sums = [_solve([x, part], output) for output in made for part in _shaped(self.inner, x)]
        return Fit(min((error for weights, error in sums if min(map(abs, weights)) > SMALL), default=torch.inf), rule)

    def _sums(self, entry: nn.Module, x: torch.Tensor, with_others: bool) -> list[Fit]:
        """For each branch and target: its factors 1 and what the configuration says, and at last what fits best."""
        others = _shaped(self.others, x) if with_others else []
        told: list[Fit] = []
        fitted: list[Fit] = []
        for branch, output in self.branches:
            for made, target in product(_shaped([output], x), _shaped(self.targets, x)):
                (of_stream, of_branch, *_), _ = _solve([x, made, *others], target)
                scales = [1.0, *self.scales]
                best = of_branch / of_stream if min(abs(of_stream), abs(of_branch)) > SMALL else 1.0
                new = [best] if all(abs(best - scale) > 1e-3 * scale for scale in scales) else []
                for fits, factors in ((told, scales), (fitted, new)):
                    for factor in factors:
                        rule = Rule(self.names[entry], self.names[branch], 1.0, factor)
                        fits.append(Fit(self._error(x + factor * made, others, target), rule))
        return told + fitted

    def _error(self, stream: torch.Tensor, others: list[torch.Tensor], target: torch.Tensor) -> float:
        """Of a target as a sum of the stream and other branches; infinite where the stream has no part in it."""
        weights, error = _solve([stream, *others], target)
        return error if abs(weights[0]) > SMALL else torch.inf

    def error(self, rule: Rule) -> float:
        """Of a rule that was found in a block of the same class; infinite where it is not one of this block."""
        x = next((given for module, given in self.streams if self.names[module] == rule.entry), None)
        made = next((gave for module, gave in self.branches if self.names[module] == rule.branch), None)
        if x is None or made is None or made.numel() != x.numel():
            return torch.inf
        if not rule.of_stream:
            return self._inside(rule.entry, x).error
        stream = x + rule.of_branch * made.reshape(x.shape)
        alone = self._least(stream, [])
        return alone if alone < self.tolerance else self._least(stream, _shaped(self.others, x))

    def _least(self, stream: torch.Tensor, others: list[torch.Tensor]) -> float:
        errors = (self._error(stream, others, target) for target in _shaped(self.targets, stream))
        return min(errors, default=torch.inf)

    def residual(self, rule: Rule | None) -> Residual | None:
        """The rule with this block's modules."""
        if rule is None:
            return None
        entry, branch = (self.block.get_submodule(name) for name in (rule.entry, rule.branch))
        return Residual(entry, branch, rule.of_stream, rule.of_branch, str(rule))


def _shaped(tensors: Sequence[torch.Tensor | None], like: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.reshape(like.shape) for tensor in tensors if tensor is not None and tensor.numel() == like.numel()]


def _same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is not None and b is not None and a.shape == b.shape and torch.equal(a, b)


def _solve(basis: Sequence[torch.Tensor], target: torch.Tensor) -> tuple[list[float], float]:
    """Factors with which `basis` adds up to `target`, and the relative error that is left.

    Each number counts relative to its own size, as its rounding is: a few dimensions of a stream are often a thousand
    times larger than all others, and would decide alone.
    """
    columns = torch.stack([*basis, target]).flatten(1).double()
    sizes = columns[0].abs() + columns[-1].abs()
    columns = columns / sizes.clamp(min=1e-6 * sizes.max().item() + 1e-30)
    products = columns @ columns.T  # all that least squares need, and a few numbers
    weights = torch.linalg.lstsq(products[:-1, :-1], products[:-1, -1:]).solution[:, 0]
    norm = torch.linalg.vector_norm
    return weights.tolist(), (norm(columns[-1] - weights @ columns[:-1]) / norm(columns[-1]).clamp(min=1e-12)).item()
