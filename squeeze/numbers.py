"""Numbers as users write them: exact fractions, and whole numbers within their bounds."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from squeeze.errors import InputError
from squeeze.text import shortened

#: Of tokens, rows, prompts and rounds; there are no more of anything that one run could hold.
MOST = 2**31 - 1

#: What PyTorch's random number generators take.
MOST_SEED = 2**64 - 1

#: Of a fraction, above or below the line.
MOST_DIGITS = 100

#: Decimal text, in the digits that every program reads alike.
DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,9})?")
QUOTIENT = re.compile(r"[+-]?[0-9]+/[0-9]+")


def parse_fraction(name: str, value: str | float | Fraction) -> Fraction:
    """Read a fraction exactly as it is written, so that 0.03 means 3/100 and not the nearest binary number.

    Args:
        name: what the value is called in the error message.
        value: decimal text or text such as 1/3, or a number, of which the shortest decimal form counts.
    Raises:
        InputError: `value` is no such number, or one of more than `MOST_DIGITS` digits.
    """
    try:
        fraction = value if isinstance(value, Fraction) else _fraction(str(value).strip())
    except (ValueError, ZeroDivisionError):
        raise InputError(f"{name} must be a number in (0, 1], got {shown(value)}") from None
    if max(abs(fraction.numerator), fraction.denominator) > 10**MOST_DIGITS:
        raise InputError(f"{name} must be a number in (0, 1] of at most {MOST_DIGITS} digits, got {shown(value)}")
    return fraction


def _fraction(text: str) -> Fraction:
    """A text's fraction; ValueError or ZeroDivisionError where it is none. A huge exponent is not computed with."""
    if len(text) > 4 * MOST_DIGITS or not (DECIMAL.fullmatch(text) or QUOTIENT.fullmatch(text)):
        raise ValueError
    exponent = int(text.lower().partition("e")[2] or 0)
    return Fraction(10) ** (2 * MOST_DIGITS) if abs(exponent) > 2 * MOST_DIGITS else Fraction(text)


def shown(value: object) -> str:
    """A value in an error; one that Python refuses to write has thousands of digits."""
    try:
        return shortened(str(value))
    except ValueError:
        return "one of thousands of digits"


def number_within(name: str, value: object, words: str, fits: Callable[[Any], bool]) -> None:
    """Raises InputError unless `value` is a number that fits; `words` say which do."""
    if isinstance(value, bool) or not isinstance(value, int | float | Fraction) or not fits(value):
        raise InputError(f"{name} must be {words}, got {shown(value)}")


def whole_number(name: str, value: object, least: int, words: str = "a whole number", most: int = MOST) -> None:
    """Raises InputError unless `value` is a whole number from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        limit = f" and at most {most}" if isinstance(value, int) and value > most else ""
        raise InputError(f"{name} must be {words}, {least} or more{limit}, got {shown(value)}")
