"""The patch: what generate may do, what it may not, what is held in memory, and that nothing stays behind."""

import gc

import numpy as np
import pytest
import torch
from conftest import random_model
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from squeeze import InputError, SqueezeConfig, compatibility, squeezed

ALGORITHMS = ("sliding_window", "streaming", "h2o")
LLAMA = random_model("llama")
IDS = torch.randint(3, 199, (3, 40), generator=torch.Generator().manual_seed(0))


def left_pad(prompts):
    """Token ids and attention mask of prompts padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.stack([torch.cat([torch.zeros(longest - len(p), dtype=torch.long), p]) for p in prompts])
    mask = torch.stack([(torch.arange(longest) >= longest - len(p)).long() for p in prompts])
    return ids, mask


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_bytes_are_what_the_budgets_say_and_the_prompts_cache_is_gone(embedded, prompts, algorithm):
    model, prompt = embedded("llama"), prompts[5]
    with squeezed(model, SqueezeConfig(algorithm, "0.2", "0.1", "squeeze-log")) as run, torch.no_grad():
        cache = run.cache(max_new_tokens=8)
        model(prompt[None], past_key_values=cache, logits_to_keep=1)
        per_token = 2 * model.config.num_key_value_heads * 64 * 4
        assert run.budgets.sum() == int(30 * 0.2 * len(prompt) + 1e-9)
        assert run.kv_bytes <= 1.02 * run.budgets.sum() * per_token
        tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        assert run.kv_bytes == sum(tensor.untyped_storage().nbytes() for tensor in tensors)
        sink_bytes = 30 * 4 * per_token // 2  # four sinks as they came, keys alone
        scored = run.budgets.sum() * model.config.num_key_value_heads * (4 + 4)  # a score and a position
        assert run.state_bytes == {"sliding_window": 0, "streaming": sink_bytes, "h2o": scored}[algorithm]
        gc.collect()
        alive = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.shape[-2:] == (len(prompt), 64)]
        assert not alive, [t.shape for t in alive]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_decoding_allocates_nothing_new_in_the_cache(algorithm):
    with squeezed(LLAMA, SqueezeConfig(algorithm, "0.5", "0.3")) as run, torch.no_grad():
        cache = run.cache(max_new_tokens=50)
        LLAMA(IDS[:1], past_key_values=cache)
        before = [(layer.keys.data_ptr(), layer.values.data_ptr(), layer.scores.data_ptr()) for layer in cache.layers]
        for token in range(50):
            LLAMA(IDS[:1, token % 40 : token % 40 + 1], past_key_values=cache)
        after = [(layer.keys.data_ptr(), layer.values.data_ptr(), layer.scores.data_ptr()) for layer in cache.layers]
    assert before == after
    assert run.kv_bytes == cache.kv_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_decode_step_allocates_nothing_as_large_as_a_buffer(algorithm, dtype):
    """Neither by an operation of its own nor inside of one, as `scatter_` does for 16-bit types on the CPU."""
    model = random_model("llama").to(dtype)
    inputs = torch.randint(3, 199, (2, 600))
    with squeezed(model, SqueezeConfig(algorithm, budgets=[500] * 5)) as run, torch.no_grad():
        cache = run.cache(max_new_tokens=4)
        model(inputs, past_key_values=cache, logits_to_keep=1)
        model(inputs[:, :1], past_key_values=cache)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            model(inputs[:, :1], past_key_values=cache)
    largest = max(profile.events(), key=lambda event: event.cpu_memory_usage)
    assert 0 < largest.cpu_memory_usage < cache.layers[0].keys.nbytes, largest.name


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_a_prompt_does_not_notice_its_batch(algorithm, attn):
    """Importance, classes, budgets and tokens of left-padded prompts are those of each prompt alone."""
    prompts = [IDS[0], IDS[1, :13], IDS[2, :27], IDS[1, 5:31]]
    ids, mask = left_pad(prompts)
    with squeezed(LLAMA, SqueezeConfig(algorithm, "0.4", "0.2", attn=attn)) as run:
        together = LLAMA.generate(ids, attention_mask=mask, max_new_tokens=30, do_sample=False, eos_token_id=None)
        similarities, budgets, classes = run.similarities, run.budgets, run.classes
        for row, prompt in enumerate(prompts):
            alone = LLAMA.generate(prompt[None], max_new_tokens=30, do_sample=False, eos_token_id=None)
            np.testing.assert_allclose(similarities[row], run.similarities[0], atol=1e-5)
            assert budgets[row].tolist() == run.budgets[0].tolist()
            assert classes[row].tolist() == run.classes[0].tolist()
            assert together[row, 40:].tolist() == alone[0, len(prompt) :].tolist()


def test_importance_ignores_padding_on_the_real_model(embedded, prompts):
    model, (short, long) = embedded("llama"), (prompts[0], prompts[4])
    ids, mask = left_pad([short, long])
    with squeezed(model, SqueezeConfig("h2o", "0.3", "0.2")) as run:
        model.generate(ids, attention_mask=mask, max_new_tokens=2, do_sample=False)
        padded = run.similarities
        for row, prompt in enumerate((short, long)):
            model.generate(prompt[None], max_new_tokens=2, do_sample=False)
            np.testing.assert_allclose(padded[row], run.similarities[0], atol=1e-5)


def test_importance_is_the_cosine_of_the_stream_around_self_attention(embedded, prompts):
    """Recomputed from hidden states and attention outputs that transformers itself hands out."""
    model, prompt, outputs = embedded("llama"), prompts[0], []
    hooks = [
        layer.self_attn.register_forward_hook(lambda m, a, out: outputs.append(out[0])) for layer in model.model.layers
    ]
    with torch.no_grad():
        hidden = model(prompt[None], output_hidden_states=True).hidden_states
    for hook in hooks:
        hook.remove()
    expected = [
        torch.cosine_similarity(before[0], (before + out)[0], dim=-1).mean().item()
        for before, out in zip(hidden, outputs, strict=False)
    ]
    with squeezed(model, SqueezeConfig("streaming", "0.3", "0.2")) as run:
        model.generate(prompt[None], max_new_tokens=1)
    np.testing.assert_allclose(run.similarities[0], expected, atol=1e-5)


def test_sampling_and_several_return_sequences_match_the_full_cache():
    arguments = {"max_new_tokens": 12, "do_sample": True, "num_return_sequences": 3, "temperature": 0.7}
    torch.manual_seed(5)
    full = LLAMA.generate(IDS[:2], **arguments)
    with squeezed(LLAMA, SqueezeConfig("h2o", budgets=[52] * 5)) as run:
        torch.manual_seed(5)
        assert LLAMA.generate(IDS[:2], **arguments).tolist() == full.tolist()
    assert run.budgets.shape == (6, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_beams": 2}, "beam search is not supported"),
        ({"prompt_lookup_num_tokens": 3}, "assisted generation is not supported"),
        ({"prefill_chunk_size": 8}, "prefill_chunk_size"),
        ({"cache_implementation": "static"}, "cache_implementation"),
        ({"use_cache": False}, "use_cache is False"),
    ],
)
def test_what_evicted_tokens_make_impossible_is_an_error(arguments, message):
    with squeezed(LLAMA, SqueezeConfig("h2o", "0.5", "0.5")), pytest.raises(ValueError, match=message):
        LLAMA.generate(IDS[:1], max_new_tokens=4, **arguments)


def test_too_many_tokens_and_bad_batches_are_errors():
    with squeezed(LLAMA, SqueezeConfig("h2o", "0.5", "0.5")) as run, torch.no_grad():
        cache = run.cache(max_new_tokens=1)
        LLAMA(IDS[:1, :20], past_key_values=cache)
        with pytest.raises(ValueError, match="made for 1 new tokens, of which 0 are used up, and got 20"):
            LLAMA(IDS[:1, 20:], past_key_values=cache)
        LLAMA(IDS[:1, 20:21], past_key_values=cache)
        with pytest.raises(ValueError, match="made for 1 new tokens"):
            LLAMA(IDS[:1, 21:22], past_key_values=cache)
        mask = torch.ones_like(IDS)
        mask[1, -2:] = 0
        with pytest.raises(ValueError, match="padded on the left"):
            LLAMA(IDS, attention_mask=mask, past_key_values=run.cache(4))
        mask[1] = 0
        with pytest.raises(ValueError, match="sequence 1 of the batch is empty"):
            LLAMA(IDS, attention_mask=mask, past_key_values=run.cache(4))


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_the_model_is_what_it_was_afterwards(architecture):
    model = random_model(architecture)
    original_forward = model.model.layers[1].self_attn.forward
    model.model.layers[1].self_attn.forward = lambda *args, **kwargs: original_forward(*args, **kwargs)
    wrapped = model.model.layers[2].self_attn
    wrapped._hf_hook, wrapped._old_forward = object(), wrapped.forward  # as accelerate leaves a module
    calls = []
    wrapped.forward = lambda *args, **kwargs: calls.append(1) or wrapped._old_forward(*args, **kwargs)

    def snapshot():
        hooks = [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()]
        return hooks, [{k: v for k, v in vars(m).items() if callable(v)} for m in model.modules()]

    before, expected = snapshot(), model(IDS).logits
    with squeezed(model, SqueezeConfig("h2o", "0.3", "0.2")):
        pass  # what is looked at once
    assert snapshot() == before
    calls.clear()
    with pytest.raises(RuntimeError, match="inside"), squeezed(model, SqueezeConfig("h2o", "0.3", "0.2")) as run:
        model.generate(IDS, max_new_tokens=3)
        assert run.budgets is not None
        assert len(calls) == 3, "accelerate's wrapper is called around the patch"
        raise RuntimeError("inside")
    assert snapshot() == before
    assert torch.equal(model(IDS).logits, expected)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_outside_no_grad_the_cache_keeps_no_graph(algorithm):
    with squeezed(LLAMA, SqueezeConfig(algorithm, 0.4, 0.2)) as run:
        cache = run.cache(max_new_tokens=2)
        first = LLAMA(IDS, past_key_values=cache).logits
        second = LLAMA(IDS[:, :1], past_key_values=cache).logits
    assert first.requires_grad and second.requires_grad
    for layer in cache.layers:
        assert not any(tensor.requires_grad for tensor in (layer.keys, layer.values, layer.scores))


def test_without_a_squeeze_cache_the_model_runs_its_own_code():
    expected = LLAMA(IDS).logits
    mask = torch.ones_like(IDS)
    mask[0, :7] = 0
    masked = LLAMA(IDS, attention_mask=mask).logits
    full = LLAMA.generate(IDS[:1], max_new_tokens=8, do_sample=False)
    with squeezed(LLAMA, SqueezeConfig("streaming", "0.2", "0.2")) as run:
        assert torch.equal(LLAMA(IDS, use_cache=False).logits, expected)
        assert torch.equal(LLAMA(IDS, attention_mask=mask, past_key_values=DynamicCache()).logits, masked)
        own = LLAMA.generate(IDS[:1], max_new_tokens=8, do_sample=False, past_key_values=DynamicCache())
        assert own.tolist() == full.tolist()
    assert run.budgets is None


def test_what_the_configuration_and_the_model_must_agree_on():
    with (
        pytest.raises(InputError, match="positions of gpt2 are added to the tokens"),
        squeezed(
            GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9, bos_token_id=1, eos_token_id=2)),
            SqueezeConfig("streaming", "0.2", "0.1"),
        ),
    ):
        pass
    for config, message in [
        (SqueezeConfig("h2o", budgets=[4] * 4), "one entry an attention layer: 5, got 4"),
        (SqueezeConfig("h2o", budgets=[4, 4, 1, 4, 4]), "at least 2 tokens for h2o, got 1 in layer 2"),
        (SqueezeConfig("streaming", budgets=[4] * 5), "at least 5 tokens for streaming, got 4 in layer 0"),
    ]:
        with pytest.raises(InputError, match=message), squeezed(LLAMA, config):
            pass
    narrow = random_model("mistral", sliding_window=4)
    with (
        pytest.raises(InputError, match="own attention window is 4"),
        squeezed(narrow, SqueezeConfig("streaming", 1, 1)),
    ):
        pass
    config = SqueezeConfig("h2o", "0.2", "0.1")
    with squeezed(LLAMA, config), pytest.raises(ValueError, match="squeezed already"), squeezed(LLAMA, config):
        pass


def test_defaults_are_the_published_ones():
    for architecture, algorithm in [("llama", "streaming"), ("mistral", "sliding_window")]:
        with squeezed(random_model(architecture), SqueezeConfig(ini_size=0.2, kv_class3=0.1)) as run:
            assert run.config.algorithm == algorithm


def test_an_untested_transformers_is_refused(monkeypatch):
    monkeypatch.setattr(compatibility, "version", lambda name: "4.34.0")
    with pytest.raises(ImportError, match=r"4\.34\.0 is installed"), squeezed(LLAMA, SqueezeConfig("h2o", 0.2, 0.1)):
        pass


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_half_precision_keeps_importance_and_scores_in_float32(algorithm, dtype):
    model = random_model("llama").to(dtype)
    with squeezed(model, SqueezeConfig(algorithm, "0.5", "0.3")) as run, torch.no_grad():
        cache = run.cache(max_new_tokens=4)
        model(IDS[:1], past_key_values=cache)
        logits = model(IDS[:1, :1], past_key_values=cache).logits
    assert logits.isfinite().all()
    assert cache.layers[0].keys.dtype == dtype
    assert cache.layers[0].scores.dtype == torch.float32
    assert run.similarities.dtype == np.float32


def test_streaming_refuses_rope_whose_angles_change():
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = random_model("llama", rope_parameters=rope)
    with pytest.raises(InputError, match="type dynamic"), squeezed(model, SqueezeConfig("streaming", 0.5, 0.5)):
        pass
