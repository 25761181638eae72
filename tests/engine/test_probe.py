"""The probe against what configurations and transformers' source say, and that it leaves everything as it was."""

import copy
import gc
import weakref
from functools import partial
from typing import NamedTuple

import pytest
import torch
from conftest import random_model
from peft import LoraConfig, get_peft_model
from transformers import (
    AttentionInterface,
    DynamicCache,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from squeeze import H2O, SlidingWindow, StreamingLLM
from squeeze.engine import probe as probe_module
from squeeze.engine.probe import probe, squeezable
from squeeze.errors import InputError
from squeeze.models.packing import pack
from squeeze.models_table.zoo import build


class Rope(NamedTuple):
    """What turns: so many dimensions of the keys from the first on, in halves, forwards."""

    dims: int = 16
    interleaved: bool = False
    direction: int = 1
    part: str = "keys"


class Family(NamedTuple):
    """A model of the zoo: `after` is the stream after attention, from what modules of a block were given and gave."""

    rule: str
    after: object
    positions: list
    windows: tuple = (None,) * 4
    chunks: tuple = (None,) * 4
    users: tuple = (1,) * 4
    shape: tuple = (2, 16, 16)
    indices: tuple = (0, 1, 2, 3)
    softcap: float | None = None
    sinks: bool = False
    interface: bool = True
    hybrid: bool = False
    regrouped: bool = False
    others: int = 0


def given(name):
    return lambda seen: seen[name][0]


def parallel(seen):
    return seen[""][1] - seen["mlp"][1]


LLAMA = Family("x + self_attn", given("post_attention_layernorm"), [Rope()] * 4)
GEMMA2 = Family("x + post_attention_layernorm", given("pre_feedforward_layernorm"), [Rope()] * 4)
ALTERNATING = (16, None, 16, None)
LATENT = LLAMA._replace(positions=[Rope(8, part="values")] * 4, shape=(1, 32, 8))
FAMILIES = {
    "llama": LLAMA,
    "llama (llama3 RoPE)": LLAMA,
    "llama (YaRN)": LLAMA,
    "mistral (window)": LLAMA._replace(windows=(16,) * 4),
    "mixtral": LLAMA,
    "qwen2 (windows)": LLAMA._replace(windows=(None, None, 16, 16)),
    "qwen3": LLAMA,
    "gemma2": GEMMA2._replace(windows=ALTERNATING, softcap=5.0),
    "gemma3_text": GEMMA2._replace(windows=(16, 16, 16, None)),
    "gemma3n_text": GEMMA2._replace(
        after=lambda seen: seen["pre_feedforward_layernorm"][0] * 2**0.5 - seen["laurel"][1],
        windows=ALTERNATING,
        users=(1, 1, 2, 2),
    ),
    "phi": Family("x + self_attn", parallel, [Rope(8)] * 4),
    "phi3": LLAMA._replace(windows=(16,) * 4),
    "olmo2": Family("x + post_attention_layernorm", given("mlp"), [Rope()] * 4),
    "granite": LLAMA._replace(rule="x + 0.22·self_attn"),
    "minicpm3": LATENT._replace(rule="x + 0.7·self_attn"),
    "cohere2": Family("x + self_attn", parallel, [*[Rope(16, True)] * 3, "none"], windows=(16, 16, 16, None)),
    "stablelm (parallel)": Family("x + self_attn", parallel, [Rope(8)] * 4),
    "smollm3": LLAMA._replace(positions=[*[Rope()] * 3, "none"]),
    "gpt_neox": Family("x + attention", parallel, [Rope(4)] * 4, shape=(4, 16, 16)),
    "gpt_neox (sequential)": LLAMA._replace(rule="x + attention", shape=(4, 16, 16)),
    "opt": Family("x + self_attn", given("final_layer_norm"), ["absolute"] * 4, shape=(4, 16, 16)),
    "opt (post-norm)": Family("x + self_attn", given("self_attn_layer_norm"), ["absolute"] * 4, shape=(4, 16, 16)),
    "gpt2": Family("x + attn", given("ln_2"), ["absolute"] * 4, shape=(4, 16, 16)),
    "gpt_bigcode": Family("x + attn", given("ln_2"), ["absolute"] * 4, shape=(1, 16, 16)),
    "gpt_oss": LLAMA._replace(windows=ALTERNATING, sinks=True),
    "llama4_text": LLAMA._replace(positions=[*[Rope(16, True)] * 3, "none"], chunks=(16, 16, 16, None)),
    "glm4": LLAMA._replace(rule="x + post_self_attn_layernorm", positions=[Rope(8, True)] * 4),
    "nanochat": LLAMA._replace(positions=[Rope(direction=-1)] * 4),
    "hunyuan_v1_dense": LLAMA._replace(positions=["unknown"] * 4),  # it norms keys after RoPE
    "diffllama": LLAMA._replace(regrouped=True),
    "deepseek_v2": LATENT._replace(positions=[Rope(8, True, part="values")] * 4),
    "deepseek_v3": LATENT,
    "qwen3_next": LLAMA._replace(positions=[Rope(4)] * 2, indices=(1, 3), others=2),
    "jamba": Family("x + self_attn", given("pre_ff_layernorm"), ["none"] * 2, indices=(1, 3), others=2),
    "falcon_h1": Family(
        "x + self_attn", lambda seen: seen["pre_ff_layernorm"][0] - seen["mamba"][1], [Rope()] * 4, hybrid=True
    ),
    "falcon": Family("x + self_attention", parallel, [Rope()] * 4, shape=(1, 16, 16), interface=False),
    "gptj": Family("x + attn", parallel, [Rope(8, True)] * 4, shape=(4, 16, 16), interface=False),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_findings_are_what_source_and_configuration_say(name):
    family, model = FAMILIES[name], build(name)
    findings = probe(model)
    assert findings.others == family.others
    own = {"llama4_text": "model", "opt": "model.decoder", "opt (post-norm)": "model.decoder"}.get(name)
    assert findings.decoder is (model.base_model if own is None else model.get_submodule(own))
    assert tuple(layer.index for layer in findings.layers) == family.indices
    for place, layer in enumerate(findings.layers):
        assert model.get_submodule(layer.name) is layer.module is layer.users[0]
        assert layer.module in layer.block.modules() and layer.residual.rule == family.rule
        positions = layer.encoding
        if layer.rotation is not None:
            assert layer.encoding == "rope" and layer.rotation.start == 0
            turning = layer.rotation
            positions = Rope(turning.dims, turning.interleaved, turning.direction, turning.part)
        assert positions == family.positions[place]
        assert (layer.window, layer.chunk) == (family.windows[place], family.chunks[place])
        assert len(layer.users) == family.users[place]
        assert (layer.kv_heads, layer.key_dim, layer.value_dim) == family.shape
        for name in ("softcap", "sinks", "interface", "hybrid", "regrouped"):
            assert getattr(layer, name) == getattr(family, name), name
        assert layer.foreign == ()


def cached(decoder, token, position):
    """Keys and values of one token at a position, in every layer, with the model's own eager attention."""
    cache = DynamicCache(config=decoder.config.get_text_config(decoder=True))
    where = {"input_ids": torch.tensor([[token]]), "position_ids": torch.tensor([[position]])}
    with torch.no_grad():
        decoder(**where, past_key_values=cache, use_cache=True)
    return cache.layers


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if Rope in map(type, family.positions)])
def test_a_turned_key_is_the_key_that_the_model_caches_there(name):
    findings = probe(build(name))
    here, there = cached(findings.decoder, 5, 7), cached(findings.decoder, 5, 290)
    for layer in findings.layers:
        for part in ("keys", "values"):
            old, new = (getattr(layers[layer.index], part) for layers in (here, there))
            if layer.rotation is not None and part == layer.rotation.part:
                assert not torch.allclose(old, new, atol=1e-2)
                old = layer.rotation(old, torch.tensor([[290 - 7]]))
            torch.testing.assert_close(old, new, atol=2e-4, rtol=1e-4)


