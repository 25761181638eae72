"""How far a squeezed cache is from the full one, token by token: KL divergence and top-1 agreement.

The full cache answers greedily; both caches are fed that answer, and their next-token distributions are compared. On
a small model or few samples this tells configurations apart where a score of answers is noise.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from squeeze.benchmarks.base import Measure, Workload
from squeeze.benchmarks.records import ComparedSample, FidelityStats
from squeeze.benchmarks.scores import interval
from squeeze.engine.squeezed_model import SqueezedModel
from squeeze.generation.generate import full_cache_bytes, pad_left, stop_tokens
from squeeze.generation.stopping import StopStrings


@dataclass
class Answer:
    """The full cache's greedy answer to a batch of prompts.

    Args:
        tokens: `(batch, steps)`.
        logprobs: of all tokens at each step, `(batch, vocabulary)`, float32.
        running: which prompts' answers had not ended before each step, `(batch,)`.
    """

    tokens: torch.Tensor
    logprobs: list[torch.Tensor]
    running: list[torch.Tensor]


@torch.inference_mode()
def answer(
    model: PreTrainedModel,
    prompts: Sequence[torch.Tensor],
    settings: dict[str, Any],
    stops: StopStrings | None = None,
) -> Answer:
    """Let the full cache answer greedily.

    Args:
        prompts: token ids of each, (tokens,).
        settings: for `generate`: its `max_new_tokens`, `min_new_tokens` and `eos_token_id` are kept to.
        stops: strings that end an answer; its `start` is 0.
    """
    ends = stop_tokens(model, settings).to(model.get_input_embeddings().weight.device)
    found = Answer(torch.empty(len(prompts), 0, dtype=torch.long, device=ends.device), [], [])
    running = torch.ones(len(prompts), dtype=torch.bool, device=ends.device)
    steps = _steps(model, prompts, DynamicCache(config=model.config))
    logprobs = next(steps)
    for step in range(settings["max_new_tokens"]):
        found.logprobs.append(logprobs)
        found.running.append(running)
        allowed = logprobs.clone()
        if step < settings.get("min_new_tokens", 0):
            allowed[:, ends] = -torch.inf
        tokens = allowed.argmax(dim=-1, keepdim=True)
        found.tokens = torch.cat([found.tokens, tokens], dim=1)
        running = running & ~torch.isin(tokens[:, 0], ends)
        if stops is not None:
            running = running & ~stops(found.tokens, None)
        if not running.any() or step + 1 == settings["max_new_tokens"]:
            break
        logprobs = steps.send(tokens)
    return found


@torch.inference_mode()
def compare(
    model: PreTrainedModel, prompts: Sequence[torch.Tensor], full: Answer, run: SqueezedModel, max_new_tokens: int
) -> list[dict[str, Any]]:
    """Feed the full cache's answer to a squeezed one.

    The first token is left out: it follows from the prefill, which is the same with both.

    Args:
        prompts: token ids of each, (tokens,).
        full: the answer to them.
        run: what `squeezed` gave.
        max_new_tokens: that the budgets count on.
    Returns:
        For each prompt `kl`, the mean over tokens of KL(full || squeezed) in nats, `agreement`, the share of tokens
        where both have the same largest logit (both None where nothing was compared), and `tokens`.
    """
    steps = _steps(model, prompts, run.cache(max_new_tokens))
    divergences: list[list[float]] = [[] for _ in prompts]
    agreements: list[list[bool]] = [[] for _ in prompts]
    next(steps)
    for step in range(1, len(full.logprobs)):
        expected, found = full.logprobs[step], steps.send(full.tokens[:, step - 1 : step])
        kl = (expected.exp() * (expected - found)).sum(dim=-1)
        same = expected.argmax(dim=-1) == found.argmax(dim=-1)
        for row in full.running[step].nonzero().flatten().tolist():
            divergences[row].append(kl[row].item())
            agreements[row].append(bool(same[row]))
    return [
        {"kl": fmean(kl) if kl else None, "agreement": fmean(same) if kl else None, "tokens": len(kl)}
        for kl, same in zip(divergences, agreements, strict=True)
    ]


def _steps(
    model: PreTrainedModel, prompts: Sequence[torch.Tensor], cache: Cache
) -> Generator[torch.Tensor, torch.Tensor, None]:
    """Log-probabilities of the token after the prompts, `(batch, vocabulary)`, and after each that is sent in."""
    inputs, mask = pad_left(model, prompts)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    while True:
        output = model(
            inputs,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        inputs = yield output.logits[:, -1].float().log_softmax(dim=-1)
        mask = torch.cat([mask, torch.ones_like(inputs)], dim=1)
        positions = positions[:, -1:] + 1


class Fidelity(Measure[FidelityStats]):
    """Distance from the full cache on a benchmark's prompts, in place of answers to them: `--fidelity`.

    Configurations that are compared on the same batch share the full cache's answer.
    """

    sample = ComparedSample

    def __init__(self) -> None:
        self._batch: list[int] | None = None
        self._answer: Answer | None = None

    def work(self, workload: Workload) -> Callable[[list[int]], list[dict[str, Any]]]:
        return partial(self._compare, workload)

    def _compare(self, workload: Workload, batch: list[int]) -> list[dict[str, Any]]:
        model, run, prompts = workload.model, workload.squeezed, workload.tokens(batch)
        assert run is not None, "the full cache is what is compared with"
        first = workload.prompts[batch[0]]
        if self._answer is None or self._batch != batch:
            self._answer = None  # let go of the old one first
            stops = StopStrings(workload.tokenizer, first.stop, len(batch), start=0)
            self._answer = answer(model, prompts, first.settings, stops)
            self._batch = batch
        compared = compare(model, prompts, self._answer, run, first.settings["max_new_tokens"])
        samples = []
        for row, (index, distance) in enumerate(zip(batch, compared, strict=True)):
            full_bytes = full_cache_bytes(model.config, len(prompts[row]), model.dtype)
            kv_bytes = run.kv_bytes / len(batch)
            stats = FidelityStats(**distance, kv_bytes=kv_bytes, full_kv_bytes=full_bytes, notes=run.notes[row])
            samples.append({"index": index, **distance, "stats": stats})
        return samples

    def summarize(self, stats: Sequence[FidelityStats]) -> dict[str, Any]:
        """Means over samples of what was compared, each with its 95% bootstrap interval."""
        kept = sum(one.kv_bytes for one in stats) / sum(one.full_kv_bytes for one in stats)
        compared = [one for one in stats if one.kl is not None and one.agreement is not None]
        summary: dict[str, Any] = {"samples": len(stats), "compared": len(compared), "kept": round(kept, 4)}
        summary["tokens"] = sum(one.tokens for one in stats)
        for name in ("kl", "agreement") if compared else ():
            values = [getattr(one, name) for one in compared]
            low, high = interval(values)
            summary[name] = {"mean": round(fmean(values), 6), "low": round(low, 6), "high": round(high, 6)}
        return summary

    def describe(self, stats: Sequence[FidelityStats]) -> str:
        """Means of the samples so far, in a few words."""
        summary = self.summarize(stats)
        if "kl" not in summary:
            return "no tokens to compare so far"
        words = [
            f"{name} {summary[key]['mean']:.4f} [{summary[key]['low']:.4f}, {summary[key]['high']:.4f}]"
            for name, key in (("KL", "kl"), ("agreement", "agreement"))
        ]
        return f"{', '.join(words)}, KV {100 * summary['kept']:.1f}%"
