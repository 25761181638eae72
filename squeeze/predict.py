"""Generate a data set's predictions batch by batch, and measure time, memory and budgets while doing so."""

from __future__ import annotations

import gc
import resource
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria
from transformers.generation import StoppingCriteriaList

from squeeze.config import InputError
from squeeze.longbench import Data, build_prompt, encode_prompt, generation_settings
from squeeze.patch import SqueezedModel
from squeeze.runs import Samples
from squeeze.stats import progress


class FirstToken(StoppingCriteria):
    """Stops nothing; notes when the first token was there, which is when the prefill was over."""

    def __init__(self, then: Callable[[], None]) -> None:
        self.time: float | None = None
        self.then = then

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if self.time is None:
            self.time = _now(input_ids.device)
            self.then()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.inference_mode()
def generate(
    model: PreTrainedModel, prompts: Sequence[torch.Tensor], settings: dict[str, Any], run: SqueezedModel | None
) -> tuple[list[torch.Tensor], list[dict[str, Any]]]:
    """Generate after a batch of prompts, padded on the left.

    Args:
        prompts: token ids of each, (tokens,).
        settings: for the model's `generate`.
        run: what `squeezed` gave; None for the full cache.
    Returns:
        The new tokens of each prompt, (new tokens,), up to and with the first that stops it, and what was measured on
        each: `prompt_tokens`, `new_tokens`, `prefill_seconds`, `decode_seconds`, `kv_bytes` held after the prefill,
        `full_kv_bytes` that the full cache of this prompt alone holds after it, `state_bytes`, `peak_memory_bytes`,
        and for a squeezed cache `classes`, `budgets` and `notes`. Seconds and bytes held are shares of the batch's.
    """
    device, pad = model.get_input_embeddings().weight.device, _pad_token(model)
    tokens = pad_sequence(list(prompts), batch_first=True, padding_value=pad, padding_side="left").to(device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)[:, None]
    mask = (torch.arange(tokens.shape[1], device=device) >= tokens.shape[1] - lengths).long()
    cache = None if run is not None else DynamicCache(config=model.config)
    held = {"state_bytes": 0}

    def measure_cache() -> None:
        if cache is not None:
            held["kv_bytes"] = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)

    first = FirstToken(measure_cache)
    start = _now(device)
    output = model.generate(
        tokens,
        attention_mask=mask,
        past_key_values=cache,
        stopping_criteria=StoppingCriteriaList([first]),
        pad_token_id=pad,
        **settings,
    )[:, tokens.shape[1] :].cpu()
    end = _now(device)
    if run is not None:
        held = {"kv_bytes": run.kv_bytes, "state_bytes": run.state_bytes}
    prefilled = first.time or end
    shares = {"prefill_seconds": prefilled - start, "decode_seconds": end - prefilled} | held
    stops = _stop_tokens(model, settings)
    outputs = [_until_stop(row, stops) for row in output]
    stats = []
    for row, (prompt, new) in enumerate(zip(prompts, outputs, strict=True)):
        one: dict[str, Any] = {"prompt_tokens": len(prompt), "new_tokens": len(new)}
        one |= {name: value / len(prompts) for name, value in shares.items()}
        one["full_kv_bytes"] = full_cache_bytes(model.config, len(prompt), model.dtype)
        one["peak_memory_bytes"] = peak_memory(device)
        if run is not None:
            one["classes"] = np.asarray(run.classes)[row].tolist()
            one["budgets"] = np.asarray(run.budgets)[row].tolist()
            one["notes"] = run.notes[row]
        stats.append(one)
    return outputs, stats


def _stop_tokens(model: PreTrainedModel, settings: dict[str, Any]) -> torch.Tensor:
    stops = settings.get("eos_token_id", model.generation_config.eos_token_id)
    return torch.tensor([stops] if isinstance(stops, int) else stops or [])


def _until_stop(tokens: torch.Tensor, stops: torch.Tensor) -> torch.Tensor:
    """Drop what `generate` pads a row with that stopped before the others of its batch."""
    found = torch.isin(tokens, stops).nonzero()
    return tokens[: int(found[0]) + 1] if len(found) else tokens


