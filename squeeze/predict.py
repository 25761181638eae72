"""Generate a data set's predictions sample by sample, and measure time, memory and budgets while doing so."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria
from transformers.generation import StoppingCriteriaList

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
    model: PreTrainedModel, tokens: torch.Tensor, settings: dict[str, Any], run: SqueezedModel | None
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Generate after one prompt.

    Args:
        tokens: the prompt, (1, tokens).
        settings: for the model's `generate`.
        run: what `squeezed` gave; None for the full cache.
    Returns:
        The new tokens, (new tokens,), and what was measured: `prompt_tokens`, `new_tokens`, `prefill_seconds`,
        `decode_seconds`, `kv_bytes` held after the prefill, `full_kv_bytes` that the full cache holds after it,
        `state_bytes`, `peak_memory_bytes`, and for a squeezed cache `classes`, `budgets` and `notes`.
    """
    tokens = tokens.to(model.device)
    length = tokens.shape[1]
    full = full_cache_bytes(model.config, length, model.dtype)
    stats: dict[str, Any] = {"prompt_tokens": length, "state_bytes": 0, "full_kv_bytes": full}
    cache = None if run is not None else DynamicCache(config=model.config)

    def measure_cache() -> None:
        if cache is not None:
            stats["kv_bytes"] = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)

    first = FirstToken(measure_cache)
    start = _now(tokens.device)
    output = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        past_key_values=cache,
        stopping_criteria=StoppingCriteriaList([first]),
        pad_token_id=_pad_token(model),
        **settings,
    )[0, length:]
    end = _now(tokens.device)
    prefilled = first.time or end
    stats |= {"new_tokens": len(output), "prefill_seconds": prefilled - start, "decode_seconds": end - prefilled}
    stats["peak_memory_bytes"] = peak_memory(tokens.device)
    if run is not None:
        stats |= {
            "kv_bytes": run.kv_bytes,
            "state_bytes": run.state_bytes,
            "classes": np.asarray(run.classes)[0].tolist(),
            "budgets": np.asarray(run.budgets)[0].tolist(),
            "notes": run.notes,
        }
    return output, stats


def _pad_token(model: PreTrainedModel) -> int:
    """Any token: a single prompt is never padded, but `generate` warns where none is given."""
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
    """The most bytes this process has held so far: on the GPU, tensors; on the CPU, all of its resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def predict(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    samples: Samples,
    run: SqueezedModel | None,
    max_length: int,
    model_name: str,
) -> None:
    """Generate the samples that are missing and append each to `samples` as soon as it is there."""
    settings = generation_settings(tokenizer, data.dataset)
    noted = any(record["stats"].get("notes") for record in samples.records)
    total = len(samples.records) + len(samples.missing)
    with tqdm(total=total, initial=len(samples.records), desc=data.dataset, unit="sample") as bar:
        for index in list(samples.missing):
            row = data.rows[index]
            tokens = encode_prompt(tokenizer, data.dataset, build_prompt(data.dataset, row), max_length, model_name)
            output, stats = generate(model, tokens, settings, run)
            answer = tokenizer.decode(output, skip_special_tokens=True)
            published = {"pred": answer} | {key: row[key] for key in ("answers", "all_classes", "length")}
            samples.append(index, published, stats)
            if stats.get("notes") and not noted:
                noted = True
                bar.write(f"note, from sample {index} on: {'; '.join(stats['notes'])}")
            bar.set_postfix_str(progress([record["stats"] for record in samples.records]))
            bar.update()
