"""The cost of a sweep, before it starts: tokens to prefill and to decode, and bytes of keys and values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import mul
from typing import TYPE_CHECKING, Any

from squeeze.cli.tables import table
from squeeze.ranks import ALONE

if TYPE_CHECKING:
    from squeeze.allocations.base import CachedLayer
    from squeeze.generation.generate import Prompt
    from squeeze.runs.execute import OpenJob
    from squeeze.runs.jobs import Job

COLUMNS = ("run", "data set", "samples", "to do", "prompt tokens", "new tokens", "KV MB kept", "KV MB in prefill")


@dataclass
class Total:
    """The sums over all runs.

    Attributes:
        samples: to do, counted once a run.
        prompt_tokens: of those samples.
        prefilled: those tokens where prompts that runs share are counted once.
        new_tokens: the most that can come out.
        measured: tokens to run for loss curves, of allocations that need them on every prompt.
        prefill_bytes: the most keys and values that a prefill holds.
    """

    samples: int = 0
    prompt_tokens: int = 0
    prefilled: int = 0
    new_tokens: int = 0
    measured: int = 0
    prefill_bytes: int = 0


def describe(groups: Sequence[Sequence[OpenJob]]) -> str:
    """The plan as a table and a few sentences.

    Args:
        groups: runs that share a model and data.
    """
    total = Total()
    lines = [line for group in groups for line in _group(group, total)]
    sentences = [
        table(COLUMNS, lines),
        "New tokens are the most there can be; KV MB kept is the most that a run's batch holds while it decodes, and "
        "runs that decode together hold theirs at once.",
        f"In all {_count(len(lines), 'point')} with {_count(total.samples, 'sample')} to do: {total.prompt_tokens:,} "
        f"prompt tokens, of which {total.prefilled:,} are prefilled, the others shared between runs; "
        f"at most {total.new_tokens:,} new tokens; {total.prefill_bytes / 1e6:,.1f} MB of keys and values in the "
        "largest prefill.",
    ]
    if total.measured:
        sentences.append(f"To measure loss curves on the prompts, {total.measured:,} more tokens are run.")
    return "\n".join(sentences)


def _group(group: Sequence[OpenJob], total: Total) -> list[dict[str, str]]:
    """The lines of runs on one model and the same data; their sums are added to `total`."""
    from squeeze.models import loading
    from squeeze.models.cached_layers import own_layers
    from squeeze.models.folder_config import model_config

    job = group[0].job
    lines = []
    tokenizer, layers = loading.load_tokenizer(job.model_folder), own_layers(model_config(job.model_folder))
    for index, data in enumerate(job.data):
        total_rows = max(run.samples[index].total for run in group)
        prompts = job.benchmark.encode(tokenizer, data, total_rows, job.options)
        shared: dict[Any, set[int]] = {}
        for run in group:
            samples = run.samples[index]
            missing, prefills = samples.missing, _prefills(run.job)
            for prefill in prefills:
                shared.setdefault(prefill, set()).update(missing)
            lengths = [len(prompts[index].tokens) for index in missing]
            tokens = sum(lengths) * len(prefills)
            new = sum(prompts[index].settings["max_new_tokens"] for index in missing)
            kept, full = _most_bytes(run.job, layers, prompts[: samples.total])
            total.samples += len(missing)
            total.prompt_tokens += tokens
            total.measured += _measuring(run.job, layers, lengths)
            total.new_tokens += new
            if missing:
                total.prefill_bytes = max(total.prefill_bytes, full)
            cells = (run.job.folder, samples.dataset, samples.total, len(missing), f"{tokens:,}", f"{new:,}")
            memory = (f"{kept / 1e6:,.1f}", f"{full / 1e6:,.1f}")
            lines.append(dict(zip(COLUMNS, map(str, (*cells, *memory)), strict=True)))
        total.prefilled += sum(len(prompts[index].tokens) for missing in shared.values() for index in missing)
    return lines


def _prefills(job: Job) -> list[Any]:
    """The ways in which a run prefills a prompt; runs share those that are equal."""
    if job.config is None:
        return [job.folder]  # transformers' own, which is not shared
    squeezed: Any = ("squeezed", job.config.evictor.observed, job.config.attn)
    if job.config.prefill_chunk is not None:
        squeezed = "in chunks", job.folder  # what a chunk attends to depends on the budgets
    return [squeezed, "answer of the full cache"] if job.spec.fidelity else [squeezed]


def _measuring(job: Job, layers: Sequence[CachedLayer], lengths: Sequence[int]) -> int:
    """Tokens that are run for the loss curves of prompts of these lengths: of layers, or of their KV heads."""
    from squeeze.engine import loss_curves

    if job.config is None or job.config.allocator.needs != "loss_curves":
        return 0
    parts = sum(layer.kv_heads for layer in layers) if job.config.per == "head" else len(layers)
    return sum(loss_curves.cost(length, 1, parts) for length in lengths)


def _most_bytes(job: Job, layers: Sequence[CachedLayer], prompts: Sequence[Prompt]) -> tuple[int, int]:
    """The most bytes of keys and values that a batch holds while it decodes, and in its prefill."""
    from squeeze.allocations.base import reach
    from squeeze.models.cached_layers import full_cache_bytes, token_bytes
    from squeeze.runs.batching import share

    tokens = [token_bytes(layer, job.dtype) for layer in layers]
    kept = full = 0
    for batch in share(prompts, job.options.batch_size, ALONE):
        length = max(len(prompts[index].tokens) for index in batch)
        held = full_cache_bytes(layers, length + prompts[batch[0]].settings["max_new_tokens"], job.dtype)
        if job.config is not None:
            budgets = [math.ceil(job.config.share * reached) for reached in reach(layers, length)]
            held = min(held, sum(map(mul, budgets, tokens)))
        prefill = length * sum(tokens)
        if job.config is not None and job.config.prefill_chunk is not None and not job.spec.fidelity:
            prefill = min(prefill, held + max(tokens) * min(job.config.prefill_chunk, length))
        kept, full = max(kept, len(batch) * held), max(full, len(batch) * prefill)
    return kept, full


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