def calls(block, decoder):
    """First input and first output of each module in a block, by its name, in a forward pass over four tokens."""
    seen, handles = {}, []

    def note(name, module, args, kwargs, output):
        first = args[0] if args else kwargs.get("hidden_states")
        output = output[0] if isinstance(output, tuple) else output
        seen[name] = tuple(t.clone() if isinstance(t, torch.Tensor) else t for t in (first, output))

    for name, module in block.named_modules():
        handles.append(module.register_forward_hook(partial(note, name), with_kwargs=True))
    with torch.no_grad():
        decoder(torch.tensor([[7, 150, 31, 90]]))
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", FAMILIES)
def test_the_rule_gives_the_stream_after_attention(name):
    findings = probe(build(name))
    for layer in findings.layers:
        seen, residual = calls(layer.block, findings.decoder), layer.residual
        names = {module: place for place, module in layer.block.named_modules()}
        x, made = seen[names[residual.entry]][0], seen[names[residual.branch]][1]
        after = residual.of_stream * x + residual.of_branch * made.reshape(x.shape)
        expected = FAMILIES[name].after(seen).reshape(x.shape)
        torch.testing.assert_close(after, expected, atol=1e-4 * expected.abs().max().item(), rtol=1e-4)


def said(model):
    return probe(model).described()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name", ["llama", "gemma3_text", "olmo2", "granite", "cohere2", "gpt_neox", "deepseek_v3", "gpt_oss", "falcon"]
)
def test_rounding_does_not_change_what_is_found(name, dtype):
    assert said(build(name).to(dtype)) == said(build(name))


