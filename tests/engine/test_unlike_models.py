"""What only some architectures bring into the engine: inputs and outputs of their own, states, experts, wide keys."""

import copy
from contextlib import nullcontext

import pytest
import torch
from conftest import random_model
from transformers import LlamaForCausalLM

from squeeze import H2O, Explicit, InputError, SlidingWindow, Squeeze, SqueezeConfig, Uniform, squeezed
from squeeze.devices import input_device
from squeeze.engine import decode_attention, patch
from squeeze.generation.generate import generate
from squeeze.generation.stats import summarize
from squeeze.models_table.zoo import build

IDS = torch.randint(3, 190, (2, 60), generator=torch.Generator().manual_seed(5))
SETTINGS = {"max_new_tokens": 5, "do_sample": False}


def prefilled(run, model, **more):
    """Logits of a prefill."""
    with torch.no_grad():
        return model(IDS, past_key_values=run.cache(3), **more).logits


@pytest.mark.parametrize("more", [{"position_ids": torch.arange(7, 67)[None]}, {"output_router_logits": True}])
def test_a_prefill_is_shared_only_where_all_that_it_depends_on_is_the_same(more):
    """Twice in a row with what it is given, after one without: positions, and outputs that a kept one has not."""
    model = build("mixtral")
    with squeezed(model, H2O(), Squeeze(0.3, 0.2)) as run:
        expected, plain = prefilled(run, model, **more), prefilled(run, model)
        run.share_prefills = True
        assert prefilled(run, model).equal(plain) and run.shared_seconds == 0
        assert prefilled(run, model, **more).equal(expected) and run.shared_seconds == 0
        assert prefilled(run, model, **more).equal(expected)
        assert (run.shared_seconds > 0) == ("position_ids" in more)


def test_a_prefill_under_autocast_is_not_one_without():
    model = build("llama")
    with squeezed(model, H2O(), Squeeze(0.3, 0.2)) as run:
        run.share_prefills = True
        prefilled(run, model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            prefilled(run, model)
        assert run.shared_seconds == 0


@pytest.mark.parametrize("allocation", [Uniform(0.3), Explicit([20] * 4)])
def test_what_a_run_tells_where_no_similarities_were_found(allocation):
    """GPT-NeoX-Japanese adds a bias between attention and the stream, which is no rule that the probe knows."""
    model = build("gpt_neox_japanese")
    with squeezed(model, SlidingWindow(), allocation) as run:
        _, [stats] = generate(model, [IDS[0]], SETTINGS, run)
    assert run.similarities is None and len(stats.budgets) == 4
    assert summarize([stats])["layers_per_class"] == [0, 0, 4]


@pytest.mark.parametrize("name", ["llama4_text", "falcon_h1", "longcat_flash", "falcon"])
def test_what_cannot_be_compiled_is_refused(name, monkeypatch):
    monkeypatch.setattr(patch, "compiled", lambda function, device: function)
    with (
        pytest.raises(InputError, match="compile needs"),
        squeezed(build(name), SqueezeConfig("h2o", 1, 1, compile=True)),
    ):
        pass


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_compiled_step_is_used_however_a_layer_is_given_its_cache(name, monkeypatch):
    """GPT-2's layers take it by position."""
    model, calls = build(name), []
    monkeypatch.setattr(patch, "compiled", lambda step, device: lambda *a, **k: calls.append(1) or step(*a, **k))
    with squeezed(model, SqueezeConfig("sliding_window", 0.3, 0.3)) as run, torch.no_grad():
        expected = model.generate(IDS, **SETTINGS)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: bool(calls))
    with squeezed(model, SqueezeConfig("sliding_window", 0.3, 0.3, compile=True)) as run, torch.no_grad():
        assert model.generate(IDS, **SETTINGS).equal(expected)
    assert len(calls) == 4 * len(run.layers)


def test_models_that_share_a_configuration_are_not_squeezed_at_once():
    model = build("llama")
    other, third = LlamaForCausalLM(model.config).eval(), LlamaForCausalLM(copy.deepcopy(model.config)).eval()
    with squeezed(model, H2O(), Uniform(0.3)):
        with pytest.raises(ValueError, match="shares its configuration"), squeezed(other, H2O(), Uniform(0.3)):
            pass
        with squeezed(third, H2O(), Uniform(0.3)):
            third.generate(IDS, **SETTINGS)
    with squeezed(other, H2O(), Uniform(0.3)):
        other.generate(IDS, **SETTINGS)


def test_chunks_have_their_own_part_of_all_that_goes_by_token():
    model, kinds = build("gpt2"), torch.randint(0, 2, IDS.shape)
    with squeezed(model, SlidingWindow(), Explicit([60] * 4)) as run:
        expected = prefilled(run, model, token_type_ids=kinds)
    with squeezed(model, SlidingWindow(), Explicit([60] * 4), prefill_chunk=16) as run:
        torch.testing.assert_close(prefilled(run, model, token_type_ids=kinds), expected, atol=1e-4, rtol=1e-4)


def test_attention_of_a_models_own_takes_no_chunks_and_no_kernel():
    model = build("falcon")
    for option in ({"prefill_chunk": 16}, {"attn": "eager"}):
        with pytest.raises(InputError, match="leave it out"), squeezed(model, SlidingWindow(), Uniform(0.5), **option):
            pass


def test_embeddings_that_accelerate_brings_in_take_tokens_of_the_cpu():
    assert input_device(LlamaForCausalLM(build("llama").config).to("meta")) == torch.device("cpu")


@pytest.mark.parametrize(("name", "seed"), [("phimoe", 3), ("glm4_moe", 1)])
def test_experts_that_are_about_as_good_are_no_fault_of_the_cache(name, seed):
    """In bfloat16 a router may take another one after rounding: not in every text."""
    with squeezed(build(name, seed).to(torch.bfloat16), SlidingWindow(), Uniform(0.3)) as run:
        assert run.layers


@pytest.mark.parametrize("window", [2, 3])
def test_a_window_shorter_than_the_self_checks_steps(window):
    """Each layer holds its window, and the tokens are those of a model that sees no more."""
    model = random_model("mistral", sliding_window=window)
    expected = model.generate(IDS, **SETTINGS)
    with squeezed(model, SlidingWindow(), Explicit([60] * 5)) as run:
        assert model.generate(IDS, **SETTINGS).equal(expected)
    assert run.budgets.tolist() == [[window] * 5] * 2


def test_another_kind_of_method_is_checked_as_well(monkeypatch):
    checked = []
    monkeypatch.setattr(patch, "self_check", lambda run, scored: checked.append(scored))
    with squeezed(build("llama"), SlidingWindow(), Uniform(0.3)) as run:
        run.use(SqueezeConfig("h2o", 0.3, 0.3))
    assert checked == [False, True]


@pytest.mark.parametrize(
    ("off", "quantized", "passes"), [(0.05, False, False), (0.05, True, True), (1.5, True, False)]
)
def test_a_quantized_model_may_round_more(monkeypatch, off, quantized, passes):
    """Some round what goes into a layer to 8 bits; a fault is larger than that."""
    model, decode = build("llama"), decode_attention.decode
    model.is_quantized = quantized
    monkeypatch.setattr(decode_attention, "decode", lambda *given: decode(*given) * (1 + off))
    refused = pytest.raises(InputError, match=r"cannot be squeezed here: .* differ from its own")
    with nullcontext() if passes else refused, squeezed(model, SlidingWindow(), Uniform(0.3)):
        pass
