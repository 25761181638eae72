"""A prompt of RULER's for `generate`, with its answers."""

from __future__ import annotations

from dataclasses import dataclass

from squeeze.generation.generate import Prompt


@dataclass(frozen=True)
class SamplePrompt(Prompt):
    """A prompt, and the strings that are looked for in what a model writes after it."""

    answers: tuple[str, ...] = ()
