"""Folders of other architectures than Llama and Mistral: loaded, packed, measured, the same as transformers' own."""

import json

import pytest
import torch
from tiny import tiny_tokenizer
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache

from squeeze import InputError
from squeeze.models.cached_layers import full_cache_bytes, own_layers
from squeeze.models.folder_config import generation_config, model_config, positions
from squeeze.models.loading import load
from squeeze.models.packing import PackedLinear, PackedPart
from squeeze.models.rope import LengthwiseRope, find_lengthwise

CPU = torch.device("cpu")
SIZES = {
    **{"vocab_size": 199, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
GPT2 = {"vocab_size": 199, "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 512, "eos_token_id": 2}
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
WINDOWS = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2}
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}
JAMBA = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}

#: Name → model_type and settings, and for each layer with keys and values the numbers of a token and its window.
MODELS = {
    "qwen2": ("qwen2", SIZES, [(64, None)] * 4),
    "qwen3_moe": ("qwen3_moe", SIZES | MOE | {"head_dim": 24}, [(96, None)] * 4),
    "mixtral": ("mixtral", SIZES | MOE, [(64, None)] * 4),
    "phimoe": ("phimoe", SIZES | MOE, [(64, None)] * 4),
    "llama4_text": (
        "llama4_text",
        SIZES | MOE | {"head_dim": 16, "attention_chunk_size": 16, "intermediate_size_mlp": 96, "moe_layers": [1, 3]},
        [(64, 16)] * 3 + [(64, None)],
    ),
    "gemma3_text": ("gemma3_text", SIZES | WINDOWS | {"head_dim": 16}, [(64, 16), (64, None)] * 2),
    "gemma3": (
        "gemma3",
        {
            "text_config": SIZES | WINDOWS | {"head_dim": 16},
            "vision_config": VISION,
        },
        [(64, 16), (64, None)] * 2,
    ),
    "phi": ("phi", SIZES | {"partial_rotary_factor": 0.5}, [(64, None)] * 4),
    "gpt_oss": ("gpt_oss", SIZES | MOE | WINDOWS | {"head_dim": 16}, [(64, 16), (64, None)] * 2),
    "gpt_neox": ("gpt_neox", SIZES | {"rotary_pct": 0.25}, [(128, None)] * 4),
    "falcon": (
        "falcon",
        SIZES | {"multi_query": True, "alibi": False, "new_decoder_architecture": False},
        [(32, None)] * 4,
    ),
    "opt": ("opt", SIZES | {"ffn_dim": 96, "word_embed_proj_dim": 64}, [(128, None)] * 4),
    "gpt2": ("gpt2", GPT2, [(128, None)] * 4),
    "jamba": ("jamba", SIZES | MOE | JAMBA | {"mamba_dt_rank": 8, "use_mamba_kernels": False}, [(64, None)] * 2),
}
IDS = torch.randint(3, 199, (1, 40), generator=torch.Generator().manual_seed(1))


def save(folder, kind, settings):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**settings), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """`saved("qwen2")`: a folder of a random model, and the model."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("models") / name
            made[name] = folder, save(folder, *MODELS[name][:2])
        return made[name]

    return get


@pytest.mark.parametrize("name", MODELS)
def test_a_loaded_model_is_the_one_that_was_saved(saved, name):
    """Packed, also where a module reads a layer's weight (Jamba) or a layer does more than multiply (PhiMoE)."""
    folder, model = saved(name)
    found, _ = load(folder, CPU, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(found(input_ids=IDS).logits, model(input_ids=IDS).logits, atol=1e-4, rtol=1e-4)
        settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
        assert torch.equal(found.generate(IDS, **settings), model.generate(IDS, **settings))
    assert not [module for module in found.modules() if type(module) is nn.Linear and module.weight.device == CPU]
    assert positions(found.config) == 512


@pytest.mark.parametrize("name", MODELS)
def test_layers_of_the_cache_are_those_that_a_forward_pass_fills(saved, name):
    model = saved(name)[1]
    layers = own_layers(model.config)
    widths = [layer.kv_heads * (layer.key_dim + layer.value_dim) for layer in layers]
    assert list(zip(widths, [layer.window for layer in layers], strict=True)) == MODELS[name][2]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=IDS, past_key_values=cache, use_cache=True)
    filled = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in filled)
    assert held == full_cache_bytes(layers, IDS.shape[1], torch.float32)


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("qwen2", {(64, 32, 32), (96, 96)}),
        ("gemma3_text", {(64, 32, 32), (96, 96)}),
        ("phi", {(64, 64, 64)}),
        ("mixtral", {(64, 32, 32)}),
        ("gpt_neox", set()),
    ],
)
def test_layers_with_one_input_are_found_by_looking(saved, name, groups):
    """And asked once a pass: what does not get the input of the layer before it would be multiplied again."""
    model, _ = load(saved(name)[0], CPU, torch.float32)
    found = [module.packed for module in model.modules() if isinstance(module, PackedPart) and module.index == 0]
    assert {tuple(packed.sizes) for packed in found} == (groups if name != "phi" else {(64, 32, 32)})
    calls = []
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.register_forward_hook(lambda module, *_: calls.append(module))
    model(input_ids=IDS)
    assert len(calls) == len(set(calls))