class Normed(LlamaDecoderLayer):
    """A layer that scales attention's output by its length, in no module."""

    def forward(self, hidden_states, **kwargs):
        made = self.self_attn(self.input_layernorm(hidden_states), **kwargs)[0]
        after = hidden_states + torch.nn.functional.rms_norm(made, made.shape[-1:])
        return after + self.mlp(self.post_attention_layernorm(after))


def test_a_factor_that_one_token_alone_has_is_no_rule():
    model = random_model("llama")
    for layer in model.model.layers:
        layer.__class__ = Normed
    assert [layer.residual for layer in probe(model).layers] == [None] * 5


def test_biases_that_dwarf_what_turns_do_not_hide_it():
    """Qwen2 has keys of which a few dimensions, that hardly turn, are a hundred times larger than the others."""
    rope = {"rope_type": "default", "rope_theta": 1e6}
    model = random_model("llama", attention_bias=True, rope_parameters=rope).to(torch.bfloat16)
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias.data.view(2, 8)[:, [3, 7]] = 300.0
    expected = Rope(8)
    for layer in probe(model).layers:
        found = layer.rotation
        assert found is not None and Rope(found.dims, found.interleaved, found.direction, found.part) == expected


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "olmo2", "cohere2", "gpt_neox"])
def test_packed_layers_are_looked_through(name):
    model = build(name)
    pack(model)
    assert said(model) == said(build(name))


