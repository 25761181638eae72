"""Distance of a squeezed cache from the full one, token by token: KL divergence and top-1 agreement.

The full cache answers greedily; both caches are fed that answer, and their next-token distributions are compared. On
a small model or few samples this tells configurations apart where a score of answers is noise.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from squeeze.benchmarks.base import Measure, Workload
from squeeze.benchmarks.records import ComparedSample, FidelityStats
from squeeze.benchmarks.scores import interval
from squeeze.compatibility import cache_argument
from squeeze.engine.squeezed_model import SqueezedModel
from squeeze.generation.generate import pad_left, stop_tokens
from squeeze.generation.stopping import StopStrings
from squeeze.models.cached_layers import full_cache_bytes

#: Tokens of an answer that squeezed caches are fed in one pass.
AHEAD = 16


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
    full = Answer(torch.empty(len(prompts), 0, dtype=torch.long, device=ends.device), [], [])
    running = torch.ones(len(prompts), dtype=torch.bool, device=ends.device)
    steps = _steps(model, *pad_left(model, prompts), DynamicCache(config=model.config))
    [logprobs] = next(steps)
    for step in range(settings["max_new_tokens"]):
        full.logprobs.append(logprobs)
        full.running.append(running)
        allowed = logprobs.clone()
        if step < settings.get("min_new_tokens", 0):
            allowed[:, ends] = -torch.inf
        tokens = allowed.argmax(dim=-1, keepdim=True)
        full.tokens = torch.cat([full.tokens, tokens], dim=1)
        running = running & ~torch.isin(tokens[:, 0], ends)
        if stops is not None:
            running = running & ~stops(full.tokens, None)
        if not running.any() or step + 1 == settings["max_new_tokens"]:
            break
        [logprobs] = steps.send(tokens)
    return full


@torch.inference_mode()
def compare(
    model: PreTrainedModel,
    prompts: Sequence[torch.Tensor],
    full: Answer,
    run: SqueezedModel,
    max_new_tokens: int,
    asked: int = 0,
) -> list[dict[str, Any]]:
    """Feed the full cache's answer to squeezed ones.

    The first token is left out where the whole prompt is cut: it follows from the prefill, which is the same with
    both.

    Args:
        prompts: token ids of each, (tokens,); of a model that is squeezed in several configurations the same ones for
            each configuration.
        full: the answer to them, or to the first ones, where the others are these again and again.
        run: what `squeezed` gave.
        max_new_tokens: that the budgets count on.
        asked: tokens at the end of each prompt that squeezed caches read when what precedes them is cut.
    Returns:
        For each prompt `kl`, the mean over tokens of KL(full || squeezed) in nats, `agreement`, the share of tokens
        where both have the same largest logit (both None where nothing was compared), `tokens`, the `kv_bytes` held
        after the prefill, and `notes` on its budgets.
    """
    inputs, mask = pad_left(model, prompts)
    cut, rows = inputs.shape[1] - asked, len(prompts)
    cache = run.cache(asked + max_new_tokens)
    next(_steps(model, inputs[:, :cut], mask[:, :cut], cache))
    divergences: list[list[float]] = [[] for _ in prompts]
    agreements: list[list[bool]] = [[] for _ in prompts]
    answered = len(full.tokens)
    tokens = full.tokens.repeat(rows // answered, 1)
    fed = inputs[:, cut:] if asked else tokens[:, :1]
    steps, first = _steps(model, fed, torch.cat([mask[:, :cut], torch.ones_like(fed)], dim=1), cache), int(not asked)
    found = next(steps) if first < len(full.logprobs) else []
    for step in range(first, len(full.logprobs)):
        if not found:
            found = steps.send(tokens[:, step - 1 : min(step - 1 + AHEAD, len(full.logprobs) - 1)])
        expected, logprobs = full.logprobs[step], found.pop(0).unflatten(0, (-1, answered))
        kl = (expected.exp() * (expected - logprobs)).sum(dim=-1).flatten()
        same = (expected.argmax(dim=-1) == logprobs.argmax(dim=-1)).flatten()
        for row in full.running[step].repeat(rows // answered).nonzero().flatten().tolist():
            divergences[row].append(kl[row].item())
            agreements[row].append(bool(same[row]))
    held = zip(run.own_bytes, run.notes, strict=True)
    return [
        {
            **{"kl": fmean(kl) if kl else None, "agreement": fmean(same) if kl else None},
            **{"tokens": len(kl), "kv_bytes": kv_bytes, "notes": notes},
        }
        for kl, same, ((kv_bytes, _), notes) in zip(divergences, agreements, held, strict=True)
    ]


def _steps(
    model: PreTrainedModel, inputs: torch.Tensor, mask: torch.Tensor, cache: Cache
) -> Generator[list[torch.Tensor], torch.Tensor, None]:
    """Log-probabilities of the token after some, `(batch, vocabulary)`, and after each one of those that are sent in.

    Args:
        inputs: token ids that `cache` does not hold yet, `(batch, tokens)`.
        mask: of all tokens so far, these included, `(batch, all)`.
    """
    positions, wanted = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -inputs.shape[1] :], 1
    while True:
        output = model(
            inputs,
            attention_mask=mask,
            position_ids=positions,
            **{cache_argument(): cache},
            use_cache=True,
            logits_to_keep=wanted,
        )
        inputs = yield list(output.logits.float().log_softmax(dim=-1).unbind(dim=1))
        wanted = inputs.shape[1]
        mask = torch.cat([mask, torch.ones_like(inputs)], dim=1)
        positions = positions[:, -1:] + 1 + torch.arange(wanted, device=positions.device)


class Fidelity(Measure[FidelityStats]):
    """Distance from the full cache on a benchmark's prompts, in place of answers to them: `--fidelity`.

    Configurations that are compared on the same batch share the full cache's answer.
    """

    sample = ComparedSample

    def __init__(self) -> None:
        self._answered: list[int] = []
        self._answer: Answer | None = None

    def run_batch(self, workload: Workload, batch: Sequence[int]) -> list[dict[str, Any]]:
        model, run, prompts = workload.model, workload.squeezed, workload.tokens(batch)
        assert run is not None, "the full cache is what is compared with"
        first, own = workload.prompts[batch[0]], list(dict.fromkeys(batch))
        most = first.settings["max_new_tokens"]
        if self._answer is None or self._answered != own:
            self._answer = None  # let go of the old one first
            stops = StopStrings(workload.tokenizer, first.stop, len(own), start=0)
            compared = most if first.compared is None else min(first.compared, most)
            settings = first.settings | {"max_new_tokens": compared}
            self._answered, self._answer = own, answer(model, workload.tokens(own), settings, stops)
        samples = []
        found = compare(model, prompts, self._answer, run, most, first.asked)
        for index, prompt, measured in zip(batch, prompts, found, strict=True):
            whole = full_cache_bytes(run.layers, len(prompt) - first.asked, model.dtype)
            stats = FidelityStats(full_kv_bytes=whole, **measured)
            distance = {name: measured[name] for name in ("kl", "agreement", "tokens")}
            samples.append({"index": index, **distance, "stats": stats})
        return samples

    def summarize(self, stats: Sequence[FidelityStats]) -> dict[str, Any]:
        """Means over samples of what was compared, each with its 95% bootstrap interval."""
        kept = sum(sample.kv_bytes for sample in stats) / sum(sample.full_kv_bytes for sample in stats)
        compared = [sample for sample in stats if sample.kl is not None and sample.agreement is not None]
        summary: dict[str, Any] = {"samples": len(stats), "compared": len(compared), "kept": round(kept, 4)}
        summary["tokens"] = sum(sample.tokens for sample in stats)
        for name in ("kl", "agreement") if compared else ():
            values = [getattr(sample, name) for sample in compared]
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
