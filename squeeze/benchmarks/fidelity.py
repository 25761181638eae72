"""Distance of a squeezed cache from the full one, token by token: KL divergence and top-1 agreement.

The full cache answers greedily; both caches are fed that answer, and their next-token distributions are compared. On
a small model or few samples this tells configurations apart where a score of answers is noise.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

import numpy as np
import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from squeeze.benchmarks.base import Measure, Workload
from squeeze.benchmarks.records import ComparedSample, FidelityStats
from squeeze.benchmarks.scores import interval
from squeeze.compatibility import cache_argument
from squeeze.config import SqueezeConfig
from squeeze.devices import unless_out_of_memory
from squeeze.engine.squeezed_model import SqueezedModel
from squeeze.generation.generate import pad_left, stop_tokens
from squeeze.generation.stopping import StopStrings
from squeeze.models.cached_layers import full_cache_bytes

#: Configurations that are compared in one batch, by the kind of device; fewer where memory is short.
AT_ONCE = {"cpu": 8, "cuda": 64}

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
    configs: Sequence[SqueezeConfig],
    max_new_tokens: int,
    asked: int = 0,
) -> list[list[dict[str, Any]]]:
    """Feed the full cache's answer to squeezed ones.

    The first token is left out where the whole prompt is cut: it follows from the prefill, which is the same with
    both. Several configurations go on after the prefill that they share as one batch, or as several where memory is
    short.

    Args:
        prompts: token ids of each, (tokens,); a single one where there are several configurations.
        full: the answer to them.
        run: what `squeezed` gave, its prefills shared where there are several configurations.
        configs: with the same evictor.
        max_new_tokens: that the budgets count on.
        asked: tokens at the end of each prompt that squeezed caches read when what precedes them is cut.
    Returns:
        For each configuration and prompt `kl`, the mean over tokens of KL(full || squeezed) in nats, `agreement`, the
        share of tokens where both have the same largest logit (both None where nothing was compared), `tokens`,
        the `kv_bytes` held after the prefill, a share of the batch's, and `notes` on its budgets.
    Raises:
        torch.OutOfMemoryError: a single configuration does not fit into memory.
    """
    given = model, prompts, full, run
    if len(configs) == 1:
        return _compare(*given, configs, max_new_tokens, asked)
    distances = unless_out_of_memory(lambda: _compare(*given, configs, max_new_tokens, asked))
    if distances is not None:
        return distances
    half = len(configs) // 2
    first, second = (compare(*given, part, max_new_tokens, asked) for part in (configs[:half], configs[half:]))
    return first + second


def _compare(
    model: PreTrainedModel,
    prompts: Sequence[torch.Tensor],
    full: Answer,
    run: SqueezedModel,
    configs: Sequence[SqueezeConfig],
    max_new_tokens: int,
    asked: int,
) -> list[list[dict[str, Any]]]:
    inputs, mask = pad_left(model, prompts)
    cut = inputs.shape[1] - asked
    held, budgets = [], []
    for config in configs:
        run.use(config)
        cache = run.cache(asked + max_new_tokens)
        next(_steps(model, inputs[:, :cut], mask[:, :cut], cache))
        held += [{"kv_bytes": run.kv_bytes / len(prompts), "notes": notes} for notes in run.notes]
        budgets += np.asarray(run.budgets).tolist()
    if len(configs) > 1:
        assert run.kept_prefill is not None, "configurations that are compared together share their prefills"
        cache = run.fork(run.kept_prefill, budgets, asked + max_new_tokens)
    divergences: list[list[float]] = [[] for _ in held]
    agreements: list[list[bool]] = [[] for _ in held]
    tokens = full.tokens.repeat(len(configs), 1)
    fed = inputs[:, cut:].repeat(len(configs), 1) if asked else tokens[:, :1]
    mask = torch.cat([mask[:, :cut].repeat(len(configs), 1), torch.ones_like(fed)], dim=1)
    steps, first = _steps(model, fed, mask, cache), 0 if asked else 1
    found = next(steps) if first < len(full.logprobs) else []
    for step in range(first, len(full.logprobs)):
        if not found:
            found = steps.send(tokens[:, step - 1 : min(step - 1 + AHEAD, len(full.logprobs) - 1)])
        expected, logprobs = full.logprobs[step], found.pop(0).unflatten(0, (len(configs), -1))
        kl = (expected.exp() * (expected - logprobs)).sum(dim=-1).flatten()
        same = (expected.argmax(dim=-1) == logprobs.argmax(dim=-1)).flatten()
        for row in full.running[step].repeat(len(configs)).nonzero().flatten().tolist():
            divergences[row].append(kl[row].item())
            agreements[row].append(bool(same[row]))
    distances = [
        {"kl": fmean(kl) if kl else None, "agreement": fmean(same) if kl else None, "tokens": len(kl), **cost}
        for kl, same, cost in zip(divergences, agreements, held, strict=True)
    ]
    return [distances[first : first + len(prompts)] for first in range(0, len(distances), len(prompts))]


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

    Configurations that are compared on the same batch share the full cache's answer. Where prompts run one at a time
    and configurations share their prefill, those with the same evictor are fed the answer together, which rounds
    otherwise than one alone. Which those are follows from `work` having been called for all, and not from what is
    missing: a run that goes on gives what it would have given.
    """

    sample = ComparedSample

    def __init__(self) -> None:
        self._configs: list[SqueezeConfig] = []
        self._batch: list[int] = []
        self._answer: Answer | None = None
        self._compared: dict[int, list[dict[str, Any]]] = {}

    def work(self, workload: Workload) -> Callable[[list[int]], list[dict[str, Any]]]:
        assert workload.squeezed is not None, "the full cache is what is compared with"
        self._configs.append(workload.squeezed.config)
        return partial(self._run_batch, len(self._configs) - 1, workload, workload.squeezed)

    def _run_batch(
        self, number: int, workload: Workload, run: SqueezedModel, batch: list[int]
    ) -> list[dict[str, Any]]:
        """Samples of a batch in the configuration of this number."""
        model, prompts = workload.model, workload.tokens(batch)
        first = workload.prompts[batch[0]]
        if self._answer is None or self._batch != batch:
            self._answer, self._compared = None, {}  # let go of the old one first
            stops = StopStrings(workload.tokenizer, first.stop, len(batch), start=0)
            settings = dict(first.settings)
            if first.compared is not None:
                settings["max_new_tokens"] = min(first.compared, settings["max_new_tokens"])
            self._answer = answer(model, prompts, settings, stops)
            self._batch = batch
        if number not in self._compared:
            group = self._together(number, run) if workload.options.batch_size == 1 else [number]
            configs = [self._configs[member] for member in group]
            most = first.settings["max_new_tokens"]
            distances = compare(model, prompts, self._answer, run, configs, most, first.asked)
            self._compared |= zip(group, distances, strict=True)
        samples = []
        for index, prompt, measured in zip(batch, prompts, self._compared[number], strict=True):
            whole = full_cache_bytes(run.layers, len(prompt) - first.asked, model.dtype)
            stats = FidelityStats(full_kv_bytes=whole, **measured)
            distance = {name: measured[name] for name in ("kl", "agreement", "tokens")}
            samples.append({"index": index, **distance, "stats": stats})
        return samples

    def _together(self, number: int, run: SqueezedModel) -> list[int]:
        """Numbers of the configurations that are fed an answer together with this one, it included."""
        config = self._configs[number]
        if not run.share_prefills or config.prefill_chunk is not None:
            return [number]
        alike = [index for index, other in enumerate(self._configs) if other.evictor == config.evictor]
        most = AT_ONCE[run.model.device.type]
        first = alike.index(number) // most * most
        return alike[first : first + most]

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
