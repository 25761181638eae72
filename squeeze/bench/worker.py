"""One configuration of the benchmark in a process of its own, which reads and prints JSON lines.

The first line it reads is the configuration. Before each prefill and between decode steps it offers to wait (a line
with `known`), and goes on when it reads the next line, so that configurations can take turns; the last line is the
result. It imports nothing but torch and transformers, and this package or kvpress where the configuration asks for
them, so that peers can be measured in an environment of their own with the very same loop.
"""

from __future__ import annotations

import inspect
import json
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    StaticCache,
    StoppingCriteria,
)
from transformers.generation import StoppingCriteriaList

#: Gives way to other configurations; takes the results so far.
Turn = Callable[[dict[str, Any]], None]


class StepClock(StoppingCriteria):
    """Seconds of the prefill and of every decode step of `generate`; stops nothing.

    `pause` is called with the number of tokens after each, and its time belongs to no step.
    """

    def __init__(self, pause: Callable[[int], None]) -> None:
        self.pause = pause
        self.seconds: list[float] = []
        self.start = time.perf_counter()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.seconds.append(now(input_ids.device) - self.start)
        self.pause(len(self.seconds))
        self.start = now(input_ids.device)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def now(device: torch.device) -> float:
    """Seconds on a clock, once all that was asked of the device is done; `squeeze.devices.now` for any environment."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def reset_peak_memory(device: torch.device) -> None:
    """Forget the peak so far: loading a model can need more than running it, and would hide what that needs."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak since `reset_peak_memory`; on systems that cannot forget a peak, since the process began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        match = re.search(r"VmHWM:\s*(\d+) kB", status.read_text())
        if match:
            return int(match[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def prompts(spec: dict[str, Any]) -> torch.Tensor:
    """Token ids, `(batch_size, prompt_length)`: the given text, another stretch of it for each sequence."""
    tokens = torch.tensor(spec["tokens"])
    length = spec["prompt_length"]
    rows = [torch.roll(tokens, -997 * row)[:length] for row in range(spec["batch_size"])]
    return torch.stack([row.repeat(-(-length // len(row)))[:length] for row in rows])


def copy_bandwidth(device: torch.device, nbytes: int = 1 << 29, rounds: int = 7) -> float:
    """Bytes read and written per second by a large copy, the median of some rounds."""
    source = torch.ones(nbytes // 4, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(rounds):
        start = now(device)
        target.copy_(source)
        seconds.append(now(device) - start)
    return 2 * nbytes / statistics.median(seconds)


def weight_bytes(model) -> int:
    """Bytes of all weights that one decode step reads; of an embedding that is not the head too, next to nothing."""
    total = sum(parameter.nbytes for parameter in model.parameters())
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return total if head is embedding else total - embedding.nbytes


def cut(cache: DynamicCache, budgets: list[int]) -> None:
    """Cut each layer of a DynamicCache to the last tokens of its budget, the cheapest cut, after prefill."""
    for layer, budget in zip(cache.layers, budgets, strict=True):
        layer.keys = layer.keys[:, :, -budget:].clone()
        layer.values = layer.values[:, :, -budget:].clone()


def press(spec: dict[str, Any]):
    """A press of kvpress at the configuration's budgets."""
    import kvpress

    ratios = [1 - budget / spec["prompt_length"] for budget in spec["budgets"]]
    press_class = {"streaming": kvpress.StreamingLLMPress, "h2o": kvpress.ObservedAttentionPress}[spec["algorithm"]]
    if len(set(ratios)) == 1:
        return press_class(compression_ratio=ratios[0])
    return kvpress.PerLayerCompressionPress(press_class(), compression_ratios=ratios)


def measure(spec: dict[str, Any], turn: Turn) -> dict[str, Any]:
    """Run one configuration.

    Args:
        spec: `engine` (`squeeze`, `transformers`, `kvpress`), `model` (a folder), `device`, `dtype`, `attn`, `tokens`
            (of the text that prompts are cut from), `batch_size`, `prompt_length`, `new_tokens`, `rounds`,
            `turn_steps`, perhaps `random_weights` and `memory` (bytes that a GPU may give), and for `squeeze` the
            fields of `SqueezeConfig` as `config`, with the file of loss curves as `calibration`; for the others
            `budgets` in tokens (none: the full cache), and `algorithm` for kvpress; `static` for a StaticCache.
        turn: called with the results so far before each prefill, and after it and every `turn_steps` decode steps;
            may wait, which is no part of any time measured, and may change the spec's `budgets` before a prefill.
    Returns:
        medians and quartiles of `prefill_seconds` (a prefill each round), `step_seconds` (of all decode steps),
        `whole_seconds` (of a round's prefill and steps together) and, for `squeeze`, `importance_seconds` (of the
        prefills, clustering included), `kv_bytes` after prefill, `budgets` where they were measured, `late_over_early`
        (steps, with 64 or more), `weight_bytes`, `copy_bandwidth` (bytes a second) and `peak_bytes` of this process
        once the model is loaded (RSS, or tensors on a GPU).
    """
    device = torch.device(spec["device"])
    model = load(spec, device).eval()
    # Nothing of how the model's author wanted to generate; this file knows nothing of the project's own loading.
    model.generation_config, model.config.use_cache = GenerationConfig(), True
    ids = prompts(spec).to(device)
    result: dict[str, Any] = {"weight_bytes": weight_bytes(model)}
    if spec["engine"] == "squeeze":
        from squeeze.models.packing import pack

        pack(model)  # as `squeeze.models.loading.load` does
    prefill, importance, steps, wholes = [], [], [], []
    with torch.inference_mode():
        generate(model, ids[:1, :64], spec | {"budgets": None, "new_tokens": 4}, lambda known: None)  # warm-up
        reset_peak_memory(device)
        for _ in range(spec["rounds"]):
            turn({})
            seconds, measured = generate(model, ids, spec, turn)
            prefill.append(seconds[0])
            importance.append(measured.pop("importance_seconds", 0.0))
            steps += seconds[1:]
            wholes.append(sum(seconds))
            result |= measured
    result |= {"prefill_seconds": spread(prefill), "step_seconds": spread(steps), "whole_seconds": spread(wholes)}
    if spec["engine"] == "squeeze":
        result["importance_seconds"] = spread(importance)
    each = len(steps) // spec["rounds"]
    if each >= 64:  # does a step cost more when much has been generated?
        late = [steps[i] for i in range(len(steps)) if i % each >= each - 32]
        early = [steps[i] for i in range(len(steps)) if i % each < 32]
        result["late_over_early"] = statistics.median(late) / statistics.median(early)
    result["peak_bytes"] = peak_memory(device)
    result["copy_bandwidth"] = copy_bandwidth(device)  # last, for its buffers are no part of the peak
    return result


def load(spec: dict[str, Any], device: torch.device):
    """The model on its device; with `random_weights` only its configuration is read."""
    given: dict[str, Any] = {"dtype": getattr(torch, spec["dtype"]), "attn_implementation": spec["attn"]}
    if device.type == "cuda" and "memory" in spec:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(spec["memory"] / total, 1.0), device)
    if not spec.get("random_weights"):
        return AutoModelForCausalLM.from_pretrained(spec["model"], **given).to(device)
    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(spec["model"]), **given)


def generate(model, ids: torch.Tensor, spec: dict[str, Any], turn: Turn) -> tuple[list[float], dict[str, Any]]:
    """One `model.generate` with the configuration's cache: seconds of every token, and the bytes held after it."""
    engine, budgets = spec["engine"], spec.get("budgets")
    if budgets == "squeezed":
        raise ValueError("no squeezed cache has measured the budgets that this one is to have")
    measured: dict[str, Any] = {}
    windowed = "sliding_window" in inspect.signature(type(model.config)).parameters
    if spec.get("static"):  # whose steps `generate` compiles on a GPU
        cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + spec["new_tokens"])
    else:
        cache = DynamicCache(config=model.config) if windowed else DynamicCache()  # which a leftover key would mislead
    context: Any = nullcontext()
    sections: Any = nullcontext({})
    if engine == "squeeze":
        from squeeze import SqueezeConfig, read_calibration, squeezed
        from squeeze.devices import section_seconds

        sections, config = section_seconds(), dict(spec["config"])
        if "calibration" in config:
            config["calibration"] = read_calibration(config["calibration"])
        context = squeezed(model, SqueezeConfig(**config))
    elif engine == "kvpress" and budgets:
        context = press(spec)(model)

    def pause(tokens: int) -> None:
        if tokens == 1 and engine == "squeeze":
            measured.update(kv_bytes=run.kv_bytes, state_bytes=run.state_bytes, budgets=run.budgets.tolist())
        elif tokens == 1:
            if engine == "transformers" and budgets:  # cutting a cache belongs to neither prefill nor decode
                cut(cache, budgets)
            measured["kv_bytes"] = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        if (tokens - 1) % spec["turn_steps"] == 0:
            turn(measured)

    clock = StepClock(pause)
    with context as run, sections as seconds_of:
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=None if engine == "squeeze" else cache,
            max_new_tokens=spec["new_tokens"],
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
    if engine == "squeeze":
        measured["importance_seconds"] = seconds_of["importance"]
        if run.recorder.failed is not None:
            raise RuntimeError(f"its steps could not be recorded: {run.recorder.failed}")
    return clock.seconds, measured


def spread(seconds: list[float]) -> dict[str, float]:
    """Median and quartiles, in seconds; with fewer than two values they are all the same."""
    low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    return {"median": statistics.median(seconds), "low": low, "high": high}


def main() -> None:
    """Speak with `squeeze.bench`: see this module's docstring."""
    answers = sys.stdout
    spec = json.loads(sys.stdin.readline())

    def turn(known: dict[str, Any]) -> None:
        print(json.dumps({"known": known}), file=answers, flush=True)
        line = sys.stdin.readline()
        if not line:
            sys.exit("the benchmark is gone")
        spec.update(json.loads(line))

    try:
        with redirect_stdout(sys.stderr):  # what peers print is no answer
            result = measure(spec, turn)
    except Exception as error:  # whatever a peer raises is the result, and the benchmark goes on
        result = {"error": f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]}
    print(json.dumps({"result": result}), file=answers, flush=True)


if __name__ == "__main__":
    main()
