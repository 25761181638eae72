"""Exact shares of tokens → whole budgets with the same total, within the bounds of every layer.

A total is of keys and values: a token weighs as many of them as its layer is wide (`PromptFacts.weights`). Where all
layers are equally wide, that is a total of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from operator import mul

from squeeze.allocations.base import Budgets, PromptFacts


def conserve(
    shares: Sequence[Fraction],
    facts: PromptFacts,
    takers: Sequence[int] | None = None,
    classes: list[int] | None = None,
) -> Budgets:
    """Budgets whose total is that of the shares, rounded down, unless the layers' bounds leave no such choice.

    Where layers are not equally wide, less than one token of the widest can stay unused.

    Args:
        shares: tokens of each layer, exactly.
        takers: layers that get what a cap leaves over, before all others do; None: all of them.
        classes: what `Budgets` says about them.
    """
    total, notes = within(int(weigh(shares, facts)), facts)
    return Budgets(round_to(bounded(shares, facts, takers), total, facts.weights), classes, notes)


def divide(parts: Sequence[Fraction], ini_size: Fraction, facts: PromptFacts) -> Budgets:
    """Budgets of the total of uniform ones, of which every layer first gets its least, and then its part.

    Args:
        parts: of each layer, in any unit: what it gets above its least goes by them, times its reach above it.
        ini_size: budget of every layer in uniform ones, as a fraction of its reach.
    """
    uniform = [ini_size * tokens for tokens in facts.reach]
    above = [max(tokens - least, 0) for tokens, least in zip(facts.reach, facts.least, strict=True)]
    wanted = [part * tokens for part, tokens in zip(parts, above, strict=True)]
    left = weigh(uniform, facts) - weigh(facts.least, facts)
    if left <= 0 or not any(wanted):
        return conserve(uniform, facts)
    scale = left / weigh(wanted, facts)
    return conserve([least + tokens * scale for least, tokens in zip(facts.least, wanted, strict=True)], facts)


def weigh(tokens: Sequence[Fraction | int], facts: PromptFacts) -> Fraction:
    """The total of some tokens in each layer."""
    return sum((Fraction(count) * weight for count, weight in zip(tokens, facts.weights, strict=True)), Fraction(0))


def within(total: int, facts: PromptFacts) -> tuple[int, tuple[str, ...]]:
    """The total that all layers together can have, and a sentence where that is not `total`."""
    lowest, highest = int(weigh(facts.least, facts)), int(weigh(facts.caps, facts))
    if total < lowest:
        note = f"{_amount(total, facts)} do not give {facts.layers} layers their minimum of {max(facts.least)}"
        return lowest, (f"{note}: the total grows",)
    if total > highest:
        alike = len(set(facts.caps)) == len(set(facts.widths)) == 1
        held = f"{facts.caps[0]} tokens each" if alike else f"{_amount(highest, facts)} together"
        return highest, (f"the layers can hold {held}, so {total - highest} of {total} stay unused",)
    return total, ()


def _amount(total: int, facts: PromptFacts) -> str:
    """A total in words; its unit is no token where layers differ in their widths."""
    if max(facts.weights) == 1:
        return f"{total} tokens"
    return f"{total} times {math.gcd(*facts.widths)} numbers of keys and values"


def bounded(shares: Sequence[Fraction], facts: PromptFacts, takers: Sequence[int] | None = None) -> list[Fraction]:
    """Shares of the same total within the bounds of every layer, as far as there are such: see `conserve`."""
    return _raise_to_least(_give_back(shares, facts, takers), facts)


def _give_back(shares: Sequence[Fraction], facts: PromptFacts, takers: Sequence[int] | None) -> list[Fraction]:
    """Cap every share; what is left over goes evenly to the takers, and what they cannot hold evenly to the others."""
    caps, weights = facts.caps, facts.weights
    capped = [min(share, Fraction(cap)) for share, cap in zip(shares, caps, strict=True)]
    left = weigh(shares, facts) - weigh(capped, facts)
    everyone = range(len(shares))
    for group in (everyone if takers is None else takers, everyone):
        while left and (open_layers := [layer for layer in group if capped[layer] < caps[layer]]):
            of_one_each = sum(weights[layer] for layer in open_layers)
            each = min(left / of_one_each, *(caps[layer] - capped[layer] for layer in open_layers))
            for layer in open_layers:
                capped[layer] += each
            left -= each * of_one_each
    return capped


def _raise_to_least(shares: Sequence[Fraction], facts: PromptFacts) -> list[Fraction]:
    """Raise low shares to their least; the layers above pay, each in proportion to what it has above it."""
    above = [max(share - least, Fraction(0)) for share, least in zip(shares, facts.least, strict=True)]
    missing = weigh(facts.least, facts) + weigh(above, facts) - weigh(shares, facts)
    if not missing:
        return list(shares)
    kept = max(1 - missing / weigh(above, facts), Fraction(0)) if any(above) else Fraction(0)
    return [least + more * kept for least, more in zip(facts.least, above, strict=True)]


def round_to(shares: Sequence[Fraction], total: int, weights: Sequence[int]) -> list[int]:
    """Whole tokens of a total by largest remainder; equal remainders favour the lower layer.

    Args:
        shares: within the layers' bounds, and of the total, or over it by less than its unit.
        total: what tokens may come to; where layers differ in their weights, they can miss it by less than the
            heaviest.
        weights: of one token in each layer.
    """
    tokens = [int(share) for share in shares]
    left = total - sum(map(mul, tokens, weights))
    for layer in sorted(range(len(shares)), key=lambda i: (tokens[i] - shares[i], i)):
        if tokens[layer] < shares[layer] and weights[layer] <= left:
            tokens[layer] += 1
            left -= weights[layer]
    return tokens
