"""Statistics of a sample: time, memory and budgets of one prompt and its answer, and their summary over a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from msgspec import Meta

from squeeze.storage.schema import Amount, Cosine, Count, Positive

#: Of each layer, or of each layer's KV heads.
Budgets = list[Count | Annotated[list[Count], Meta(min_length=1)]]
Classes = Annotated[list[Literal[1, 2, 3]], Meta(min_length=1)]


@dataclass(frozen=True)
class SampleStats:
    """Time and memory of one prompt and its answer; a prompt's share where a batch has one number for all.

    Args:
        prompt_tokens, new_tokens: of the prompt, and of the answer up to and with what ended it.
        prefill_seconds, decode_seconds: until the first new token, and after it.
        kv_bytes: keys and values held after the prefill.
        state_bytes: held beside them: H2O's scores and positions, StreamingLLM's sinks.
        full_kv_bytes: keys and values that the full cache of this prompt alone holds after the prefill.
        peak_memory_bytes: of the process or the GPU, so far.
        similarities, classes, budgets: of each layer of a squeezed cache; empty for the full one. Where KV heads have
            budgets of their own, those of each layer are a list.
        notes: sentences that the user should see.
    """

    prompt_tokens: Positive
    new_tokens: Count
    prefill_seconds: Amount
    decode_seconds: Amount
    kv_bytes: Amount
    state_bytes: Amount
    full_kv_bytes: Positive
    peak_memory_bytes: Count
    similarities: list[Cosine] = field(default_factory=list)
    classes: Classes = field(default_factory=list)
    budgets: Budgets = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The statistics as a line of a run's file has them, in its order."""
        numbers = dict(vars(self))
        layers = {name: numbers.pop(name) for name in ("similarities", "classes", "budgets", "notes")}
        if not self.budgets:  # the full cache's files have state_bytes first
            first = ("prompt_tokens", "new_tokens", "prefill_seconds", "decode_seconds", "state_bytes")
            return {name: numbers[name] for name in first} | numbers
        if not self.similarities:  # of early versions
            del layers["similarities"]
        return numbers | layers


def progress(stats: Sequence[SampleStats]) -> str:
    """Speed and kept cache of the samples so far, in a few words."""
    kept = sum(sample.kv_bytes for sample in stats) / sum(sample.full_kv_bytes for sample in stats)
    megabytes = sum(sample.kv_bytes for sample in stats) / len(stats) / 1e6
    return f"{tokens_per_second(stats):.1f} tokens/s, KV {100 * kept:.1f}% ({megabytes:.1f} MB)"


def tokens_per_second(stats: Sequence[SampleStats]) -> float:
    """Decode speed: every new token but the first, which the prefill gives, over the time they took."""
    seconds = sum(sample.decode_seconds for sample in stats)
    return sum(max(sample.new_tokens - 1, 0) for sample in stats) / seconds if seconds > 1e-9 else 0.0


def _mean(of_layer: Sequence[Any]) -> Any:
    """The mean of a layer's numbers over samples, or of those of each of its KV heads."""
    if isinstance(of_layer[0], list):
        return [_mean(of_head) for of_head in zip(*of_layer, strict=True)]
    return round(sum(of_layer) / len(of_layer), 2)


def summarize(stats: Sequence[SampleStats]) -> dict[str, Any]:
    """Summary of one data set's samples for `run.json`: totals of tokens and seconds, means of bytes and layers."""

    def total(name: str) -> float:
        return sum(getattr(sample, name) for sample in stats)

    summary: dict[str, Any] = {
        "samples": len(stats),
        "prompt_tokens": total("prompt_tokens"),
        "generated_tokens": total("new_tokens"),
        "prefill_seconds": round(total("prefill_seconds"), 3),
        "decode_seconds": round(total("decode_seconds"), 3),
        "tokens_per_second": round(tokens_per_second(stats), 2),
        "kv_bytes": round(total("kv_bytes") / len(stats)),
        "full_kv_bytes": round(total("full_kv_bytes") / len(stats)),
        "kept": round(total("kv_bytes") / total("full_kv_bytes"), 4),
        "state_bytes": round(total("state_bytes") / len(stats)),
        "peak_memory_bytes": max(sample.peak_memory_bytes for sample in stats),
    }
    if stats[0].classes:
        layers = [layer_class for sample in stats for layer_class in sample.classes]
        summary["layers_per_class"] = [round(layers.count(layer_class) / len(stats), 2) for layer_class in (1, 2, 3)]
        for name in ("classes", "budgets"):
            rows = [getattr(sample, name) for sample in stats]
            summary[name] = {"first": rows[0], "mean": [_mean(layer) for layer in zip(*rows, strict=True)]}
        noted = [sample.notes for sample in stats if sample.notes]
        summary |= {"samples_with_notes": len(noted), "first_notes": noted[0] if noted else []}
    return summary
