"""Ways into a squeezed model besides `generate`: each is served, or is a sentence; nothing comes back empty."""

from contextlib import nullcontext

import pytest
import torch
from conftest import random_model
from transformers import DynamicCache

from squeeze import InputError, SqueezeConfig, squeezed
from squeeze.engine.prefill import PrefillResult

MODEL = random_model("llama")
IDS = torch.randint(3, 199, (2, 60), generator=torch.Generator().manual_seed(3))
SETTINGS = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
EVERYTHING = SqueezeConfig("h2o", budgets=[1000] * 5)


@pytest.mark.parametrize("algorithm", ["sliding_window", "streaming", "h2o"])
def test_a_loop_of_ones_own_gives_what_generate_gives(algorithm):
    with squeezed(MODEL, SqueezeConfig(algorithm, "0.3", "0.1")) as run, torch.no_grad():
        expected, budgets = MODEL.generate(IDS, **SETTINGS), run.budgets.tolist()
        cache = run.cache(max_new_tokens=6)
        output = MODEL(IDS, past_key_values=cache)
        tokens = [output.logits[:, -1:].argmax(-1)]
        for _ in range(5):
            output = MODEL(tokens[-1], past_key_values=cache)
            tokens.append(output.logits[:, -1:].argmax(-1))
    assert torch.cat([IDS, *tokens], dim=1).tolist() == expected.tolist()
    assert run.budgets.tolist() == budgets and output.past_key_values is cache


@pytest.mark.parametrize("way", ["model", "decoder", "positional", "embeddings"])
def test_a_call_that_would_make_a_cache_of_its_own_is_a_sentence(way):
    calls = {
        "model": lambda: MODEL(IDS),
        "decoder": lambda: MODEL.model(IDS),
        "positional": lambda: MODEL.model(IDS, torch.ones_like(IDS), None, None),
        "embeddings": lambda: MODEL(inputs_embeds=MODEL.model.embed_tokens(IDS), use_cache=True),
    }
    with squeezed(MODEL, SqueezeConfig("h2o", "0.3", "0.1")) as run:
        with pytest.raises(ValueError, match=r"run\.cache\(max_new_tokens\), or use_cache=False"):
            calls[way]()
        assert run.budgets is None
    assert isinstance(calls[way]().past_key_values, DynamicCache), "afterwards the model is what it was"


def test_the_cache_may_be_given_by_position():
    with squeezed(MODEL, SqueezeConfig("streaming", "0.3", "0.1")) as run, torch.no_grad():
        by_name = MODEL.model(IDS, past_key_values=run.cache(1)).last_hidden_state
        budgets, run.last = run.budgets, PrefillResult()
        assert torch.equal(MODEL.model(IDS, None, None, run.cache(1)).last_hidden_state, by_name)
        assert (run.budgets == budgets).all()


def test_attention_probabilities_are_refused_in_every_way():
    model = random_model("llama")
    model.set_attn_implementation("eager")
    with squeezed(model, EVERYTHING) as run:
        with pytest.raises(ValueError, match="output_attentions is not supported"):
            model.generate(IDS, output_attentions=True, return_dict_in_generate=True, **SETTINGS)
        with pytest.raises(ValueError, match="output_attentions is not supported"):
            model(IDS, past_key_values=run.cache(1), output_attentions=True)
        model.config.output_attentions = True
        with pytest.raises(ValueError, match="output_attentions is not supported"):
            model(IDS, past_key_values=run.cache(1))


