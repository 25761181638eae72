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
from squeeze.models.folder_config import SIZES, model_config
from squeeze.models.loading import load
from squeeze.models.model_config import ModelConfig, read_config
from squeeze.models.model_files import Tensor, inspect

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


def checked(folder):
    """What loading looks at before it reads any weights."""
    check_weights(folder, model_config(folder), inspect(folder)[1], quantized=False)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"model_type": []}, "model_type is not text"),
        ({"model_type": "lama"}, "is of type lama, which transformers .* does not know: it knows .*llama"),
        ({"model_type": "mine", "auto_map": {}}, "does not know$"),
        ({"model_type": "mine", "auto_map": {"AutoConfig": "a.B"}}, "does not know; code that comes with a model"),
        ({"model_type": "t5"}, "is of type t5, which is no decoder"),
        ({"model_type": "vit"}, "is of type vit, which is no decoder"),
        ({"model_type": "bert"}, "a model of type bert is no decoder by itself"),
        ({"model_type": "bart"}, "a model of type bart is no decoder by itself"),
        ({"max_position_embeddings": None}, "'max_position_embeddings' expected int, got NoneType"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is not a whole number from 4"),
        ({"max_position_embeddings": "many"}, "'max_position_embeddings' expected int, got str"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is not a whole number from 1"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, but the weights have 48 tensors in all"),
        ({"num_hidden_layers": 4}, "num_hidden_layers is 4, but the weights have 5"),
        ({"num_hidden_layers": 6}, r"lack 9 tensors of the model, among them model\.layers\.5\."),
        ({"hidden_size": 50}, r"hidden size \(50\) is not a multiple of the number of attention heads \(6\)"),
        ({"hidden_size": 96}, r"of shape \(199, 96\) \(hidden_size\), but the weights have \(199, 48\)"),
        ({"head_dim": 10**9}, "head_dim is 1000000000, but the weights have .* numbers in all"),
        ({"num_key_value_heads": 4}, "num_attention_heads 6 is no multiple of num_key_value_heads 4"),
        (
            {"num_key_value_heads": 3},
            r"k_proj\.weight of shape \(24, 48\) \(num_key_value_heads times head_dim\), but",
        ),
        ({"num_key_value_heads": None}, r"k_proj\.weight of shape \(48, 48\), but the weights have \(16, 48\)"),
        ({"head_dim": 7}, "even rotary dimension, but got `head_dim`=7"),
        ({"vocab_size": 2 * 10**9}, r"\(vocab_size\), but the weights have \(199, 48\)"),
        ({"vocab_size": 10**30}, "vocab_size is not a whole number from 1 to 2147483647"),
        ({"intermediate_size": -1}, "intermediate_size is not a whole number from 0"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps is not a number from 0 to 1"),
        ({"hidden_act": "sulu"}, "hidden_act: transformers knows no 'sulu'"),
        (
            {"attention_bias": True},
            r"lack 20 tensors of the model, among them model\.layers\.0\.self_attn\.k_proj\.bias",
        ),
        ({"tie_word_embeddings": 1}, "'tie_word_embeddings' expected bool, got int"),
        ({"eos_token_id": ["</s>"]}, r"eos_token_id\[0\] is not a whole number"),
        ({"rope_parameters": {"rope_theta": 0}}, r"RoPE has no finite frequencies .*see rope_parameters"),
        ({"rope_scaling": {"type": "su"}}, "rope_parameters.type and rope_parameters.rope_type: .*knows no 'su'"),
        ({"rope_scaling": {"rope_type": "xpos"}}, "rope_parameters.rope_type: transformers knows no 'xpos'"),
        ({"rope_scaling": {"type": "linear"}}, "Missing required keys in `rope_parameters` for .*linear.*factor"),
        ({"rope_scaling": 5}, "'rope_parameters' with value 5"),
        (
            {"rope_parameters": {"rope_type": "longrope"} | ROPE["longrope"] | {"long_factor": [1]}},
            "short_factor has 4 numbers and long_factor 1",
        ),
        (
            {
                "rope_parameters": {"rope_type": "longrope"}
                | ROPE["longrope"]
                | {"short_factor": [1.0] * 3, "long_factor": [1.0] * 3}
            },
            "describes no model: .*broadcast.* 4",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "full_attention is RoPE of one kind of layers",
        ),
        ({"quantization_config": {}}, "quantization_config has no quant_method"),
        ({"per_layer_config": {"0": {"num_key_value_heads": 1}}}, "per_layer_config"),
    ],
)
def test_what_cannot_be(folder, changed, words):
    say(folder, **changed)
    with pytest.raises(InputError, match=words) as error:
        load(folder, CPU, torch.float32)
    assert "\n" not in str(error.value)
    assert str(folder / "config.json") in str(error.value) or f"the weights in {folder}" in str(error.value)


@pytest.mark.parametrize(
    ("window", "words"), [(1, "2 or more, and is 1"), (-5, "2 or more, and is -5"), ("x", "got str")]
)
def test_windows(saved, tmp_path, window, words):
    folder = say(shutil.copytree(saved["mistral"][0], tmp_path / "m"), sliding_window=window)
    with pytest.raises(InputError, match=f"sliding_window.*{words}"):
        model_config(folder)


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
            checked(folder)

    change(
        "have model.layers.0.self_attn.q_proj.bias, which the model that",
        model__layers__0__self_attn__q_proj__bias=torch.ones(48),
    )
    change(r"norm.weight of shape \(48,\), but the weights have \(48, 1\)", model__norm__weight=torch.ones(48, 1))
    name = "model.layers.0.self_attn.q_proj.weight"
    change("holds whole numbers: if the weights are quantized", **{name: whole[name].to(torch.int8)})
    save_file({"a": torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(InputError, match="num_hidden_layers is 5, but the weights have 1 tensors"):
        checked(folder)


def test_tied_weights_and_those_of_the_bare_model(folder):
    """`lm_head` may be missing where it is the embedding; `model.` where LlamaModel was saved."""
    whole = load_file(folder / "model.safetensors")
    say(folder, tie_word_embeddings=True)
    for dropped in ("lm_head.weight", "model.embed_tokens.weight"):
        left = {key.removeprefix("model."): value for key, value in whole.items() if key != dropped}
        save_file(left, folder / "model.safetensors")
        checked(folder)
    say(folder, tie_word_embeddings=False)
    with pytest.raises(InputError, match=r"lack 1 tensors of the model, among them model\.embed_tokens\.weight"):
        checked(folder)


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
FIELDS = st.sampled_from(
    [
        *ModelConfig.__struct_fields__,
        *SIZES,
        *("per_layer_config", "anything", "rope_parameters", "rope_scaling", "rope_theta", "sliding_window"),
        *("hidden_act", "rms_norm_eps", "tie_word_embeddings", "pad_token_id"),
    ]
)


@settings(max_examples=150, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["llama", "mistral"]), st.dictionaries(FIELDS, JSON, max_size=3))
def test_any_value_of_any_field(saved, tmp_path, architecture, changed):
    base = saved[architecture][1]
    (tmp_path / "config.json").write_text(json.dumps(base | changed))
    tensors = {"model.embed_tokens.weight": Tensor("w", (199, 48), True)}
    try:
        check_weights(tmp_path, model_config(tmp_path), tensors, quantized=False)
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
