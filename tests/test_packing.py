"""Packed linear layers compute what they replaced, and replace only what lies still on the CPU."""

import pytest
import torch
from conftest import ROOT, random_model
from torch import nn

from squeeze.loading import load
from squeeze.packing import PackedLinear, pack, packs

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
    assert sum(type(module) is PackedLinear for module in packed.modules()) == 5 * 7 + 1
    assert not [module for module in packed.modules() if type(module) is nn.Linear]
    assert [name for name, _ in packed.named_parameters() if "proj" in name] == []


def test_what_is_not_packed():
    model = random_model("llama").to(torch.float16)
    pack(model)
    assert type(model.lm_head) is nn.Linear
    model = random_model("llama")
    model.lm_head._hf_hook = object()  # accelerate's mark on a module that it moves
    pack(model)
    assert type(model.lm_head) is nn.Linear and type(model.model.layers[0].mlp.up_proj) is PackedLinear


def test_a_model_loaded_for_the_cpu_is_packed():
    model, _ = load(ROOT / "models/SmolLM2-135M", torch.device("cpu"), torch.float32)
    assert type(model.lm_head) is PackedLinear
