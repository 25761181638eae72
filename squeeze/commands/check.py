"""Check that this environment can run models with a KV budget per layer, and show that it does.

    python modify_transformers.py

The published code overwrote files of the installed transformers; this one patches a model in memory, inside
`with squeezed(model, config)`, and writes nothing. `pred.py` does so by itself, so the command is a check and not a
step: it prints a line per check and exits with 0, or with 1 and what to do.
"""

from __future__ import annotations

import argparse
import inspect
import os
from collections.abc import Callable
from functools import partial

from squeeze import threads


def version() -> str:
    from squeeze.compatibility import check_transformers

    return check_transformers()


def attention_classes() -> str:
    from squeeze.engine.decoder_layer import ATTENTION_ATTRIBUTES, ATTENTION_CLASSES

    for name, attention_class in ATTENTION_CLASSES.items():
        model = tiny_model(name)
        module = model.model.layers[0].self_attn
        missing = [attribute for attribute in ATTENTION_ATTRIBUTES if not hasattr(module, attribute)]
        if not isinstance(module, attention_class) or missing:
            raise RuntimeError(f"{type(module).__name__} lacks {', '.join(missing)}: pip install -r requirements.txt")
        for argument in ("hidden_states", "position_embeddings", "past_key_values"):
            if argument not in inspect.signature(attention_class.forward).parameters:
                raise RuntimeError(
                    f"{attention_class.__name__}.forward takes no {argument}: pip install -r requirements.txt"
                )
    return ", ".join(attention_class.__name__ for attention_class in ATTENTION_CLASSES.values())


def tiny_model(architecture: str):
    """A model with random weights and the given architecture, small enough to run anywhere."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        architecture,
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def full_budget(architecture: str) -> str:
    """With room for every token, the patched model gives the unpatched model's logits at every step."""
    import torch

    from squeeze import SqueezeConfig, squeezed
    from squeeze.evictors import EVICTORS

    model, tokens = tiny_model(architecture), torch.arange(3, 35)[None]
    with torch.no_grad():
        expected = model(tokens).logits[0, 19:]
        for algorithm in EVICTORS.names:
            with squeezed(model, SqueezeConfig(algorithm, budgets=[32] * 4)) as run:
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


def own_budgets(architecture: str) -> str:
    """Every layer's tensors are as long as its own budget, after prefill and after decoding."""
    import torch

    from squeeze import SqueezeConfig, squeezed
    from squeeze.evictors import EVICTORS

    model, tokens, budgets = tiny_model(architecture), torch.arange(3, 35)[None], [5, 17, 8, 11]
    for algorithm in EVICTORS.names:
        with torch.no_grad(), squeezed(model, SqueezeConfig(algorithm, budgets=budgets)) as run:
            cache = run.cache(max_new_tokens=4)
            model(tokens, past_key_values=cache)
            for token in range(4):
                model(tokens[:, token : token + 1], past_key_values=cache)
        held = [layer.keys.shape[2] for layer in cache.layers]
        if held != budgets:
            raise RuntimeError(f"{algorithm} holds {held} tokens, not {budgets}")
    return f"layers hold {budgets} tokens"


CHECKS: list[tuple[str, Callable[[], str]]] = [
    ("transformers version", version),
    ("attention classes", attention_classes),
    ("llama: full budget", partial(full_budget, "llama")),
    ("llama: own budgets", partial(own_budgets, "llama")),
    ("mistral: full budget", partial(full_budget, "mistral")),
    ("mistral: own budgets", partial(own_budgets, "mistral")),
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
