"""The eviction methods, one file a method. Their names are known without importing torch."""

from __future__ import annotations

from squeeze.evictors.base import Evictor
from squeeze.numbers import whole_number
from squeeze.registry import Registry

EVICTORS: Registry[Evictor] = Registry(
    "algorithm",
    "squeeze.evictors",
    Evictor,  # type: ignore[type-abstract]
    {
        "sliding_window": "squeeze.evictors.sliding_window:SlidingWindow",
        "streaming": "squeeze.evictors.streaming:StreamingLLM",
        "h2o": "squeeze.evictors.h2o:H2O",
        "snapkv": "squeeze.evictors.snapkv:SnapKV",
        "tova": "squeeze.evictors.tova:TOVA",
        "expected_attention": "squeeze.evictors.expected_attention:ExpectedAttention",
        "knorm": "squeeze.evictors.knorm:KNorm",
        "keydiff": "squeeze.evictors.keydiff:KeyDiff",
        "lagkv": "squeeze.evictors.lagkv:LagKV",
        "random": "squeeze.evictors.random:Random",
    },
)


def make_evictor(algorithm: str, start_size: int) -> Evictor:
    """The evictor that `algorithm` names; `start_size` sink tokens are for those that have the parameter `sinks`.

    Raises:
        InputError: there is none, or its parameters are wrong.
    """
    made = EVICTORS.find(algorithm).make({"sinks": start_size})
    whole_number(f"minimum_budget of {algorithm}", made.minimum_budget, 1, "a whole number of tokens")
    return made


__all__ = ["EVICTORS", "Evictor", "make_evictor"]
