"""Check that this environment can run models with a KV budget per layer, and show that it does.

    python modify_transformers.py

The published code overwrote files of the installed transformers; this one patches a model in memory, inside
`with squeezed(model, config)`, and writes nothing. `pred.py` does so by itself, so the command is a check and not a
step: it prints a line per check and exits with 0, or with 1 and what to do.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from typing import Any

from squeeze import threads


def version() -> str:
    from squeeze.compatibility import check_transformers

    return check_transformers()


#: One family of each kind: plain, with a window, with norms after attention and windows in some layers, with attention
#: and MLP side by side and half of a head turned, with biases and a head that is no part of the hidden size.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 64},
    "gemma3_text": {"head_dim": 16, "sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gpt_neox": {"rotary_pct": 0.5},
    "qwen3": {"head_dim": 16},
}


def tiny_model(family: str) -> Any:
    """A model with random weights, small enough to run anywhere."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **FAMILIES[family],
    )
    return AutoModelForCausalLM.from_config(config).eval()


def interface() -> str:
    """The attention function is registered while a model is squeezed, and gone afterwards."""
    from transformers import AttentionInterface

    from squeeze import SqueezeConfig, squeezed
    from squeeze.engine.interface import NAME

    with squeezed(tiny_model("llama"), SqueezeConfig(budgets=[8] * 4)):
        there = NAME in AttentionInterface()
    if not there or NAME in AttentionInterface():
        raise RuntimeError("transformers' AttentionInterface does not take and give back a function as it should")
    return "takes a function, and gives it back"


def findings() -> str:
    """The probe finds what the configurations say."""
    from squeeze.engine.probe import probe

    expected = {
        "llama": ("rope", 8, "x + self_attn", None),
        "mistral": ("rope", 8, "x + self_attn", 64),
        "gemma3_text": ("rope", 16, "x + post_attention_layernorm", 64),
        "gpt_neox": ("rope", 4, "x + attention", None),
        "qwen3": ("rope", 16, "x + self_attn", None),
    }
    for family, wanted in expected.items():
        first = probe(tiny_model(family)).layers[0]
        dims = None if first.rotation is None else first.rotation.dims
        found = first.encoding, dims, None if first.residual is None else first.residual.rule, first.window
        if found != wanted:
            raise RuntimeError(f"of {family} it finds {found}, not {wanted}")
    return "finds positions, residual streams and windows"


def family(name: str) -> str:
    return f"{full_budget(name)}; {own_budgets(name)}"


def full_budget(family: str) -> str:
    """With room for every token, the patched model gives the unpatched model's logits at every step."""
    import torch

    from squeeze import SqueezeConfig, squeezed
    from squeeze.evictors import EVICTORS

    model, tokens = tiny_model(family), torch.arange(3, 35)[None]
    with torch.no_grad():
        expected = model(tokens).logits[0, 19:]
        for algorithm in EVICTORS.names:
            with squeezed(model, SqueezeConfig(algorithm, budgets=[40] * 4)) as run:
                cache = run.cache(max_new_tokens=12)
                logits = [model(tokens[:, :20], past_key_values=cache).logits[0, -1]]
                for position in range(20, 32):
                    logits.append(model(tokens[:, position : position + 1], past_key_values=cache).logits[0, -1])
            worst = (torch.stack(logits) - expected).abs().max().item()
            if not worst < 1e-4:
                raise RuntimeError(f"{algorithm} differs from the unpatched model by {worst:.2g}")
        full = model.generate(tokens, max_new_tokens=8, do_sample=False)
        with squeezed(model, SqueezeConfig(budgets=[40] * 4)) as run:
            if not torch.equal(model.generate(tokens, max_new_tokens=8, do_sample=False), full) or run.budgets is None:
                raise RuntimeError("generate does not use the squeezed cache as it should")
        if not torch.equal(model(tokens).logits[0, 19:], expected):
            raise RuntimeError("the model is not what it was after the patch was taken off")
    return f"{', '.join(EVICTORS.names)} equal the unpatched model"


def own_budgets(family: str) -> str:
    """Every layer's tensors are as long as its own budget, after prefill and after decoding."""
    import torch

    from squeeze import SqueezeConfig, squeezed
    from squeeze.evictors import EVICTORS

    model, tokens, budgets = tiny_model(family), torch.arange(3, 63)[None], [35, 47, 38, 41]
    for algorithm in EVICTORS.names:
        with torch.no_grad(), squeezed(model, SqueezeConfig(algorithm, budgets=budgets)) as run:
            cache = run.cache(max_new_tokens=4)
            model(tokens, past_key_values=cache)
            for token in range(4):
                model(tokens[:, token : token + 1], past_key_values=cache)
        held = [len(layer.keys) / layer.facts.kv_heads for layer in cache.squeezed]
        if held != budgets:
            raise RuntimeError(f"{algorithm} holds {held} tokens, not {budgets}")
    return f"layers hold {budgets} tokens"


CHECKS: list[tuple[str, Callable[[], str]]] = [
    ("transformers version", version),
    ("attention interface", interface),
    ("probe", findings),
    *((name, partial(family, name)) for name in FAMILIES),
]


def main(arguments: list[str] | None = None) -> int:
    """Run all checks in order; stop at the first that fails."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(
        arguments
    )
    os.environ |= threads.settings()
    for name, function in CHECKS:
        try:
            print(f"ok      {name}: {function()}", flush=True)
        except Exception as error:  # whatever a foreign version raises is the finding
            print(f"FAILED  {name}: {error}")
            print("Install the versions this was tested with: pip install -r requirements.txt")
            return 1
    print("This environment is ready; pred.py applies the patch by itself.")
    return 0
