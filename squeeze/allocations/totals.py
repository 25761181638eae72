"""Exact shares of tokens → whole budgets with the same total, within the bounds of every layer."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from squeeze.allocations.base import Budgets, PromptFacts


def conserve(
    shares: Sequence[Fraction],
    facts: PromptFacts,
    takers: Sequence[int] | None = None,
    classes: list[int] | None = None,
) -> Budgets:
    """Budgets whose sum is that of the shares, rounded down, unless the layers' bounds leave no such choice.

    Args:
        shares: tokens of each layer, exactly.
        takers: layers that get what a cap leaves over; None: all of them.
        classes: what `Budgets` says about them.
    """
    total, notes = within(int(sum(shares)), facts.layers, facts.cap, facts.least)
    capped = _give_back(shares, facts.cap, range(len(shares)) if takers is None else takers)
    return Budgets(round_to(_raise_to(capped, facts.least), total), classes, notes)


def within(total: int, layers: int, cap: int, least: int) -> tuple[int, tuple[str, ...]]:
    """Tokens that all layers together can have, and a sentence where that is not `total`."""
    if total < layers * least:
        return layers * least, (
            f"{total} tokens do not give {layers} layers their minimum of {least}: the total grows",
        )
    if total > layers * cap:
        unused = total - layers * cap
        return layers * cap, (f"the layers can hold {cap} tokens each, so {unused} of {total} stay unused",)
    return total, ()


def _give_back(shares: Sequence[Fraction], cap: int, takers: Sequence[int]) -> list[Fraction]:
    """Cap every share; what is left over goes evenly to the takers, up to the same cap."""
    left = sum((max(share - cap, Fraction(0)) for share in shares), Fraction(0))
    capped = [min(share, Fraction(cap)) for share in shares]
    while left and (open_layers := [layer for layer in takers if capped[layer] < cap]):
        each = min(left / len(open_layers), min(cap - capped[layer] for layer in open_layers))
        for layer in open_layers:
            capped[layer] += each
        left -= each * len(open_layers)
    return capped


def _raise_to(shares: Sequence[Fraction], least: int) -> list[Fraction]:
    """Raise low shares to `least`; the layers above pay, each in proportion to what it has above it."""
    missing = sum((max(least - share, Fraction(0)) for share in shares), Fraction(0))
    above = sum((max(share - least, Fraction(0)) for share in shares), Fraction(0))
    if not missing:
        return list(shares)
    kept = max(1 - missing / above, Fraction(0)) if above else Fraction(0)
    return [least + max(share - least, Fraction(0)) * kept for share in shares]


def round_to(shares: Sequence[Fraction], total: int) -> list[int]:
    """Largest-remainder rounding to whole tokens that sum to `total`; equal remainders favour the lower layer."""
    tokens = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: (tokens[i] - shares[i], i))
    for i in by_remainder[: total - sum(tokens)]:
        tokens[i] += 1
    return tokens