def test_lora_is_looked_through_and_noticed():
    model = random_model("llama")
    before = probe(model)
    assert probe(model) is before
    lora = LoraConfig(r=4, target_modules=["q_proj", "o_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    peft = get_peft_model(model, lora)
    assert probe(peft.get_base_model()) is not before
    assert said(model) == before.described()


def test_what_was_found_is_kept_until_the_model_changes_or_goes():
    model = random_model("mistral", sliding_window=16)
    before = probe(model)
    assert probe(model) is before and before.layers[0].window == 16
    model.config.sliding_window = 8
    assert probe(model).layers[0].window == 8
    pack(model)
    assert probe(model) is probe(model) is not before
    gone, linear = weakref.ref(model), weakref.ref(model.model.layers[0])
    del model, before
    gc.collect()
    assert gone() is None and linear() is None


def test_vision_language_models_are_probed_for_their_text():
    text = {
        **{"vocab_size": 199, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 16},
        "layer_types": ["sliding_attention", "full_attention"],
    }
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = sizes | {"image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1, image_token_index=198)
    model = Gemma3ForConditionalGeneration(config).eval()
    findings = probe(model)
    assert findings.decoder is model.model and [layer.window for layer in findings.layers] == [16, None]
    assert [layer.name for layer in findings.layers] == [
        f"model.language_model.layers.{index}.self_attn" for index in (0, 1)
    ]
    assert [layer.residual.rule for layer in findings.layers] == ["x + post_attention_layernorm"] * 2
    assert list(map(id, findings.configs)) == [id(config), id(config.text_config)], "and not the vision tower's"


def everything(model):
    """All that modules and configurations have, tensors by identity and by value."""
    attributes = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            shown = copy.deepcopy(value) if isinstance(value, dict) and key.endswith("hooks") else id(value)
            attributes[name, key] = shown
        for key, buffer in module._buffers.items():
            attributes[name, key] = id(buffer), buffer.tolist()
        if hasattr(module, "config"):
            attributes[name, "configuration"] = copy.deepcopy(vars(module.config))
    return attributes


LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
SCALED = {
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    "longrope": LONGROPE | {"short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0]},
}


@pytest.mark.parametrize("name", ["gemma3_text", "phi", "falcon", "qwen3_next", *SCALED])
def test_nothing_of_the_model_or_of_transformers_is_changed(name):
    model = (
        random_model("llama", rope_parameters=SCALED[name], max_position_embeddings=64)
        if name in SCALED
        else build(name)
    )
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    ids = torch.randint(3, 199, (1, 100))
    with torch.no_grad():
        model.base_model(ids)  # RoPE whose angles depend on the length now has those of a long sequence
    functions, before, random = sorted(AttentionInterface()), everything(model), torch.get_rng_state()
    layers = probe(model).layers
    assert sorted(AttentionInterface()) == functions and everything(model) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert all(layer.encoding == "rope" and layer.residual is not None for layer in layers)


def test_a_pass_that_fails_leaves_everything_as_it_was():
    model = build("gemma3_text")
    functions, before = sorted(AttentionInterface()), everything(model)

    def broken(*_):
        raise RuntimeError("out of order")

    hook = model.model.layers[2].register_forward_hook(broken)
    with pytest.raises(InputError, match=r"gemma3_text cannot be squeezed: .* out of order"):
        probe(model)
    hook.remove()
    assert sorted(AttentionInterface()) == functions and everything(model) == before


def test_inference_mode_outside_and_inside():
    with torch.inference_mode():
        model = build("gemma3_text")
        inside = probe(model)
    probe_module._known.clear()
    assert probe(model).described() == inside.described()
    assert not inside.layers[0].rotation.inv_freq.is_inference()


def test_one_pass_is_enough():
    model, passes = build("gemma3_text"), []
    model.model.register_forward_hook(lambda *_: passes.append(1))
    probe(model)
    probe(model)
    assert passes == [1]


@pytest.mark.parametrize(
    ("name", "why"),
    {
        "doge": "DogeAttention is given attention_mask",
        "deepseek_v32": "caches more than keys and values, in a DynamicIndexedLayer",
        "deepseek_v4": "caches more than keys and values, in a DeepseekV4HCACache",
        "minimax": "MiniMax uses cache of its own",
        "recurrent_gemma": "keeps a state of its own, outside of the cache",
        "falcon (ALiBi, rw)": r"adds its positions \(ALiBi\) in code of its own",
        "bloom": r"adds its positions \(ALiBi\) in code of its own",
        "mpt": r"adds its positions \(ALiBi\) in code of its own",
        "gpt_neo": "GPTNeoSelfAttention does not use transformers' AttentionInterface",
        "xglm": "XGLMAttention does not use transformers' AttentionInterface",
    }.items(),
)
def test_what_cannot_be_squeezed_is_refused_with_the_reason(name, why):
    kind = name.split(" ")[0]
    with pytest.raises(InputError, match=f"^{kind} cannot be squeezed: .*{why}[^\n]*$"):
        probe(build(name))


def test_models_without_a_decoders_kv_cache_are_refused():
    with pytest.raises(InputError, match="mamba has no attention layers with a KV cache"):
        probe(MambaForCausalLM(MambaConfig(vocab_size=199, hidden_size=32, num_hidden_layers=1)))
    t5 = T5Config(vocab_size=199, d_model=32, d_ff=32, d_kv=8, num_layers=1, num_heads=2)
    with pytest.raises(InputError, match="t5 is an encoder-decoder"):
        probe(T5ForConditionalGeneration(t5))


def test_methods_are_refused_where_a_model_cannot_serve_them():
    def refused(name, evictor, why, **asked):
        findings = probe(build(name) if isinstance(name, str) else name)
        squeezable(findings, SlidingWindow())
        with pytest.raises(InputError, match=why):
            squeezable(findings, evictor, **asked)

    squeezable(probe(build("gemma3_text")), StreamingLLM(), similarities=True, prefill_chunk=8)
    squeezable(probe(build("jamba")), StreamingLLM())
    squeezable(probe(build("gpt2")), StreamingLLM(sinks=0))
    refused("diffllama", H2O(), "h2o evicts for every KV head by itself, and attention of diffllama mixes them")
    refused("gpt2", StreamingLLM(), "streaming moves sink tokens, and positions of gpt2 are added to the tokens")
    refused("hunyuan_v1_dense", StreamingLLM(), "positions of hunyuan_v1_dense are in the keys in a way not known")
    refused("gemma3_text", StreamingLLM(16), "needs 17 tokens a layer, and the model's own attention window is 16")
    refused("llama4_text", StreamingLLM(16), "needs 17 tokens a layer, and the model's own attention chunk is 16")
    refused("qwen3_next", SlidingWindow(), "prefill_chunk cannot be used with qwen3_next", prefill_chunk=8)
    refused("falcon_h1", SlidingWindow(), "prefill_chunk cannot be used with falcon_h1", prefill_chunk=8)
    refused("gpt_neox_japanese", H2O(), "enters the residual stream was not found .*: take", similarities=True)
    for rope in SCALED.values():
        model = random_model("llama", rope_parameters=rope, max_position_embeddings=128)
        refused(model, StreamingLLM(), "those of this llama's RoPE, .*, depend on a sequence's length")


def test_findings_say_alike_layers_once():
    assert said(build("gemma3_text")) == {
        "layers": [
            {
                "layers": "0-2",
                "attention": "Gemma3Attention",
                "kv_heads": 2,
                "key_dim": 16,
                "value_dim": 16,
                "positions": "rope, keys 0-15, halves",
                "stream": "x + post_attention_layernorm",
                "window": 16,
            },
            {
                "layers": "3",
                "attention": "Gemma3Attention",
                "kv_heads": 2,
                "key_dim": 16,
                "value_dim": 16,
                "positions": "rope, keys 0-15, halves",
                "stream": "x + post_attention_layernorm",
            },
        ]
    }
    described = said(build("qwen3_next"))
    assert described["other_layers"] == 2 and [kind["layers"] for kind in described["layers"]] == ["0-1"]
    windows = [(kind["layers"], kind.get("window")) for kind in said(build("gpt_oss"))["layers"]]
    assert windows == [("0, 2", 16), ("1, 3", None)]


def test_reach_is_what_a_layers_own_full_cache_holds():
    layers = probe(build("gemma3_text")).layers
    assert [layer.reach(100) for layer in layers] == [16, 16, 16, 100] and layers[0].reach(9) == 9
    assert [layer.reach(100) for layer in probe(build("llama4_text")).layers] == [16, 16, 16, 100]
