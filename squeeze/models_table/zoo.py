"""Tiny random models of many architectures, made from configurations alone: a fraction of a second and no download."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from squeeze.errors import InputError


class Tiny(NamedTuple):
    """A `model_type` of transformers, and the settings of its configuration."""

    model_type: str
    settings: dict[str, Any]


TOKENS = {"vocab_size": 199, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {
    **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "max_position_embeddings": 512},
    **{"num_attention_heads": 4, "num_key_value_heads": 2},
}


def tiny(model_type: str, *shared: dict[str, Any], **settings: Any) -> Tiny:
    """A model of the sizes above; later settings win."""
    merged = TOKENS | SIZES
    for more in (*shared, settings):
        merged |= more
    return Tiny(model_type, merged)


def own(model_type: str, *shared: dict[str, Any], **settings: Any) -> Tiny:
    """A model whose configuration calls its sizes otherwise."""
    return Tiny(model_type, TOKENS | {name: value for more in shared for name, value in more.items()} | settings)


# What families have in common; each takes of it what it knows.
HEAD = {"head_dim": 16}
EXPERTS = {
    **{"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "moe_intermediate_size": 48,
}
GROUPS = {"n_group": 1, "topk_group": 1}
WINDOW = {"sliding_window": 16}
ALTERNATING = WINDOW | {"layer_types": ["sliding_attention", "full_attention"] * 2}
THREE_TO_ONE = WINDOW | {"layer_types": ["sliding_attention"] * 3 + ["full_attention"]}
LATENT = {
    **{"q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12},
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "n_shared_experts": 1},
    **GROUPS,
    **{"first_k_dense_replace": 1, "num_key_value_heads": 4},
}
NO_ROPE_IN_LAST = {"no_rope_layers": [1, 1, 1, 0], "no_rope_layer_interval": 4}
HYBRID = {"layer_types": ["linear_attention", "full_attention"] * 2}
DELTA_NET = {
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16},
    "linear_value_head_dim": 16,
    **HYBRID,
}
MAMBA = {
    **{"mamba_n_heads": 8, "mamba_d_state": 16, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_chunk_size": 16},
}
SHARED_CACHE = {
    **{"num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3},
    **{"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 199},
}
GPT = {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 512}


def scaled_rope(rope_type: str, **settings: float) -> dict[str, Any]:
    """RoPE stretched from 64 positions to four times as many."""
    base = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    return {"rope_parameters": {"rope_type": rope_type} | base | settings}


#: Name in the table → model. One architecture may come in several shapes.
ZOO: dict[str, Tiny] = {
    "llama": tiny("llama"),
    "llama (llama3 RoPE)": tiny("llama", scaled_rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0)),
    "llama (YaRN)": tiny("llama", scaled_rope("yarn")),
    "mistral (window)": tiny("mistral", WINDOW),
    "mixtral": tiny("mixtral", EXPERTS),
    "ministral": tiny("ministral", HEAD, ALTERNATING),
    "ministral3": tiny("ministral3", HEAD),
    "qwen2": tiny("qwen2"),
    "qwen2 (windows)": tiny("qwen2", WINDOW, use_sliding_window=True, max_window_layers=2),
    "qwen2_moe": tiny("qwen2_moe", EXPERTS, shared_expert_intermediate_size=48),
    "qwen3": tiny("qwen3", HEAD),
    "qwen3_moe": tiny("qwen3_moe", HEAD, EXPERTS),
    "gemma": tiny("gemma", HEAD),
    "gemma2": tiny("gemma2", HEAD, ALTERNATING, query_pre_attn_scalar=24, attn_logit_softcapping=5.0),
    "gemma3_text": tiny("gemma3_text", HEAD, THREE_TO_ONE, query_pre_attn_scalar=24),
    "gemma3n_text": tiny(
        *("gemma3n_text", HEAD, WINDOW, SHARED_CACHE),
        laurel_rank=8,
        intermediate_size=[96] * 6,
        activation_sparsity_pattern=[0.0] * 6,
    ),
    "gemma4_text": tiny("gemma4_text", HEAD, WINDOW, SHARED_CACHE, global_head_dim=32),
    "vaultgemma": tiny("vaultgemma", HEAD, ALTERNATING, attn_logit_softcapping=5.0, query_pre_attn_scalar=24),
    "phi": tiny("phi", partial_rotary_factor=0.5),
    "phi3": tiny("phi3", WINDOW),
    "phimoe": tiny("phimoe", EXPERTS),
    "olmo": tiny("olmo", clip_qkv=8.0),
    "olmo2": tiny("olmo2"),
    "olmo3": tiny("olmo3", ALTERNATING),
    "olmoe": tiny("olmoe", EXPERTS),
    "flex_olmo": tiny("flex_olmo", EXPERTS),
    "granite": tiny(
        "granite", residual_multiplier=0.22, attention_multiplier=0.1, embedding_multiplier=2.0, logits_scaling=2.0
    ),
    "granitemoe": tiny("granitemoe", EXPERTS, residual_multiplier=0.22, attention_multiplier=0.1),
    "granitemoehybrid": tiny(
        *("granitemoehybrid", EXPERTS, MAMBA, HYBRID),
        residual_multiplier=0.22,
        mamba_expand=2,
        shared_intermediate_size=48,
        position_embedding_type="rope",
    ),
    "granite_swa": tiny("granite_swa", HEAD, ALTERNATING, residual_multiplier=0.22),
    "cohere": tiny("cohere", use_qk_norm=True),
    "cohere2": tiny("cohere2", HEAD, THREE_TO_ONE),
    "starcoder2": tiny("starcoder2", WINDOW),
    "stablelm": tiny("stablelm", partial_rotary_factor=0.5),
    "stablelm (parallel)": tiny("stablelm", partial_rotary_factor=0.5, use_parallel_residual=True, qk_layernorm=True),
    "smollm3": tiny("smollm3", NO_ROPE_IN_LAST),
    "gpt_neox": tiny("gpt_neox", rotary_pct=0.25),
    "gpt_neox (sequential)": tiny("gpt_neox", rotary_pct=1.0, use_parallel_residual=False),
    "opt": tiny("opt", ffn_dim=96, word_embed_proj_dim=64),
    "opt (post-norm)": tiny("opt", ffn_dim=96, word_embed_proj_dim=32, do_layer_norm_before=False),
    "gpt2": own("gpt2", GPT),
    "gpt_bigcode": own("gpt_bigcode", GPT),
    "gpt_oss": tiny("gpt_oss", HEAD, ALTERNATING, EXPERTS),
    "llama4_text": tiny(
        *("llama4_text", HEAD, EXPERTS, NO_ROPE_IN_LAST),
        attention_chunk_size=16,
        layer_types=["chunked_attention"] * 3 + ["full_attention"],
        intermediate_size_mlp=96,
        interleave_moe_layer_step=1,
        moe_layers=[1, 3],
    ),
    "glm": tiny("glm", HEAD, partial_rotary_factor=0.5),
    "glm4": tiny("glm4", HEAD, partial_rotary_factor=0.5),
    "glm4_moe": tiny("glm4_moe", HEAD, EXPERTS, GROUPS, first_k_dense_replace=1, partial_rotary_factor=0.5),
    "helium": tiny("helium", HEAD),
    "ernie4_5": tiny("ernie4_5", HEAD),
    "ernie4_5_moe": tiny("ernie4_5_moe", EXPERTS, moe_num_experts=4, moe_k=2, moe_layer_start_index=1),
    "exaone4": tiny("exaone4", ALTERNATING),
    "exaone_moe": tiny("exaone_moe", HEAD, ALTERNATING, EXPERTS, GROUPS, first_k_dense_replace=1),
    "cwm": tiny("cwm", HEAD, ALTERNATING),
    "nanochat": tiny("nanochat", HEAD),
    "hyperclovax": tiny("hyperclovax", HEAD),
    "internlm3": tiny("internlm3", HEAD),
    "solar_open": tiny("solar_open", HEAD, EXPERTS, GROUPS),
    "modernbert-decoder": tiny(
        *("modernbert-decoder",),
        layer_types=ALTERNATING["layer_types"],
        local_attention=16,
        cls_token_id=1,
        sep_token_id=2,
    ),
    "seed_oss": tiny("seed_oss", HEAD),
    "nemotron": tiny("nemotron", HEAD, partial_rotary_factor=0.5),
    "persimmon": tiny("persimmon", partial_rotary_factor=0.5),
    "apertus": tiny("apertus"),
    "arcee": tiny("arcee"),
    "hunyuan_v1_dense": tiny("hunyuan_v1_dense", HEAD),
    "jais2": tiny("jais2", HEAD),
    "minimax_m2": tiny("minimax_m2", HEAD, EXPERTS, rotary_dim=8),
    "dots1": tiny("dots1", HEAD, ALTERNATING, EXPERTS, GROUPS, first_k_dense_replace=1, n_shared_experts=1),
    "afmoe": tiny("afmoe", HEAD, THREE_TO_ONE, EXPERTS, num_dense_layers=1),
    "bitnet": tiny("bitnet"),
    "biogpt": tiny("biogpt"),
    "dbrx": own(
        "dbrx",
        d_model=64,
        n_heads=4,
        n_layers=4,
        max_seq_len=512,
        attn_config={"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        ffn_config={"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    ),
    "diffllama": tiny("diffllama", HEAD),
    "doge": tiny("doge"),
    "mimo_v2_flash": tiny(
        *("mimo_v2_flash", HEAD, ALTERNATING, EXPERTS, GROUPS),
        v_head_dim=12,
        swa_head_dim=16,
        swa_v_head_dim=12,
        swa_num_attention_heads=4,
        swa_num_key_value_heads=2,
    ),
    "jetmoe": tiny("jetmoe", EXPERTS, kv_channels=16),
    "ctrl": own("ctrl", GPT, dff=96),
    "inkling_text": tiny("inkling_text", HEAD, WINDOW),
    # Latent attention: a cache of what keys and values are made from.
    "deepseek_v2": tiny("deepseek_v2", LATENT),
    "deepseek_v3": tiny("deepseek_v3", LATENT),
    "deepseek_v32": tiny("deepseek_v32", LATENT, index_topk=8, index_n_heads=2, index_head_dim=16),
    "deepseek_v4": tiny("deepseek_v4", HEAD, EXPERTS),
    "minicpm3": tiny("minicpm3", LATENT),
    "glm4_moe_lite": tiny("glm4_moe_lite", LATENT),
    "longcat_flash": tiny(
        *("longcat_flash", LATENT),
        head_dim=8,
        num_layers=2,
        ffn_hidden_size=96,
        expert_ffn_hidden_size=48,
        zero_expert_num=1,
        moe_topk=2,
    ),
    "youtu": tiny("youtu", LATENT),
    # Layers of linear attention, of a state space or of convolutions between those of attention, or beside it.
    "qwen3_next": tiny("qwen3_next", HEAD, EXPERTS, DELTA_NET, shared_expert_intermediate_size=48),
    "qwen3_5_text": tiny("qwen3_5_text", HEAD, DELTA_NET),
    "olmo_hybrid": tiny("olmo_hybrid", HEAD, DELTA_NET),
    "kimi_linear": tiny("kimi_linear", LATENT, HYBRID, linear_head_dim=16, linear_num_heads=4),
    "jamba": tiny(
        *("jamba", EXPERTS),
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=16,
        mamba_dt_rank=8,
        mamba_expand=2,
        use_mamba_kernels=False,
    ),
    "bamba": tiny("bamba", MAMBA, attn_layer_indices=[1, 3]),
    "falcon_h1": tiny("falcon_h1", HEAD, MAMBA, mamba_d_ssm=128),
    "minimax": tiny("minimax", HEAD, EXPERTS, HYBRID, block_size=16),
    "nemotron_h": tiny(
        *("nemotron_h", HEAD, EXPERTS, GROUPS),
        chunk_size=16,
        layers_block_type=["mamba", "attention", "moe", "attention"],
        mamba_num_heads=8,
        mamba_head_dim=16,
        n_groups=1,
        ssm_state_size=16,
        moe_shared_expert_intermediate_size=48,
    ),
    "lfm2": tiny("lfm2", layer_types=["conv", "full_attention"] * 2),
    "zamba2": tiny(
        "zamba2",
        chunk_size=16,
        layers_block_type=["mamba", "hybrid"] * 2,
        mamba_d_state=16,
        n_mamba_heads=8,
        mamba_headdim=16,
        num_mem_blocks=1,
        use_mem_rope=True,
        attention_head_dim=32,
        adapter_rank=8,
    ),
    "recurrent_gemma": tiny(
        "recurrent_gemma",
        lru_width=64,
        attention_window_size=16,
        block_types=["recurrent", "attention"],
        conv1d_width=4,
    ),
    # Attention that does not go through transformers' interface.
    "falcon": tiny("falcon", multi_query=True, alibi=False, new_decoder_architecture=False, parallel_attn=True),
    "falcon (40b, 11b)": tiny(
        "falcon", num_kv_heads=2, new_decoder_architecture=True, alibi=False, num_ln_in_parallel_attn=2
    ),
    "falcon (ALiBi, rw)": tiny("falcon", multi_query=False, alibi=True, parallel_attn=False, bias=True),
    "gptj": own("gptj", GPT, rotary_dim=8),
    "codegen": own("codegen", GPT, rotary_dim=8),
    "gpt_neo": own(
        "gpt_neo",
        hidden_size=64,
        num_layers=4,
        num_heads=4,
        max_position_embeddings=512,
        attention_types=[[["global", "local"], 2]],
        window_size=16,
    ),
    "gpt_neox_japanese": tiny("gpt_neox_japanese", intermediate_multiple_size=2),
    "bloom": own("bloom", hidden_size=64, n_layer=4, n_head=4),
    "mpt": own("mpt", d_model=64, n_heads=4, n_layers=4, max_seq_len=512, expansion_ratio=2),
    "xglm": own("xglm", d_model=64, ffn_dim=96, num_layers=4, attention_heads=4, max_position_embeddings=512),
}


def build(name: str, seed: int = 0) -> PreTrainedModel:
    """A model of the zoo, in float32 on the CPU, its attention sharp and its generation without an end.

    Initialisation leaves attention flat and norms at one, which hides errors: every weight is moved from where it was.

    Raises:
        InputError: the installed transformers does not have the architecture.
    """
    model_type, settings = ZOO[name]
    if model_type not in CONFIG_MAPPING:
        raise InputError(f"the installed transformers has no {model_type}")
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[model_type](**settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().float()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            # A state's rates of decay stay what they are, or it overflows.
            if parameter.is_floating_point() and not {"A_log", "dt_bias"} & set(parameter_name.split(".")):
                scale = 1.6 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 0.1
                parameter.add_(torch.randn_like(parameter) * scale)
    model.generation_config.eos_token_id = None
    return model
