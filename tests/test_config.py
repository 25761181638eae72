"""SqueezeConfig: every bad value is a sentence that names it."""

import math
from fractions import Fraction

import pytest

from squeeze.config import SqueezeConfig
from squeeze.errors import InputError
from squeeze.numbers import parse_fraction


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ini_size": "1.5", "kv_class3": "0.1"}, r"ini_size must be in \(0, 1\], got 1.5"),
        ({"ini_size": 0, "kv_class3": "0.1"}, r"ini_size must be in \(0, 1\], got 0"),
        ({"ini_size": -0.1, "kv_class3": "0.1"}, r"ini_size must be in \(0, 1\], got -0.1"),
        ({"ini_size": "nan", "kv_class3": "0.1"}, "ini_size must be a number .* got nan"),
        ({"ini_size": math.inf, "kv_class3": "0.1"}, "ini_size must be a number .* got inf"),
        ({"ini_size": "a lot", "kv_class3": "0.1"}, "ini_size must be a number .* got a lot"),
        ({"ini_size": "0.2", "kv_class3": "0.3"}, r"KV_class3 must be in \(0, ini_size = 0.2\], got 0.3"),
        ({"ini_size": "0.2", "kv_class3": "0"}, r"KV_class3 must be in \(0, ini_size = 0.2\], got 0"),
        ({"ini_size": "0.2", "kv_class3": math.nan}, "KV_class3 must be a number .* got nan"),
        ({"ini_size": "0.2"}, "KV_class3 is missing"),
        ({"kv_class3": "0.2"}, "ini_size is missing"),
        ({}, "ini_size is missing"),
        ({"budgets": [1], "ini_size": "0.2"}, "one or the other"),
        ({"algorithm": "lru", "ini_size": 1, "kv_class3": 1}, "algorithm must be one of .* got lru"),
        ({"allocation": "even", "ini_size": 1, "kv_class3": 1}, "allocation must be one of .* got even"),
        ({"attn": "fast", "ini_size": 1, "kv_class3": 1}, "attn must be one of .* got fast"),
        ({"prefill_chunk": 0, "budgets": [9]}, "prefill_chunk must be a whole number of tokens, 1 or more, got 0"),
        ({"prefill_chunk": 2.5, "ini_size": 1, "kv_class3": 1}, "prefill_chunk must be .* got 2.5"),
        ({"prefill_chunk": 9, "algorithm": "h2o", "budgets": [9]}, "prefill_chunk cannot be used with h2o"),
        ({"prefill_chunk": 9, "ini_size": "0.3", "kv_class3": "0.2"}, r"make KV_class3 equal to ini_size \(0.3\)"),
        ({"start_size": -1, "ini_size": 1, "kv_class3": 1}, "start_size must be .* got -1"),
    ],
)
def test_bad_values(settings, message):
    with pytest.raises(InputError, match=message):
        SqueezeConfig(**settings)


def test_fractions_are_what_was_written():
    assert SqueezeConfig(ini_size="0.21", kv_class3=0.08).fractions == (Fraction(21, 100), Fraction(2, 25))
    assert parse_fraction("x", 0.1) == Fraction(1, 10) != Fraction(0.1)
    assert parse_fraction("x", " 1/3 ") == Fraction(1, 3)
