"""A model's `config.json`: any value in any field is read or refused, and changes no more than it says."""

import json
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import save_tiny
from transformers import AutoConfig, AutoModelForCausalLM

from squeeze import InputError
from squeeze.models.described import check_weights
from squeeze.models.folder_config import model_config
from squeeze.models.loading import load
from squeeze.models.model_config import ModelConfig, read_config
from squeeze.models.model_files import Tensor, inspect
from squeeze.models.sources import fetch, resolve

CPU = torch.device("cpu")
ROPE = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 64},
    "longrope": {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 64},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of each architecture, and what its config says."""
    place = tmp_path_factory.mktemp("models")
    folders = {name: save_tiny(place / name, name) for name in ("llama", "mistral")}
    return {name: (folder, json.loads((folder / "config.json").read_text())) for name, folder in folders.items()}


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved["llama"][0], tmp_path / "m")


def say(folder, **changed):
    """Change a folder's config."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changed))
    return folder


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"model_type": []}, "model_type is not text"),
        ({"max_position_embeddings": None}, "max_position_embeddings is not a whole number, got null"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is not a whole number >= 4"),
        ({"max_position_embeddings": "many"}, "max_position_embeddings is not a whole number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is not a whole number >= 1"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, but the weights have 5"),
        ({"num_hidden_layers": 4}, "num_hidden_layers is 4, but the weights have 5"),
        ({"sliding_window": "x"}, r"sliding_window is not a whole number or null"),
        ({"hidden_size": 50}, "hidden_size 50 is no multiple of num_attention_heads 6"),
        ({"hidden_size": 96}, r"hidden_size is 96, but \S+ in model.safetensors has 48"),
        ({"num_key_value_heads": 4}, "num_attention_heads 6 is no multiple of num_key_value_heads 4"),
        (
            {"num_key_value_heads": 3},
            r"num_key_value_heads times head_dim is 24, but layers\.0\.self_attn\.k_proj\.weight",
        ),
        ({"num_key_value_heads": None}, "num_key_value_heads times head_dim is 48, but"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"vocab_size": 2 * 10**9}, "vocab_size is 2000000000, but"),
        ({"vocab_size": 10**30}, "vocab_size is not a whole number <= 2147483647"),
        ({"intermediate_size": -1}, "intermediate_size is not a whole number >= 1"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps is not a number >= 0.0"),
        ({"hidden_act": "sulu"}, "hidden_act: there is no activation 'sulu', perhaps .*silu"),
        (
            {"attention_bias": True},
            r"lack 20 tensors of the model, among them model\.layers\.0\.self_attn\.q_proj\.bias",
        ),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is not true or false"),
        ({"eos_token_id": ["</s>"]}, r"eos_token_id\[0\] is not a whole number"),
        ({"rope_theta": 0}, "rope_theta is not a number > 1.0"),
        ({"rope_scaling": {"type": "su"}}, "rope_scaling.type: there is no RoPE 'su', .*; su is called longrope now"),
        (
            {"rope_scaling": {"rope_type": "xpos"}},
            "rope_scaling.rope_type: there is no RoPE 'xpos', only default, linear",
        ),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing, which RoPE linear needs"),
        ({"rope_scaling": 5}, r"rope_scaling is not a JSON object or null"),
        (
            {"rope_parameters": {"rope_type": "longrope"} | ROPE["longrope"] | {"long_factor": [1]}},
            "= 4 numbers, got 1",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "full_attention is RoPE of one kind of layers",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not a number >= 1.0"),
        ({"quantization_config": {}}, "quantization_config has no quant_method"),
        ({"per_layer_config": {"0": {"num_key_value_heads": 1}}}, "per_layer_config"),
    ],
)
def test_what_cannot_be(folder, changed, words):
    say(folder, **changed)
    with pytest.raises(InputError, match=f"(config.json|weights in .*){words}|config.json: .*{words}|{words}"):
        load(folder, CPU, torch.float32)


@pytest.mark.parametrize("window", [1, 0, -5])
def test_windows(saved, tmp_path, window):
    folder = say(shutil.copytree(saved["mistral"][0], tmp_path / "m"), sliding_window=window)
    with pytest.raises(InputError, match=f"sliding_window must be null or 2 or more, and is {window}"):
        fetch(resolve(str(folder)))


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
@pytest.mark.parametrize("kind", [*ROPE, "default"])
@pytest.mark.parametrize("old", [True, False])
def test_what_is_taken_is_what_transformers_reads(saved, tmp_path, architecture, kind, old):
    """The config that a model gets is the one that transformers makes from the whole file."""
    folder = shutil.copytree(saved[architecture][0], tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    rope = {"type" if old else "rope_type": kind} | ROPE.get(kind, {})
    config |= {"rope_parameters": rope | {"rope_theta": 5000.0}}
    if old:
        del config["rope_parameters"]
        config |= {"rope_scaling": rope, "rope_theta": 5000.0}
    (folder / "config.json").write_text(json.dumps(config))
    ours, theirs = model_config(folder).to_dict(), AutoConfig.from_pretrained(folder).to_dict()
    assert {key for key in theirs if ours.get(key) != theirs[key]} <= {
        *("architectures", "dtype", "initializer_range"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version"),
    }


def test_fields_that_are_not_read_have_no_effect(saved, folder):
    ids = torch.arange(3, 40)[None]
    want = load(saved["llama"][0], CPU, torch.float32)[0](ids).logits
    say(
        folder,
        **{"return_dict": False, "output_hidden_states": "x", "output_attentions": True, "id2label": {"a": 1}},
        **{
            "_attn_implementation": "eager",
            "experts_implementation": "x",
            "torch_dtype": "nothing",
            "num_labels": 10**9,
        },
        **{"auto_map": {"AutoModelForCausalLM": "evil.Model"}, "fusion_config": {"a": 1}, "layer_types": 5},
        **{"is_encoder_decoder": True, "text_config": 5, "chunk_size_feed_forward": "x", "torchscript": True},
    )
    model, _ = load(folder, CPU, torch.float32)
    assert torch.equal(model(ids).logits, want)
    assert model.config._attn_implementation == "sdpa"


def test_weights_of_another_form(folder):
    whole = load_file(folder / "model.safetensors")

    def change(words, **tensors):
        changed = {key.replace("__", "."): value for key, value in tensors.items()}
        save_file(whole | changed, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(InputError, match=words):
            inspect(folder)

    change(
        "has layers.0.self_attn.q_proj.bias, which the model", model__layers__0__self_attn__q_proj__bias=torch.ones(48)
    )
    change("norm.weight in .* must have 1 dimensions", model__norm__weight=torch.ones(48, 1))
    name = "model.layers.0.self_attn.q_proj.weight"
    change("holds whole numbers: if the weights are quantized", **{name: whole[name].to(torch.int8)})
    save_file({"a": torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(InputError, match="num_hidden_layers is 5, but the weights have 0"):
        inspect(folder)


def test_tied_weights_and_those_of_the_bare_model(folder):
    """`lm_head` may be missing where it is the embedding; `model.` where LlamaModel was saved."""
    whole = load_file(folder / "model.safetensors")
    say(folder, tie_word_embeddings=True)
    for dropped in ("lm_head.weight", "model.embed_tokens.weight"):
        left = {key.removeprefix("model."): value for key, value in whole.items() if key != dropped}
        save_file(left, folder / "model.safetensors")
        inspect(folder)
    say(folder, tie_word_embeddings=False)
    with pytest.raises(InputError, match=r"lack 1 tensors of the model, among them embed_tokens\.weight"):
        inspect(folder)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True},
            "by bitsandbytes .*cannot be loaded here: .*bitsandbytes",
        ),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "by awq .*cannot be loaded here: .*pip install"),
        ({"quant_method": "gptq", "bits": 4}, "by gptq .*cannot be loaded here: .*pip install"),
        (
            {"quant_method": "compressed-tensors"},
            "by compressed-tensors .*cannot be loaded here: .*compressed-tensors",
        ),
        ({"quant_method": "quanto"}, "by quanto .*cannot be loaded here: "),
        ({"quant_method": "mine"}, "by mine .*which transformers does not know: it knows aqlm, .*awq"),
    ],
)
@pytest.mark.parametrize("attn", ["auto", "flash_attention_2"])
def test_quantized_weights(folder, said, words, attn):
    say(folder, quantization_config=said)
    with pytest.raises(InputError, match=f"the weights in .* are quantized {words}") as caught:
        load(folder, CPU, torch.float32, attn)
    assert "--attn" not in str(caught.value)


def test_who_is_to_blame(folder, monkeypatch):
    """A missing package of attention, of a quantization whose device is not there, and of neither."""
    with pytest.raises(InputError, match=r"--attn flash_attention_2 is not installed here: .*FlashAttention"):
        load(folder, CPU, torch.float32, "flash_attention_2")

    def fail(error):
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: (_ for _ in ()).throw(error))

    fail(ImportError("needs accelerate"))
    with pytest.raises(InputError, match=r"^the model in .* cannot be loaded: needs accelerate$"):
        load(folder, CPU, torch.float32)
    fail(KeyError("x"))
    with pytest.raises(InputError, match=r"cannot be loaded: KeyError 'x'$"):
        load(folder, CPU, torch.float32)
    fail(RuntimeError("Error(s):\n\n  No GPU found. A GPU is needed.\nmore"))
    say(folder, quantization_config={"quant_method": "eetq"})
    with pytest.raises(InputError, match=r"quantized by eetq .*: Error\(s\): No GPU found. A GPU is needed.$"):
        load(folder, CPU, torch.float32)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([0, 1, 2, -1, 10**9, ""]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["type", "rope_type", "factor", "quant_method", "a"]), inner, max_size=3)
    ),
    max_leaves=5,
)
FIELDS = st.sampled_from([*ModelConfig.__struct_fields__, "per_layer_config", "configuration_files", "anything"])


@settings(max_examples=200, deadline=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["llama", "mistral"]), st.dictionaries(FIELDS, JSON, max_size=3))
def test_any_value_of_any_field(saved, tmp_path, architecture, changed):
    base = saved[architecture][1]
    (tmp_path / "config.json").write_text(json.dumps(base | changed))
    tensors = {"model.embed_tokens.weight": Tensor("w", (199, 48), True)}
    try:
        config = read_config(tmp_path)
        assert min(config.heads) >= 1
        assert config.heads[0] % config.heads[1] == 0
        check_weights(tmp_path, config, tensors)
    except InputError as error:
        assert "config.json" in str(error) or "the weights in" in str(error)
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    "content", [b"\xff", b"{" * 100_000, b'{"model_type": "llama", "a": ' + b"[" * 100_000, b"", b"5"]
)
def test_what_is_no_json_object(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=r"config\.json"):
        read_config(tmp_path)
