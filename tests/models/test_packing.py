"""Packed linear layers compute what they replaced, and replace only what lies still on the CPU."""

import pytest
import torch
from conftest import ROOT, random_model
from torch import nn

from squeeze.models.loading import load
from squeeze.models.packing import PackedLinear, pack, packs

TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 2e-2, "atol": 1e-2}}
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.skipif(not packs(torch.bfloat16), reason="-"))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (8, 1), (2, 37), (300,)])
def test_a_packed_layer_gives_the_products_of_the_layer(shape, bias, dtype):
    linear = nn.Linear(48, 80, bias=bias, dtype=dtype)
    inputs = torch.randn(*shape, 48, dtype=dtype)
    with torch.inference_mode():
        expected, found = linear(inputs), PackedLinear(linear)(inputs)
    assert found.shape == expected.shape and found.dtype == dtype
    torch.testing.assert_close(found, expected, **TOLERANCE[dtype])


def test_a_packed_model_gives_the_models_logits_and_lets_its_weights_go():
    model, packed = random_model("mistral"), random_model("mistral")
    pack(packed)
    ids = torch.randint(3, 199, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(packed(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)
    assert sum(type(module) is PackedLinear for module in packed.modules()) == 5 * 4 + 1, (
        "of a layer's seven, two and three are one"
    )
    assert not [module for module in packed.modules() if type(module) is nn.Linear]
    assert [name for name, _ in packed.named_parameters() if "proj" in name] == []


def test_layers_with_one_input_are_multiplied_together_and_nothing_is_kept():
    model = random_model("llama", attention_bias=True)
    attn, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    torch.nn.init.normal_(attn.k_proj.bias)
    calls = []
    inputs, other = torch.randn(2, 5, 48), torch.randn(2, 5, 48)
    names = [(attn, "q_proj"), (attn, "k_proj"), (attn, "v_proj"), (mlp, "gate_proj"), (mlp, "up_proj")]
    with torch.inference_mode():
        expected = [getattr(module, name)(inputs) for module, name in names]
        alone = attn.k_proj(other)
        pack(model)
        for packed in (attn.q_proj.packed, mlp.gate_proj.packed):
            packed.register_forward_hook(lambda *_: calls.append(1))
        attn.q_proj(other)  # an input whose other parts nobody asks for
        for (module, name), output in zip(names, expected, strict=True):
            torch.testing.assert_close(getattr(module, name)(inputs), output, **TOLERANCE[torch.float32])
        assert len(calls) == 3
        assert attn.q_proj.parts.held is mlp.gate_proj.parts.held is None
        torch.testing.assert_close(attn.k_proj(other), alone, **TOLERANCE[torch.float32])


def test_what_is_not_packed():
    model = random_model("llama").to(torch.float16)
    pack(model)
    assert type(model.lm_head) is nn.Linear
    model = random_model("llama")
    model.lm_head._hf_hook = object()  # accelerate's mark on a module that it moves
    pack(model)
    assert type(model.lm_head) is nn.Linear and type(model.model.layers[0].mlp.down_proj) is PackedLinear


def test_a_model_loaded_for_the_cpu_is_packed():
    model, _ = load(ROOT / "models/SmolLM2-135M", torch.device("cpu"), torch.float32)
    assert type(model.lm_head) is PackedLinear
