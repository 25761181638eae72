"""Sampling that depends on the run's seed and the sample alone, and not on the batch it runs in."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from transformers import LogitsProcessor, TemperatureLogitsWarper, TopPLogitsWarper
from transformers.generation import LogitsProcessorList


class GumbelNoise(LogitsProcessor):
    """Adds Gumbel noise to every row's logits, each from its own generator: the largest is then a sample.

    The Gumbel-max trick: argmax(logits + noise) is distributed as softmax(logits), so greedy decoding samples.
    """

    def __init__(self, generators: Sequence[torch.Generator]):
        self.generators = generators

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        drawn = [torch.empty(scores.shape[1]).exponential_(generator=rng) for rng in self.generators]
        return scores.float() - torch.stack(drawn).log().to(scores.device)


def generator(seed: int, *sample: object) -> torch.Generator:
    """The random numbers of one sample in a run with `seed`; `sample` tells it from all others, such as its index."""
    digest = hashlib.sha256(" ".join(map(str, (seed, *sample))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)


def sampler(temperature: float, top_p: float, generators: Sequence[torch.Generator]) -> LogitsProcessorList:
    """For `generate(..., do_sample=False)`: a generator for each row; temperature 0 is greedy and needs none."""
    if temperature == 0:
        return LogitsProcessorList()
    warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(temperature)]
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    return LogitsProcessorList([*warpers, GumbelNoise(generators)])
