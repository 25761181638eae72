"""The needle map: one number in prose, at every depth of prompts of every length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar

from squeeze.benchmarks.base import DataSet, Options, Workload
from squeeze.benchmarks.records import NeedleSample
from squeeze.benchmarks.ruler.benchmark import DEFAULT_LENGTHS, Recipe, Ruler, parse_lengths, texts_of
from squeeze.benchmarks.ruler.tasks import MAPPED, Asked
from squeeze.errors import InputError
from squeeze.ranks import ALONE, Ranks
from squeeze.text import shortened

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from squeeze.generation.generate import Prompt

#: Where nothing else is asked for: depths in percent, and needles at each.
DEFAULT_DEPTHS, NEEDLES = "0,25,50,75,100", 5


class NeedleMap(Ruler):
    """A data set for every length; sample `i` has its needle at depth `i` modulo their number.

    The samples of one round over the depths have the same prose and the same needle.
    """

    name, title = "niah", "Needle map"
    flags: ClassVar = ("lengths", "depths", "data_dir", "haystack", "chat", "temperature", "top_p")
    locations: ClassVar = ("data_dir", "haystack", "depths")
    sample: ClassVar = NeedleSample
    sample_num: ClassVar = NEEDLES

    def asked(self, flags: Mapping[str, Any]) -> list[str]:
        texts = texts_of(flags["data_dir"], flags["haystack"])
        lengths = parse_lengths(flags["lengths"] or DEFAULT_LENGTHS)
        return [str(Asked(MAPPED, texts.prose_name, length)) for length in lengths]

    def read(self, dataset: str, *location: str | None) -> Recipe:
        *folders, depths = location
        return self.recipe(Asked.read(dataset), texts_of(*folders), parse_depths(depths or DEFAULT_DEPTHS))

    def count(self, data: DataSet, sample_num: int | None) -> int:
        """A needle at every depth, `sample_num` times."""
        assert isinstance(data, Recipe)
        return min((sample_num or self.sample_num) * len(data.depths), len(data.rows))

    def facts(self, data: DataSet, options: Options) -> dict[str, Any]:
        assert isinstance(data, Recipe)
        return super().facts(data, options) | {"depths": list(data.depths)}

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, data: DataSet, total: int, options: Options, ranks: Ranks = ALONE
    ) -> list[Prompt]:
        chance = Random("numbers")
        numbers = [f" {chance.randint(10**6, 10**7 - 1)}" for _ in range(100)]
        longest = max(map(len, tokenizer(numbers, add_special_tokens=False).input_ids))
        return [replace(prompt, compared=longest) for prompt in super().encode(tokenizer, data, total, options, ranks)]

    def run_batch(self, workload: Workload, batch: Sequence[int]) -> list[dict[str, Any]]:
        assert isinstance(workload.data, Recipe)
        depths = workload.data.depths
        return [
            sample | {"depth": depths[index % len(depths)]}
            for index, sample in zip(batch, super().run_batch(workload, batch), strict=True)
        ]


def parse_depths(text: str) -> tuple[float, ...]:
    """Depths in percent, in their order; InputError where one is none."""
    depths = []
    for part in text.split(","):
        try:
            depth = float(part)
        except ValueError:
            depth = -1.0
        if not 0 <= depth <= 100:
            raise InputError(f"--depths must be percentages such as 0,50,100, got {shortened(text)}")
        depths.append(depth)
    return tuple(dict.fromkeys(depths))


NEEDLE_MAP = NeedleMap()
