"""The layers of a model's full cache, told without its weights, against the cache of the model itself."""

import pytest
import torch
from transformers import DynamicCache

from squeeze import Uniform, squeezed
from squeeze.generation.generate import generate, greedy
from squeeze.models.cached_layers import full_cache_bytes, held_bytes, layers_of, own_layers
from squeeze.models_table.zoo import build

PROMPT = torch.arange(3, 43)
#: Windows, chunks, caches that layers share, widths that differ, latent attention, hybrids, experts, and GPT-2, which
#: looks at values while it runs.
MODELS = (
    *("llama", "mistral (window)", "gemma3_text", "gemma3n_text", "gemma4_text", "llama4_text", "deepseek_v3"),
    *("mimo_v2_flash", "mixtral", "gpt_oss", "qwen3_5_text", "falcon_h1", "zamba2", "gpt2"),
)


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_layers_are_those_of_the_models_own_cache(name):
    model = build(name)
    cache = DynamicCache(config=model.config)
    model(PROMPT[None], past_key_values=cache, use_cache=True)
    layers = layers_of(cache)
    assert own_layers(model.config) == layers
    assert full_cache_bytes(layers, len(PROMPT), torch.float32) == held_bytes(cache) > 0


@pytest.mark.parametrize("name", ["gemma3_text", "gemma4_text", "deepseek_v3", "qwen3_5_text"])
def test_kept_is_a_fraction_of_what_the_models_own_cache_holds(name):
    model = build(name)
    _, [full] = generate(model, [PROMPT], greedy(4), None)
    assert full.kv_bytes == full.full_kv_bytes
    with squeezed(model, "sliding_window", Uniform("0.5")) as run:
        _, [half] = generate(model, [PROMPT], greedy(4), run)
        widest = max(layer.kv_heads * (layer.key_dim + layer.value_dim) for layer in run.layers) * 4
        windows = sum(layer.window is not None for layer in run.layers)
    assert half.full_kv_bytes == full.kv_bytes
    # A layer with a window is counted by the window, whose last place is the next token's.
    assert abs(half.kv_bytes - full.kv_bytes / 2) <= widest * (1 + windows)
