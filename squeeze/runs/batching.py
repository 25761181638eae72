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


#: All runs of a group.
EVERY = slice(None)


@dataclass
class Group:
    """Runs that work on each batch together: one run, or several, for each of which the batch has all prompts.

    Args:
        samples: of each run, those that are finished, and those that are missing.
        run_batch: indices of a batch, and which of the runs, as a slice, to a finished sample of each index, of each
            run.
        describe: turns the `stats` of all samples of a run so far into a few words for the progress bar.

    Attributes:
        together: runs that go into one batch.
    """

    samples: Sequence[Samples]
    run_batch: Callable[[list[int], slice], list[list[dict[str, Any]]]]
    describe: Callable[[Sequence[Any]], str]

    def __post_init__(self) -> None:
        self.together = len(self.samples)
        self._noted = [any(record["stats"].notes for record in samples.records) for samples in self.samples]

    def missing(self, batch: Sequence[int], runs: slice = EVERY) -> bool:
        """Whether one of some runs misses a sample of a batch."""
        return any(set(batch) & set(samples.missing) for samples in self.samples[runs])

    def append(self, fresh: Sequence[list[dict[str, Any]]], runs: slice, bar: tqdm, tell: bool) -> None:
        """Add finished samples, of each of some runs; notes go to the bar, with the run's folder where `tell` is."""
        for number, found in zip(range(len(self.samples))[runs], fresh, strict=True):
            samples = self.samples[number]
            before = len(samples.missing)
            if not {record["index"] for record in found} & set(samples.missing):
                continue  # it was only there for the others, and its folder is not touched
            samples.append(found)
            for record in found:
                notes = record["stats"].notes
                if notes and not self._noted[number]:
                    self._noted[number] = True
                    where = f"{samples.folder}: " if tell else ""
                    bar.write(printable(f"note, {where}from sample {record['index']} on: {'; '.join(notes)}"))
            bar.set_postfix_str(self.describe([record["stats"] for record in samples.records]))
            bar.update(before - len(samples.missing))


def run_batches(
    groups: Sequence[Group],
    prompts: Sequence[Prompt],
    batch_size: int,
    ranks: Ranks,
    bar: tqdm,
) -> int:
    """Run the samples that are missing, batch by batch for all runs, and append each as soon as it is finished.

    Where memory is short, fewer runs of a group go together, and then a batch is halved, as are those after it.

    Args:
        groups: of runs on the same prompts.
        ranks: of several processes, each takes its share of the batches.
        bar: is moved on by a sample of a run at a time.
    Returns:
        The batch size at the end.
    Raises:
        InputError: a single prompt does not fit into memory.
    """
    queue = share(prompts, batch_size, ranks)
    tell = sum(len(group.samples) for group in groups) > 1
    while queue:
        batch = queue.pop(0)
        todo = [group for group in groups if group.missing(batch)]
        if todo and len(batch) > batch_size:
            queue[:0] = [batch[:batch_size], batch[batch_size:]]
            continue
        for group in todo:
            if not _run(group, batch, bar, tell):
                if len(batch) == 1:
                    tokens = len(prompts[batch[0]].tokens)
                    raise InputError(f"out of memory with sample {batch[0]} alone, {tokens} tokens")
                batch_size = len(batch) // 2
                bar.write(f"note: out of memory with {len(batch)} prompts at a time; going on with {batch_size}")
                queue.insert(0, batch)
                break
    return batch_size


def _run(group: Group, batch: list[int], bar: tqdm, tell: bool) -> bool:
    """Run a batch for all runs of a group; whether it fits into memory."""
    done = 0
    while done < len(group.samples):
        runs = slice(done, done + group.together)
        if not group.missing(batch, runs):
            done += group.together
            continue
        fresh = unless_out_of_memory(partial(group.run_batch, batch, runs))
        if fresh is not None:
            group.append(fresh, runs, bar, tell)
            done += group.together
        elif group.together == 1:
            return False
        else:
            group.together //= 2
            bar.write(f"note: out of memory with several runs at a time; going on with {group.together}")
    return True


def progress_bar(runs: Sequence[Samples], prompts: Sequence[Prompt], batch_size: int, ranks: Ranks) -> tqdm:
    """A bar over this process's share of the samples of all runs."""
    mine = {index for batch in share(prompts, batch_size, ranks) for index in batch}
    label = runs[0].dataset + ("" if len(runs) == 1 else f", {len(runs)} runs")
    label += "" if ranks.world == 1 else f", process {ranks.rank} of {ranks.world}"
    left = sum(len(mine & set(samples.missing)) for samples in runs)
    total = sum(len(mine & set(range(samples.total))) for samples in runs)
    shown: dict[str, Any] = {} if ranks.first else {"disable": True}  # nothing for the first: the environment may say
    return tqdm(total=total, initial=total - left, desc=label, unit="sample", **shown)


def share(prompts: Sequence[Prompt], batch_size: int, ranks: Ranks) -> list[list[int]]:
    """The batches that are this process's."""
    lengths, kinds = [len(prompt.tokens) for prompt in prompts], [prompt.kind for prompt in prompts]
    return batches(lengths, batch_size, kinds)[ranks.rank :: ranks.world]
