"""The configurations that `squeeze.bench` measures, each as the worker's process takes it."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from squeeze.bench.flags import EMBEDDED, TURN_STEPS, has_class3
from squeeze.bench.throughput import memory_of
from squeeze.config import SqueezeConfig
from squeeze.models import sources
from squeeze.numbers import parse_fraction
from squeeze.runs.resolve import with_curves


def specs(args: argparse.Namespace, folder: Path, tokens: list[int], identity: dict[str, Any]) -> list[dict[str, Any]]:
    """Every configuration to measure, this engine's first. Budgets of peers are this engine's own, filled in later.

    Raises:
        InputError: a configuration cannot be.
    """
    common = {
        **{"model": str(folder), "device": args.device, "tokens": tokens, "rounds": args.rounds},
        **{"prompt_length": args.prompt_length, "new_tokens": args.new_tokens, "attn": "sdpa"},
        "turn_steps": TURN_STEPS if args.in_turns else args.new_tokens,
    }
    if args.random_weights is not None:
        common["random_weights"] = True
    if args.throughput:
        common["memory"] = memory_of(args.device, args.memory_gb)
    layers = count_layers(folder)
    everything = {"budgets": [args.prompt_length + args.new_tokens] * layers}
    variants = []
    for batch_size in sorted(args.batch_size) if args.throughput else args.batch_size:
        for dtype in args.dtype:
            base = common | {"batch_size": batch_size, "dtype": dtype}
            for algorithm in args.algorithm:
                squeezed = squeezed_caches(args, algorithm, identity)
                uniform = {"algorithm": algorithm, "allocation": "uniform", "ini_size": args.ini_size}
                configs = {
                    "full": {"": {"algorithm": algorithm, **everything}},
                    "uniform": {"": uniform},
                    "squeezed": squeezed,
                    "compiled": {per: fields | {"compile": True} for per, fields in squeezed.items()},
                    "graphed": {per: fields | {"cuda_graph": True} for per, fields in squeezed.items()},
                }
                for cache in args.caches:
                    for per, config in configs[cache].items():
                        label = f"{algorithm} {cache}{per}"
                        variants.append(base | {"engine": "squeeze", "cache": label, "config": config})
            if args.peers:
                variants += peers(base, args)
            elif args.throughput:
                variants.append(base | {"engine": "transformers", "cache": "DynamicCache full"})
    return variants


def squeezed_caches(args: argparse.Namespace, algorithm: str, identity: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What is said of a squeezed cache after its name, one for each of `--per`, and its fields of `SqueezeConfig`.

    The loss curves of `calibrated` are given as a path, and read where the cache is made.

    Args:
        identity: of the model, see `squeeze.models.sources.identity`.
    Raises:
        InputError: a configuration cannot be, or its curves are not there.
    """
    caches = {}
    for per in args.per:
        fields = {"algorithm": algorithm, "allocation": args.allocation, "per": per, "ini_size": args.ini_size}
        if has_class3(args.allocation):
            fields["kv_class3"] = args.KV_class3
        config = with_curves(SqueezeConfig(**fields), sources.run_name(args.model or EMBEDDED), identity)
        assert config is not None
        if config.calibration is not None:
            fields["calibration"] = os.path.abspath(config.calibration.source)  # workers run elsewhere
        caches["" if per == "layer" else f" per {per}"] = fields
    return caches


def peers(base: dict[str, Any], args: argparse.Namespace) -> list[dict[str, Any]]:
    """The caches that users would run instead, at the same total of tokens."""
    budget = int(parse_fraction("ini_size", args.ini_size) * args.prompt_length)
    layers = count_layers(Path(base["model"]))
    cut = {"budgets": [budget] * layers}
    squeezed = "squeezed" in args.caches and "layer" in args.per
    variants = []
    for attn in args.peer_attn:
        transformers = base | {"engine": "transformers", "attn": attn}
        name = "DynamicCache" if attn == "sdpa" else f"DynamicCache {attn}"
        variants += [transformers | {"cache": f"{name} full"}, transformers | {"cache": f"{name} uniform", **cut}]
        if attn == "sdpa" and squeezed:  # eager attention builds one mask for all layers
            variants.append(transformers | {"cache": f"{name} squeezed", "budgets": "squeezed"})
        if attn == "sdpa" and args.device.startswith("cuda"):
            variants.append(transformers | {"cache": "StaticCache, compiled", "static": True})
        if args.peer_python and "streaming" in args.algorithm:
            kvpress = transformers | {"engine": "kvpress", "python": args.peer_python, "algorithm": "streaming"}
            name = "" if attn == "sdpa" else f" {attn}"
            variants.append(kvpress | {"cache": f"StreamingLLMPress{name}", **cut})
            if attn == "sdpa" and squeezed:
                variants.append(kvpress | {"cache": "PerLayerCompressionPress", "budgets": "squeezed"})
    if args.peer_python and "h2o" in args.algorithm:  # attention weights, which eager attention alone gives
        observed = {"engine": "kvpress", "python": args.peer_python, "algorithm": "h2o", "attn": "eager"}
        variants.append(base | observed | {"cache": "ObservedAttentionPress", **cut})
    return variants


def count_layers(folder: Path) -> int:
    """Layers of a model that have a cache of keys and values."""
    from squeeze.models.cached_layers import own_layers
    from squeeze.models.folder_config import model_config

    return len(own_layers(model_config(folder)))
