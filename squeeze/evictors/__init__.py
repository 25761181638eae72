"""The eviction methods: which tokens survive prefill, and which slot a new token takes. One file a method.

All three have the same two methods. `keep` runs once per layer and sequence, after prefill; `slot` runs at every
decode step for the whole batch. Both are pure functions of tensors: what a method needs to remember (positions and
scores of the tokens it holds) belongs to the cache layer.
"""

from squeeze.evictors.h2o import H2O
from squeeze.evictors.sliding_window import SlidingWindow
from squeeze.evictors.streaming import StreamingLLM

Evictor = SlidingWindow | StreamingLLM | H2O


def make_evictor(algorithm: str, start_size: int) -> Evictor:
    """The evictor called `algorithm` on the command line; `start_size` sink tokens matter to StreamingLLM only."""
    if algorithm == "streaming":
        return StreamingLLM(start_size)
    return SlidingWindow() if algorithm == "sliding_window" else H2O()


__all__ = ["H2O", "Evictor", "SlidingWindow", "StreamingLLM", "make_evictor"]
