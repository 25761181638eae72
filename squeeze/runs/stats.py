"""What was measured on a run's samples, in a few words for the progress bar and as the summary in `run.json`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def progress(stats: Sequence[dict[str, Any]]) -> str:
    """Speed and kept cache of the samples so far, in a few words."""
    kept = sum(one["kv_bytes"] for one in stats) / sum(one["full_kv_bytes"] for one in stats)
    megabytes = sum(one["kv_bytes"] for one in stats) / len(stats) / 1e6
    return f"{tokens_per_second(stats):.1f} tokens/s, KV {100 * kept:.1f}% ({megabytes:.1f} MB)"


def tokens_per_second(stats: Sequence[dict[str, Any]]) -> float:
    """Decode speed: every new token but the first, which the prefill gives, over the time they took."""
    seconds = sum(one["decode_seconds"] for one in stats)
    return sum(max(one["new_tokens"] - 1, 0) for one in stats) / seconds if seconds > 1e-9 else 0.0


def summarize(stats: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What `run.json` says about one data set's samples: totals of tokens and seconds, means of bytes and layers."""

    def total(key: str) -> float:
        return sum(one[key] for one in stats)

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
        "peak_memory_bytes": max(one["peak_memory_bytes"] for one in stats),
    }
    if "classes" in stats[0]:
        classes = np.array([one["classes"] for one in stats])
        summary["layers_per_class"] = [round(float((classes == c).sum(axis=1).mean()), 2) for c in (1, 2, 3)]
        for key in ("classes", "budgets"):
            mean = np.array([one[key] for one in stats]).mean(axis=0)
            summary[key] = {"first": stats[0][key], "mean": [round(float(value), 2) for value in mean]}
        noted = [one["notes"] for one in stats if one.get("notes")]
        summary |= {"samples_with_notes": len(noted), "first_notes": noted[0] if noted else []}
    return summary
