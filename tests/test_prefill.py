"""Prefills whose budgets are known: what they hold at their peak, and that nothing else changes."""

import gc

import pytest
import torch
from conftest import random_model
from test_patch import left_pad

from squeeze import SqueezeConfig, squeezed
from squeeze.cache import SqueezeLayer
from squeeze.packing import pack

ALGORITHMS = ("sliding_window", "streaming", "h2o")
#: Of each layer, in tokens: the smallest, some that evict at once or while decoding, one that never does.
EXPLICIT = {"budgets": [5, 100, 290, 310, 500]}
UNIFORM = {"ini_size": "0.21", "kv_class3": "0.21"}
BATCH = left_pad([torch.randint(3, 199, (n,), generator=torch.Generator().manual_seed(n)) for n in (300, 180, 7)])


@pytest.fixture
def peak(monkeypatch):
    """`peak(model)`: the most bytes of keys and values alive in a prefill, wherever they are held.

    Looked at before and after each layer, when it has attended, and when its cache has just been cut.
    """
    highest = [0]

    def look(*_):
        heads, head_dim = 2, 8
        alive = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.ndim == 4]
        kv = [t.untyped_storage() for t in alive if (t.shape[1], t.shape[3]) == (heads, head_dim)]
        highest[0] = max(highest[0], sum({storage.data_ptr(): storage.nbytes() for storage in kv}.values()))

    original = SqueezeLayer.compress
    monkeypatch.setattr(SqueezeLayer, "compress", lambda *a: (look(), original(*a), look()))

    def of(model, **inputs):
        highest[0] = 0
        gc.freeze()  # what there was before is not looked through again and again
        watched = [one for layer in model.model.layers for one in (layer, layer.self_attn.o_proj, layer.mlp)]
        handles = [one.register_forward_pre_hook(look) for one in watched]
        with torch.no_grad():
            model(**inputs, logits_to_keep=1)
        for handle in handles:
            handle.remove()
        gc.unfreeze()
        return highest[0]

    return of


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("sizes", [EXPLICIT, UNIFORM], ids=["explicit", "uniform"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_peak_is_what_is_kept_and_one_layers_prompt(peak, algorithm, sizes, packed):
    model, (ids, mask) = random_model("llama"), BATCH
    if packed:
        pack(model)
    whole_layer = 2 * ids.numel() * 2 * 8 * 4
    with squeezed(model, SqueezeConfig(algorithm, **sizes)) as run:
        found = peak(model, input_ids=ids, attention_mask=mask, past_key_values=run.cache(max_new_tokens=8))
        assert run.kv_bytes < found <= 1.02 * (run.kv_bytes + whole_layer)
        run.share_prefills = True  # others want the whole prompt's cache
        assert peak(model, input_ids=ids, attention_mask=mask, past_key_values=run.cache(8)) >= 5 * whole_layer
    with squeezed(model, SqueezeConfig(algorithm, "0.21", "0.2")) as run:  # what is measured decides
        assert peak(model, input_ids=ids, attention_mask=mask, past_key_values=run.cache(8)) >= 5 * whole_layer


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_cutting_a_layer_allocates_what_it_keeps(algorithm):
    """Its keys and values, and of H2O their scores and positions: no copy of what is kept beside it."""
    with squeezed(random_model("llama"), SqueezeConfig(algorithm, budgets=[150] * 5)) as run:
        layer = run.cache(max_new_tokens=1).layers[0]
    shape = (1, 2, 300, 64)
    layer.fill(torch.rand(shape), torch.rand(shape), torch.rand(shape[:3]))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        layer.compress([300], [150])
    allocated = sum(max(0, event.cpu_memory_usage) for event in profile.events() if event.cpu_parent is None)
    assert layer.kv_bytes == 2 * 2 * 150 * 64 * 4
    assert layer.kv_bytes <= allocated < 1.1 * layer.kv_bytes + 5 * layer.state_bytes


@pytest.mark.parametrize("window", [None, 120])
@pytest.mark.parametrize("sizes", [EXPLICIT, UNIFORM], ids=["explicit", "uniform"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_bounded_and_whole_prefills_give_the_same(algorithm, sizes, window):
    """Tokens, what is held and all that is reported, of prompts of different lengths."""
    model, (ids, mask) = random_model("mistral", sliding_window=window), BATCH
    found = []
    for whole in (False, True):
        with squeezed(model, SqueezeConfig(algorithm, **sizes)) as run:
            run.share_prefills = whole
            cache = run.cache(max_new_tokens=24)
            tokens = model.generate(
                ids, attention_mask=mask, past_key_values=cache, max_new_tokens=24, min_new_tokens=24, do_sample=False
            )
            reported = run.similarities, run.classes, run.budgets, run.kv_bytes, run.state_bytes, run.notes
            held = [(layer.keys, layer.values, layer.scores, layer.held) for layer in cache.layers]
            found.append((tokens, cache, held, [str(one) for one in reported]))
    (tokens, cache, held, reported), (expected, other, expected_held, expected_reported) = found
    assert tokens.equal(expected)
    assert reported == expected_reported
    assert (run.similarities is None) == ("budgets" in sizes)
    assert cache.budgets.tolist() == other.budgets.tolist() == run.budgets.T.tolist()
    for layer, expected_layer in zip(held, expected_held, strict=True):
        assert all(one.equal(another) for one, another in zip(layer, expected_layer, strict=True))


def test_a_prefill_that_broke_off_can_be_done_again():
    model, (ids, mask) = random_model("llama"), BATCH
    with squeezed(model, SqueezeConfig("h2o", **UNIFORM)) as run, torch.no_grad():
        expected = model(ids, attention_mask=mask, past_key_values=run.cache(4)).logits
        cache = run.cache(4)
        handle = model.model.layers[3].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(ids[:, :200], attention_mask=mask[:, :200].clone().fill_(1), past_key_values=cache)
        handle.remove()
        assert model(ids, attention_mask=mask, past_key_values=cache).logits.equal(expected)
        assert run.similarities.shape == (3, 5)
