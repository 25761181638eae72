"""How far a squeezed cache is from the full one, token by token: KL divergence and top-1 agreement.

The full cache answers greedily; both caches are fed that answer, and their next-token distributions are compared. On
a small model or few samples this tells configurations apart where a score of answers is noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from squeeze.batching import Work
from squeeze.longbench import Data
from squeeze.patch import SqueezedModel
from squeeze.predict import Options, Prompt, full_cache_bytes, pad_left, stop_tokens
from squeeze.request_files import Requests
from squeeze.scoring import interval
from squeeze.stopping import StopStrings

#: A line of the published file: means over the tokens compared, and how many those are.
PUBLISHED = ("kl", "agreement", "tokens")


@torch.inference_mode()
def compare(
    model: PreTrainedModel,
    prompts: Sequence[torch.Tensor],
    settings: dict[str, Any],
    run: SqueezedModel,
    stops: StopStrings | None = None,
) -> list[dict[str, Any]]:
    """Compare the caches on a batch of prompts.

    The first token is left out: it follows from the prefill, which is the same with both.

    Args:
        prompts: token ids of each, (tokens,).
        settings: for `generate`: its `max_new_tokens`, `min_new_tokens` and `eos_token_id` are kept to.
        run: what `squeezed` gave.
        stops: strings that end an answer; its `start` is 0.
    Returns:
        For each prompt `kl`, the mean over tokens of KL(full || squeezed) in nats, `agreement`, the share of tokens
        where both have the same largest logit (both None where nothing was compared), and `tokens`.
    """
    inputs, mask = pad_left(model, prompts)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    ends = stop_tokens(model, settings).to(inputs.device)
    answer = inputs[:, :0]
    caches = (DynamicCache(config=model.config), run.cache(settings["max_new_tokens"]))
    running = torch.ones(len(prompts), dtype=torch.bool, device=inputs.device)
    divergences: list[list[float]] = [[] for _ in prompts]
    agreements: list[list[bool]] = [[] for _ in prompts]
    for step in range(settings["max_new_tokens"]):
        full, squeezed = (
            model(
                inputs,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            .logits[:, -1]
            .float()
            .log_softmax(dim=-1)
            for cache in caches
        )
        if step:
            kl = (full.exp() * (full - squeezed)).sum(dim=-1)
            same = full.argmax(dim=-1) == squeezed.argmax(dim=-1)
            for row in running.nonzero().flatten().tolist():
                divergences[row].append(kl[row].item())
                agreements[row].append(bool(same[row]))
        if step < settings.get("min_new_tokens", 0):
            full[:, ends] = -torch.inf
        inputs = full.argmax(dim=-1, keepdim=True)
        answer = torch.cat([answer, inputs], dim=1)
        running &= ~torch.isin(inputs[:, 0], ends)
        if stops is not None:
            running &= ~stops(answer, None)
        if not running.any():
            break
        mask = torch.cat([mask, torch.ones_like(inputs)], dim=1)
        positions = positions[:, -1:] + 1
    return [
        {"kl": fmean(kl) if kl else None, "agreement": fmean(same) if kl else None, "tokens": len(kl)}
        for kl, same in zip(divergences, agreements, strict=True)
    ]


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Data | Requests,
    prompts: Sequence[Prompt],
    run: SqueezedModel | None,
    how: Options,
) -> Work:
    """The work of `--fidelity`: prompts to what the squeezed cache costs."""
    assert run is not None, "the full cache is what is compared with"

    def work(batch: list[int]) -> list[dict[str, Any]]:
        chosen = [prompts[index] for index in batch]
        stops = StopStrings(tokenizer, chosen[0].stop, len(batch), start=0)
        found = compare(model, [one.tokens for one in chosen], chosen[0].settings, run, stops)
        records = []
        for row, (index, one) in enumerate(zip(batch, found, strict=True)):
            full_bytes = full_cache_bytes(model.config, len(chosen[row].tokens), model.dtype)
            held = {"kv_bytes": run.kv_bytes / len(batch), "full_kv_bytes": full_bytes}
            records.append({"index": index, **one, "stats": {**one, **held, "notes": run.notes[row]}})
        return records

    return work


def describe(stats: Sequence[dict[str, Any]]) -> str:
    """Means of the samples so far, in a few words."""
    summary = summarize(stats)
    if "kl" not in summary:
        return "no tokens to compare so far"
    words = [
        f"{name} {summary[key]['mean']:.4f} [{summary[key]['low']:.4f}, {summary[key]['high']:.4f}]"
        for name, key in (("KL", "kl"), ("agreement", "agreement"))
    ]
    return f"{', '.join(words)}, KV {100 * summary['kept']:.1f}%"


def summarize(stats: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What `run.json` says: means over samples of what was compared, each with its 95% bootstrap interval."""
    kept = sum(one["kv_bytes"] for one in stats) / sum(one["full_kv_bytes"] for one in stats)
    compared = [one for one in stats if one["tokens"]]
    summary: dict[str, Any] = {"samples": len(stats), "compared": len(compared), "kept": round(kept, 4)}
    summary["tokens"] = sum(one["tokens"] for one in stats)
    for key in ("kl", "agreement") if compared else ():
        values = [one[key] for one in compared]
        low, high = interval(values)
        summary[key] = {"mean": round(fmean(values), 6), "low": round(low, 6), "high": round(high, 6)}
    return summary
