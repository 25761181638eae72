"""LongBench's prompts and HELM's requests as prompts for a model, and LongBench's answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from squeeze.benchmarks.longbench.data import Data, build_prompt
from squeeze.benchmarks.longbench.prompts import clean, encode_prompt, generation_settings
from squeeze.benchmarks.requests import Requests
from squeeze.engine.squeezed_model import SqueezedModel
from squeeze.errors import InputError
from squeeze.generation.generate import Prompt, generate, greedy
from squeeze.generation.sampling import generator, sampler
from squeeze.ranks import ALONE, Ranks

#: Indices of a batch to a record of each: `index`, what is published, and `stats`.
Work = Callable[[list[int]], list[dict[str, Any]]]

#: Characters that take seconds to tokenize.
LONG_TEXT = 5_000_000


@dataclass(frozen=True)
class Options:
    """How prompts are made and run.

    Args:
        max_length: the most tokens of a prompt; of a request, those of its completion included.
        model_name: decides on LongBench's chat format.
        chat: use the tokenizer's chat template instead.
        batch_size: prompts to run together.
        temperature, top_p: of sampling; temperature 0 is greedy.
        seed: of sampling.
    """

    max_length: int
    model_name: str
    chat: bool = False
    batch_size: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 42


def tokenizing(texts: Sequence[str], dataset: str, ranks: Ranks) -> Iterator[str]:
    """The texts, with a bar over their characters where they take a while: at once, if there are many."""
    total = sum(map(len, texts))
    shown: dict[str, Any] = {} if ranks.first else {"disable": True}
    delay = 0 if total > LONG_TEXT else 2
    what = f"{dataset}: tokenizing"
    with tqdm(total=total, desc=what, unit="char", unit_scale=True, delay=delay, leave=False, **shown) as bar:
        for text in texts:
            yield text
            bar.update(len(text))


def encode(
    tokenizer: PreTrainedTokenizerBase, data: Data | Requests, total: int, how: Options, ranks: Ranks = ALONE
) -> list[Prompt]:
    """The first `total` prompts of a data set: LongBench's as its runner puts them, HELM's without special tokens.

    Args:
        ranks: this process among those of the run, of which the first shows how far it is.
    Raises:
        InputError: a request's prompt and its completion do not fit into `how.max_length`.
    """
    if isinstance(data, Data):
        settings = generation_settings(tokenizer, data.dataset)
        texts = [build_prompt(data.dataset, row) for row in data.rows[:total]]
        limit, name, chat = how.max_length, how.model_name, how.chat
        return [
            Prompt(encode_prompt(tokenizer, data.dataset, text, limit, name, chat), settings)
            for text in tokenizing(texts, data.dataset, ranks)
        ]
    prompts = []
    requests = data.rows[:total]
    asked = tokenizing([request.prompt for request in requests], data.dataset, ranks)
    for number, (request, text) in enumerate(zip(requests, asked, strict=True), start=1):
        tokens = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
        new = request.decoding.max_tokens
        if len(tokens) + new > how.max_length:
            raise InputError(
                f"{data.source}: prompt {number} has {len(tokens)} tokens, which with {new} new ones is more than the "
                f"model's {how.max_length} positions: make the requests again with --model {how.model_name}"
            )
        prompts.append(Prompt(tokens, greedy(new), request.decoding.stop, request.decoding))
    return prompts


def predict(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    prompts: Sequence[Prompt],
    run: SqueezedModel | None,
    how: Options,
) -> Work:
    """The work of LongBench's data sets: prompts to answers."""

    def work(batch: list[int]) -> list[dict[str, Any]]:
        processors = sampler(how.temperature, how.top_p, [generator(how.seed, index) for index in batch])
        chosen = [prompts[index] for index in batch]
        results = generate(model, [one.tokens for one in chosen], chosen[0].settings, run, processors)
        records = []
        for index, output, stats in zip(batch, *results, strict=True):
            row = data.rows[index]
            answer = clean(tokenizer.decode(output, skip_special_tokens=True), how.model_name)
            published = {"pred": answer} | {key: row[key] for key in ("answers", "all_classes", "length")}
            records.append({"index": index, **published, "stats": stats})
        return records

    return work