@pytest.mark.parametrize("chunk", [None, 17])
@pytest.mark.parametrize("asked", [True, [0, -1]])
def test_hidden_states_are_given(chunk, asked):
    settings = SETTINGS | {"output_hidden_states": asked, "return_dict_in_generate": True}
    full = MODEL.generate(IDS, **settings).hidden_states
    config = SqueezeConfig("sliding_window", budgets=[1000] * 5, prefill_chunk=chunk)
    with squeezed(MODEL, config) as run:
        for share in (False, True, True):
            run.share_prefills = share
            found = MODEL.generate(IDS, **settings).hidden_states
            assert len(found) == len(full) == 6
            for one, other in zip(found, full, strict=True):
                assert len(one) == len(other) == 6
                for layer, expected in zip(one, other, strict=True):
                    assert (layer is None) == (expected is None)
                    if layer is not None:
                        torch.testing.assert_close(layer, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("chunk", [None, 17])
def test_a_tuple_is_given_where_it_is_asked_for(chunk):
    config = SqueezeConfig("sliding_window", budgets=[1000] * 5, prefill_chunk=chunk)
    with squeezed(MODEL, config) as run, torch.no_grad():
        for share in (False, True, True):
            run.share_prefills = share
            states = MODEL.model(IDS, past_key_values=run.cache(1), return_dict=True).last_hidden_state
            found = MODEL.model(IDS, past_key_values=run.cache(1), return_dict=False)
            assert isinstance(found, tuple)
            torch.testing.assert_close(found[0], states)


def test_continuous_batching_is_refused():
    with squeezed(MODEL, EVERYTHING), pytest.raises(ValueError, match="continuous batching has a cache of its own"):
        MODEL.generate_batch([IDS[0].tolist()])
    assert "init_continuous_batching" not in vars(MODEL)


def test_training_with_checkpoints_is_a_sentence():
    """In which transformers takes the cache away from every layer."""
    model = random_model("llama").train()
    model.gradient_checkpointing_enable()
    with squeezed(model, EVERYTHING) as run, pytest.raises(ValueError, match=r"call model\.eval\(\) first"):
        model(IDS, past_key_values=run.cache(1))


@pytest.mark.parametrize("algorithm", ["sliding_window", "streaming", "h2o"])
def test_a_step_that_failed_in_the_middle_is_not_gone_on_with(algorithm):
    """Some layers hold its token by then. A prompt that failed can be read again."""

    def fail(module, args):
        raise KeyboardInterrupt

    with squeezed(MODEL, SqueezeConfig(algorithm, "0.3", "0.1")) as run, torch.no_grad():
        expected = MODEL.generate(IDS, **SETTINGS)
        cache = run.cache(4)
        for fails in (True, False):
            hook = MODEL.model.layers[2].register_forward_pre_hook(fail) if fails else None
            with pytest.raises(KeyboardInterrupt) if fails else nullcontext():
                MODEL(IDS, past_key_values=cache)
            if hook:
                hook.remove()
        hook = MODEL.model.layers[2].register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            MODEL(IDS[:, :1], past_key_values=cache)
        hook.remove()
        with pytest.raises(ValueError, match="failed in the middle"):
            MODEL(IDS[:, :1], past_key_values=cache)
        assert torch.equal(MODEL.generate(IDS, **SETTINGS), expected)


def test_a_cache_of_another_model_or_configuration_is_refused():
    other = random_model("llama", seed=1)
    with (
        squeezed(MODEL, SqueezeConfig("h2o", "0.3", "0.1")) as run,
        squeezed(other, SqueezeConfig("h2o", "0.3", "0.1")),
    ):
        with pytest.raises(ValueError, match="made for another model"):
            other.generate(IDS, past_key_values=run.cache(6), **SETTINGS)
        stale = run.cache(6)
        run.use(SqueezeConfig("streaming", "0.3", "0.1"))
        with pytest.raises(ValueError, match=r"or before run\.use"):
            MODEL.generate(IDS, past_key_values=stale, **SETTINGS)


def test_a_configuration_that_is_refused_changes_nothing():
    with squeezed(MODEL, SqueezeConfig("h2o", "0.3", "0.1")) as run:
        expected = MODEL.generate(IDS, **SETTINGS)
        for refused in (
            SqueezeConfig("streaming", budgets=[3] * 5),
            SqueezeConfig("streaming", "0.3", allocation="calibrated"),
            SqueezeConfig("h2o", budgets=[9] * 4),
        ):
            with pytest.raises(InputError):
                run.use(refused)
            assert run.config.algorithm == "h2o" and run.config.allocation == "squeeze"
            assert torch.equal(MODEL.generate(IDS, **SETTINGS), expected)


@pytest.mark.parametrize("count", [None, "3", -1, 2.5, True])
def test_room_for_tokens_is_a_whole_number(count):
    with squeezed(MODEL, EVERYTHING) as run, pytest.raises(InputError, match="max_new_tokens must be a whole number"):
        run.cache(count)


def test_images_are_a_sentence():
    with squeezed(MODEL, EVERYTHING) as run, pytest.raises(ValueError, match="pixel_values: images, sound and video"):
        MODEL.model(IDS, pixel_values=torch.zeros(1, 3, 2, 2), past_key_values=run.cache(2))


def test_an_empty_prompt_and_guidance_are_sentences():
    with squeezed(MODEL, EVERYTHING) as run:
        with pytest.raises(ValueError, match="the prompt has no tokens"):
            MODEL(IDS[:, :0], past_key_values=run.cache(1))
        with pytest.raises(ValueError, match="guidance_scale"):
            MODEL.generate(IDS, guidance_scale=1.5, **SETTINGS)
