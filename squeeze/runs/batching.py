"""Batches of samples, run until all are done, also when memory is short."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from squeeze.devices import unless_out_of_memory
from squeeze.errors import InputError
from squeeze.ranks import Ranks
from squeeze.runs.samples import Samples
from squeeze.text import printable

if TYPE_CHECKING:
    from squeeze.generation.generate import Prompt


def batches(lengths: Sequence[int], batch_size: int, kinds: Sequence[Any] = ()) -> list[list[int]]:
    """Samples that go together: the longest prompts first, so that little is padded and too much fails early.

    A pure function of its arguments: a run that goes on makes the batches that it had made uninterrupted.

    Args:
        lengths: prompt tokens of each sample.
        kinds: what must be equal in a batch, such as the settings of generation, for each sample; may be empty.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    known: list[Any] = []  # a kind may be a dict, which cannot be hashed
    alike: list[list[int]] = []
    for index in order:
        kind = kinds[index] if kinds else None
        if kind not in known:
            known.append(kind)
            alike.append([])
        alike[known.index(kind)].append(index)
    return [group[start : start + batch_size] for group in alike for start in range(0, len(group), batch_size)]


@dataclass
class Point:
    """A run's part of the work on one data set.

    Args:
        samples: those that are finished, and those that are missing.
        run_batch: indices of a batch to a finished sample of each.
        describe: turns the `stats` of all samples so far into a few words for the progress bar.
    """

    samples: Samples
    run_batch: Callable[[list[int]], list[dict[str, Any]]]
    describe: Callable[[Sequence[Any]], str]


def run_batches(
    points: Sequence[Point],
    prompts: Sequence[Prompt],
    batch_size: int,
    ranks: Ranks,
    bar: tqdm,
) -> int:
    """Run the samples that are missing, batch by batch for all points, and append each as soon as it is finished.

    A batch that does not fit into memory is halved, and so are those after it.

    Args:
        points: runs on the same prompts.
        ranks: of several processes, each takes its share of the batches.
        bar: is moved on by a sample of a point at a time.
    Returns:
        The batch size at the end.
    Raises:
        InputError: a single prompt does not fit into memory.
    """
    queue = share(prompts, batch_size, ranks)
    noted = [any(record["stats"].notes for record in point.samples.records) for point in points]
    while queue:
        batch = queue.pop(0)
        todo = [index for index, point in enumerate(points) if set(batch) & set(point.samples.missing)]
        if not todo:
            continue
        if len(batch) > batch_size:
            queue[:0] = [batch[:batch_size], batch[batch_size:]]
            continue
        for index in todo:
            point, missing = points[index], set(points[index].samples.missing)
            fresh = unless_out_of_memory(partial(point.run_batch, batch))
            if fresh is None:
                if len(batch) == 1:
                    tokens = len(prompts[batch[0]].tokens)
                    raise InputError(f"out of memory with sample {batch[0]} alone, {tokens} tokens")
                batch_size = len(batch) // 2
                bar.write(f"note: out of memory with {len(batch)} prompts at a time; going on with {batch_size}")
                queue.insert(0, batch)
                break
            point.samples.append(fresh)
            for record in fresh:
                notes = record["stats"].notes
                if notes and not noted[index]:
                    noted[index] = True
                    where = f"{point.samples.folder}: " if len(points) > 1 else ""
                    bar.write(printable(f"note, {where}from sample {record['index']} on: {'; '.join(notes)}"))
            bar.set_postfix_str(point.describe([record["stats"] for record in point.samples.records]))
            bar.update(len(missing & set(batch)))
    return batch_size


def progress_bar(points: Sequence[Point], prompts: Sequence[Prompt], batch_size: int, ranks: Ranks) -> tqdm:
    """A bar over this process's share of the samples of all points."""
    mine = {index for batch in share(prompts, batch_size, ranks) for index in batch}
    label = points[0].samples.dataset + ("" if len(points) == 1 else f", {len(points)} runs")
    label += "" if ranks.world == 1 else f", process {ranks.rank} of {ranks.world}"
    left = sum(len(mine & set(point.samples.missing)) for point in points)
    total = sum(len(mine & set(range(point.samples.total))) for point in points)
    shown: dict[str, Any] = {} if ranks.first else {"disable": True}  # nothing for the first: the environment may say
    return tqdm(total=total, initial=total - left, desc=label, unit="sample", **shown)


def share(prompts: Sequence[Prompt], batch_size: int, ranks: Ranks) -> list[list[int]]:
    """The batches that are this process's."""
    lengths, kinds = [len(prompt.tokens) for prompt in prompts], [prompt.kind for prompt in prompts]
    return batches(lengths, batch_size, kinds)[ranks.rank :: ranks.world]