def test_a_packed_layer_shows_its_weight_and_bias(saved):
    folder, model = saved("qwen2")
    packed, _ = load(folder, CPU, torch.float32)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        one, other = (getattr(each.model.layers[1].self_attn, name) for each in (packed, model))
        assert torch.equal(one.weight, other.weight)
        assert one.bias is other.bias is None or torch.equal(one.bias, other.bias)
        assert (one.in_features, one.out_features) == (other.in_features, other.out_features)


def change(folder, **settings):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))


def test_what_an_architecture_does_not_declare_but_its_code_reads_counts(tmp_path):
    """Gemma 3's pattern of windows and RoPE of them, as its first checkpoints have it; wishes in parts do not."""
    text = SIZES | {"head_dim": 16, "use_cache": False, "num_beams": 3}
    text |= {"sliding_window_pattern": 2, "rope_local_base_freq": 123.0, "rope_theta": 456.0}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text, "temperature": 2}))
    for config in (model_config(tmp_path), CONFIG_MAPPING["gemma3"](text_config=text)):
        made = config.text_config
        assert made.layer_types == ["sliding_attention", "full_attention"] * 2
        thetas = {kind: rope["rope_theta"] for kind, rope in made.rope_parameters.items()}
        assert thetas == {"sliding_attention": 123.0, "full_attention": 456.0}
    assert model_config(tmp_path).text_config.use_cache
    assert not hasattr(model_config(tmp_path).text_config, "num_beams")


def test_infinity_as_python_and_as_transformers_write_it(tmp_path):
    for written in ("Infinity", '{"__float__": "Infinity"}'):
        text = json.dumps({"model_type": "bamba", "time_step_limit": [0.0, "@"]}).replace('"@"', written)
        (tmp_path / "config.json").write_text(text)
        assert tuple(model_config(tmp_path).time_step_limit) == (0.0, float("inf"))


def test_the_end_of_a_text_by_the_part_that_is_text(tmp_path):
    part = SIZES | {"eos_token_id": [5, 6], "bos_token_id": 7}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": part}))
    assert generation_config(tmp_path, 199).eos_token_id == [5, 6]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "text_config": part}))
    assert generation_config(tmp_path, 199).eos_token_id is None, "a leftover: Llama has no such part"


LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 3.0, 4.0]}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64, "partial_rotary_factor": 0.5}),
        ("phi", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 64}),
        (
            "gemma3_text",
            WINDOWS
            | {
                "head_dim": 16,
                "max_position_embeddings": 64,
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                    "full_attention": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
                },
            },
        ),
    ],
)
def test_angles_by_each_sequences_own_length(tmp_path, kind, settings):
    """Of part of a head, and of one kind of layers: a short prompt in a batch with a long one, and after it."""
    save(tmp_path, kind, SIZES | settings)
    long, short = torch.cat([IDS, IDS, IDS], dim=1), IDS[:, :30]
    alone = [load(tmp_path, CPU, torch.float32)[0](ids, use_cache=False).logits[0, -1] for ids in (long, short)]
    model, _ = load(tmp_path, CPU, torch.float32)
    [(rotary, lengthwise)] = find_lengthwise(model)
    assert isinstance(lengthwise, LengthwiseRope) and rotary.forward is lengthwise
    before = {name: buffer.clone() for name, buffer in rotary.named_buffers()}
    padded = torch.cat([long, torch.cat([torch.zeros(1, 90, dtype=torch.long), short], dim=1)])
    mask = torch.ones_like(padded)
    mask[1, :90] = 0
    at = (mask.cumsum(dim=-1) - 1).clamp(min=0)
    both = model(padded, attention_mask=mask, position_ids=at, use_cache=False).logits[:, -1]
    for found, expected in zip(both, alone, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model(short, use_cache=False).logits[0, -1], alone[1], atol=1e-4, rtol=1e-4)
    assert all(torch.equal(buffer, before[name]) for name, buffer in rotary.named_buffers())


def test_rope_by_length_that_nothing_computes_is_refused(saved):
    model = load(saved("gpt_neox")[0], CPU, torch.float32)[0]
    model.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(InputError, match="RoPE is of type dynamic, and nothing in a gpt_neox model was found"):
        find_lengthwise(model)