def _pad_token(model: PreTrainedModel) -> int:
    """Any token: no padding is ever attended, but `generate` wants one."""
    generation = model.generation_config
    if generation.pad_token_id is not None:
        return generation.pad_token_id
    eos = generation.eos_token_id
    return eos[0] if isinstance(eos, list) else eos or 0


def full_cache_bytes(config: PretrainedConfig, length: int, dtype: torch.dtype) -> int:
    """Bytes of all keys and values of `length` tokens, or of what the model's own window needs for the next one."""
    window = getattr(config, "sliding_window", None)
    held = min(length, window - 1) if window else length
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * held * dtype.itemsize


def peak_memory(device: torch.device) -> int:
    """The most bytes this process has held so far: on GPUs, tensors; on the CPU, all of its resident memory."""
    if device.type == "cuda":
        return sum(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count())))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Which samples go together: the longest prompts first, so that little is padded and too much fails early.

    A pure function of its arguments: a run that goes on makes the batches that it had made uninterrupted.

    Args:
        lengths: prompt tokens of each sample.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def predict(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    samples: Samples,
    run: SqueezedModel | None,
    max_length: int,
    model_name: str,
    batch_size: int = 1,
) -> int:
    """Generate the samples that are missing, and append each batch to `samples` as soon as it is there.

    A batch that does not fit into memory is halved, and so are those after it.

    Returns:
        The batch size at the end.
    Raises:
        InputError: a single prompt does not fit into memory.
    """
    settings = generation_settings(tokenizer, data.dataset)
    prompts = [
        encode_prompt(tokenizer, data.dataset, build_prompt(data.dataset, row), max_length, model_name)
        for row in data.rows[: samples.total]
    ]
    noted = any(record["stats"].get("notes") for record in samples.records)
    queue = batches([len(prompt) for prompt in prompts], batch_size)
    there = samples.total - len(samples.missing)
    with tqdm(total=samples.total, initial=there, desc=data.dataset, unit="sample") as bar:
        while queue:
            batch = queue.pop(0)
            if not set(batch) & set(samples.missing):
                continue
            if len(batch) > batch_size:
                queue[:0] = [batch[:batch_size], batch[batch_size:]]
                continue
            results = _unless_out_of_memory(model, [prompts[index] for index in batch], settings, run)
            if results is None:
                if len(batch) == 1:
                    raise InputError(f"out of memory with sample {batch[0]} alone, {len(prompts[batch[0]])} tokens")
                batch_size = len(batch) // 2
                bar.write(f"note: out of memory with {len(batch)} prompts at a time; going on with {batch_size}")
                queue.insert(0, batch)
                continue
            fresh = []
            for index, output, stats in zip(batch, *results, strict=True):
                row = data.rows[index]
                answer = tokenizer.decode(output, skip_special_tokens=True)
                published = {"pred": answer} | {key: row[key] for key in ("answers", "all_classes", "length")}
                fresh.append({"index": index, **published, "stats": stats})
            before = len(samples.missing)
            samples.append(fresh)
            for record in fresh:
                if record["stats"].get("notes") and not noted:
                    noted = True
                    bar.write(f"note, from sample {record['index']} on: {'; '.join(record['stats']['notes'])}")
            bar.set_postfix_str(progress([record["stats"] for record in samples.records]))
            bar.update(before - len(samples.missing))
    return batch_size


def _unless_out_of_memory(
    model: PreTrainedModel, prompts: Sequence[torch.Tensor], settings: dict[str, Any], run: SqueezedModel | None
) -> tuple[list[torch.Tensor], list[dict[str, Any]]] | None:
    """`generate`, or None where memory ran out; what the attempt held is free again on return."""
    try:
        return generate(model, prompts, settings, run)
    except (torch.OutOfMemoryError, MemoryError):
        pass
    except RuntimeError as error:  # PyTorch's allocator on the CPU has no exception of its own
        if "can't allocate memory" not in str(error):
            raise
    gc.collect()
    torch.cuda.empty_cache()
    return None
