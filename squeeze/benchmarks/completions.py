"""Completions as a completion API gives them: stop strings, the tokens' texts and log-probabilities, why it ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import LogitsProcessorList

from squeeze.benchmarks.requests import Decoding
from squeeze.engine.squeezed_model import SqueezedModel
from squeeze.generation.generate import generate, greedy, stop_tokens
from squeeze.generation.sampling import generator, sampler
from squeeze.generation.stats import SampleStats
from squeeze.generation.stopping import StopStrings, cut, pieces


@dataclass(frozen=True)
class Completion:
    """A text that was generated for a prompt, and its tokens, whose texts put together are the text.

    Args:
        text: up to the first stop string.
        tokens: the text that each token adds; a token that ends inside a character adds nothing, and the one that
            completes it all of it.
        token_logprobs: log-probability of each token by the model itself, before temperature and top_p.
        top_logprobs: the likeliest tokens at each position, and their log-probabilities.
        finish_reason: `stop` (a stop string), `endoftext` (the model's own end) or `length` (max_tokens).
    """

    text: str
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    finish_reason: str


class LogProbs(LogitsProcessor):
    """Notes the log-probability of each token that greedy decoding will take after `inner`, and the likeliest ones.

    Attributes:
        chosen: a tensor for each step, (batch,).
        top: values and token ids for each step, both (batch, count).
    """

    def __init__(self, inner: LogitsProcessorList, count: int) -> None:
        self.inner = inner
        self.count = count
        self.chosen: list[torch.Tensor] = []
        self.top: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        logprobs = scores.float().log_softmax(dim=-1)
        final = self.inner(input_ids, scores)
        tokens = final.argmax(dim=-1, keepdim=True)
        self.chosen.append(logprobs.gather(1, tokens)[:, 0].cpu())
        values, ids = logprobs.topk(min(self.count, logprobs.shape[-1]), dim=-1)
        self.top.append((values.cpu(), ids.cpu()))
        return final


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[torch.Tensor],
    texts: Sequence[str],
    decoding: Decoding,
    run: SqueezedModel | None,
    seed: int,
) -> tuple[list[list[Completion]], list[SampleStats]]:
    """Complete a batch of prompts.

    What is sampled depends on the seed, the prompt, its settings and the number of the completion, and on nothing
    else: not on the batch, nor on where in a file a request stands.

    Args:
        prompts: token ids of each, (tokens,).
        texts: the prompts themselves.
        run: what `squeezed` gave; None for the full cache.
    Returns:
        `decoding.n` completions of each prompt, and what `squeeze.generation.generate` measured on each prompt.
    """
    rows = [prompt for prompt in prompts for _ in range(decoding.n)]
    generators = [generator(seed, text, decoding.key, number) for text in texts for number in range(decoding.n)]
    recorder = LogProbs(sampler(decoding.temperature, decoding.top_p, generators), decoding.logprobs)
    stops = StopStrings(tokenizer, decoding.stop, len(rows), max(map(len, rows)))
    settings = greedy(decoding.max_tokens)
    outputs, stats = generate(model, rows, settings, run, LogitsProcessorList([recorder]), stops)
    ends = stop_tokens(model, settings).tolist()
    made = [_completion(tokenizer, output, ends, decoding.stop, recorder, row) for row, output in enumerate(outputs)]
    starts = range(0, len(rows), decoding.n)
    return [made[at : at + decoding.n] for at in starts], [_together(stats[at : at + decoding.n]) for at in starts]


def _completion(
    tokenizer: PreTrainedTokenizerBase,
    output: torch.Tensor,
    ends: Sequence[int],
    stop: Sequence[str],
    recorder: LogProbs,
    row: int,
) -> Completion:
    ended = len(output) > 0 and int(output[-1]) in ends
    tokens, stopped = cut(pieces(tokenizer, output[:-1] if ended else output), stop)
    top = [(values[row].tolist(), ids[row].tolist()) for values, ids in recorder.top[: len(tokens)]]
    return Completion(
        text="".join(tokens),
        tokens=tokens,
        token_logprobs=[float(step[row]) for step in recorder.chosen[: len(tokens)]],
        top_logprobs=[_by_text(tokenizer, logprobs, ids) for logprobs, ids in top],
        finish_reason="stop" if stopped else "endoftext" if ended else "length",
    )


def _by_text(tokenizer: PreTrainedTokenizerBase, logprobs: list[float], tokens: list[int]) -> dict[str, float]:
    """The log-probability of each token's text, the likeliest first; of tokens with one text, the likeliest's."""
    by_text: dict[str, float] = {}
    for logprob, token in zip(logprobs, tokens, strict=True):
        by_text.setdefault(tokenizer.decode([token]), logprob)
    return by_text


def _together(stats: Sequence[SampleStats]) -> SampleStats:
    """Statistics of all completions of one prompt, each of which had a cache of its own."""
    times = ("prefill_seconds", "decode_seconds")
    sizes = ("prompt_tokens", "new_tokens", "kv_bytes", "state_bytes", "full_kv_bytes")
    totals: dict[str, Any] = {name: sum(getattr(sample, name) for sample in stats) for name in (*times, *sizes)}
    return replace(stats[0], **totals)


@torch.inference_mode()
def prompt_logprobs(model: PreTrainedModel, tokens: torch.Tensor, block: int = 512) -> list[float]:
    """Log-probability of each token of a prompt after those before it; 0 for the first, as HELM counts it.

    Args:
        tokens: token ids, (tokens,).
        block: positions whose logits exist at a time.
    """
    device = model.get_input_embeddings().weight.device
    states = model.base_model(input_ids=tokens[None].to(device), use_cache=False).last_hidden_state[0]
    blocks = [torch.zeros(1)]
    for start in range(0, len(tokens) - 1, block):
        logits = model.lm_head(states[start : start + block][: len(tokens) - 1 - start])
        after = tokens[start + 1 : start + 1 + len(logits), None].to(logits.device)
        blocks.append(logits.float().log_softmax(dim=-1).gather(1, after)[:, 0].cpu())
    return torch.cat(blocks).tolist()


def published(completion: Completion) -> dict[str, Any]:
    """A completion as one of a result's `choices`."""
    ends = list(accumulate(map(len, completion.tokens), initial=0))
    logprobs = {key: value for key, value in asdict(completion).items() if key.startswith(("token", "top"))}
    return {
        "text": completion.text,
        "logprobs": logprobs | {"text_offset": ends[:-1]},
        "finish_reason": completion.finish_reason,
    }
