"""Which samples run together, and running them until all are done, also when memory is short."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tqdm import tqdm

from squeeze.config import InputError
from squeeze.distributed import Ranks
from squeeze.samples import Samples

#: Indices of a batch to a record of each: `index`, what is published, and `stats`.
Work = Callable[[list[int]], list[dict[str, Any]]]


def batches(lengths: Sequence[int], batch_size: int, kinds: Sequence[Any] = ()) -> list[list[int]]:
    """Which samples go together: the longest prompts first, so that little is padded and too much fails early.

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
    return [some[start : start + batch_size] for some in alike for start in range(0, len(some), batch_size)]


def run_batches(
    samples: Samples,
    lengths: Sequence[int],
    batch_size: int,
    work: Work,
    describe: Callable[..., str],
    ranks: Ranks,
    kinds: Sequence[Any] = (),
) -> int:
    """Do the samples that are missing, and append each batch to `samples` as soon as it is there.

    A batch that does not fit into memory is halved, and so are those after it.

    Args:
        lengths: prompt tokens of each sample.
        describe: turns the `stats` of all samples so far into a few words for the progress bar.
        ranks: of several processes, each takes its share of the batches.
        kinds: samples of different kinds never go together; none: all may.
    Returns:
        The batch size at the end.
    Raises:
        InputError: a single prompt does not fit into memory.
    """
    queue = batches(lengths, batch_size, kinds)[ranks.rank :: ranks.world]
    noted = any(record["stats"].get("notes") for record in samples.records)
    mine = {index for batch in queue for index in batch}
    missing = mine & set(samples.missing)
    label = samples.dataset if ranks.world == 1 else f"{samples.dataset}, process {ranks.rank} of {ranks.world}"
    shown = {} if ranks.first else {"disable": True}  # nothing for the first, which the environment may decide on
    with tqdm(total=len(mine), initial=len(mine - missing), desc=label, unit="sample", **shown) as bar:
        while queue:
            batch = queue.pop(0)
            if not set(batch) & missing:
                continue
            if len(batch) > batch_size:
                queue[:0] = [batch[:batch_size], batch[batch_size:]]
                continue
            fresh = _unless_out_of_memory(work, batch)
            if fresh is None:
                if len(batch) == 1:
                    raise InputError(f"out of memory with sample {batch[0]} alone, {lengths[batch[0]]} tokens")
                batch_size = len(batch) // 2
                bar.write(f"note: out of memory with {len(batch)} prompts at a time; going on with {batch_size}")
                queue.insert(0, batch)
                continue
            samples.append(fresh)
            for record in fresh:
                if record["stats"].get("notes") and not noted:
                    noted = True
                    bar.write(f"note, from sample {record['index']} on: {'; '.join(record['stats']['notes'])}")
            bar.set_postfix_str(describe([record["stats"] for record in samples.records]))
            bar.update(len(missing & set(batch)))
            missing -= set(batch)
    return batch_size


def _unless_out_of_memory(work: Work, batch: list[int]) -> list[dict[str, Any]] | None:
    """What `work` gives, or None where memory ran out; what the attempt held is free again on return."""
    try:
        return work(batch)
    except (torch.OutOfMemoryError, MemoryError):
        pass
    except RuntimeError as error:  # PyTorch's allocator on the CPU has no exception of its own
        if "can't allocate memory" not in str(error):
            raise
    gc.collect()
    torch.cuda.empty_cache()
    return None
