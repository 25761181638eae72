"""Prefills whose budgets are known, whole or in chunks: what they hold at their peak, and what they give."""

import gc
import weakref

import numpy as np
import pytest
import torch
from conftest import random_model
from test_engine import compare
from test_patch import left_pad

from squeeze import SqueezeConfig, squeezed
from squeeze.engine.layer import SqueezeLayer
from squeeze.engine.layout import by_sequence
from squeeze.engine.prefill import Prefill
from squeeze.models.packing import pack

ALGORITHMS = ("sliding_window", "streaming", "h2o")
CHUNKED = ALGORITHMS[:2]
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
        alive = [
            t for t in gc.get_objects() if type(t) is torch.Tensor and t.ndim in (2, 4) and t.shape[-1] == head_dim
        ]
        kv = [t.untyped_storage() for t in alive if t.ndim == 2 or t.shape[1] == heads]
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
        layer.compress([300], np.full((1, 2), 150))
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
            held = [(layer.keys, layer.values, layer.scores, layer.slot_positions) for layer in cache.layers]
            found.append((tokens, cache, held, [str(one) for one in reported]))
    (tokens, cache, held, reported), (expected, other, expected_held, expected_reported) = found
    assert tokens.equal(expected)
    assert reported == expected_reported
    assert (run.similarities is None) == ("budgets" in sizes)
    for one, another, own in zip(cache.budgets, other.budgets, run.budgets.T, strict=True):
        assert one.tolist() == another.tolist() == np.stack([own, own], axis=1).tolist()
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


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize(
    ("algorithm", "sizes"),
    [("h2o", {"ini_size": "0.3", "kv_class3": "0.1"}), ("streaming", UNIFORM | {"prefill_chunk": 64})],
    ids=["measured", "chunks"],
)
def test_a_prefill_that_failed_leaves_nothing_behind(algorithm, sizes, share, monkeypatch):
    """Not its state, not its tensors, not what it was about to tell: even where the cache and the model live on."""
    model, (ids, mask) = random_model("llama"), BATCH
    inputs, prefills, begin = {"input_ids": ids, "attention_mask": mask}, [], Prefill.begin_chunk
    monkeypatch.setattr(Prefill, "begin_chunk", lambda self, *a: prefills.append(weakref.ref(self)) or begin(self, *a))
    with squeezed(model, SqueezeConfig(algorithm, **sizes)) as run, torch.no_grad():
        run.share_prefills = share
        expected = model(**inputs, past_key_values=run.cache(4)).logits
        told, similarities = run.last, run.similarities
        cache, left = run.cache(4), []

        def fail(norm, args):
            prefill = prefills[-1]()
            chunked = "prefill_chunk" in sizes
            if len(prefill.similarities) == (3 if chunked else 1):
                tensors = [args[0], *cache.layers[0].contents, *prefill.similarities[-1]]
                left.extend(weakref.ref(one) for one in (prefill, *tensors, cache.layers[0]))
                raise KeyboardInterrupt

        handle = model.model.layers[2].post_attention_layernorm.register_forward_pre_hook(fail, prepend=True)
        with pytest.raises(KeyboardInterrupt):
            model(ids.flip(1)[:1, :250], past_key_values=cache)
        handle.remove()
        gc.collect()
        assert len(left) >= 9 and [one() for one in left] == [None] * len(left)
        assert run.last is told
        if share and "prefill_chunk" not in sizes:
            assert run.kept_prefill is None
        assert model(**inputs, past_key_values=cache).logits.equal(expected)
        assert (run.similarities == similarities).all() and run.shared_seconds == 0


def test_a_prefill_to_fork_from_tells_nothing_and_lets_go_of_the_kept_one_first():
    model, ids = random_model("llama"), BATCH[0][:1]
    config = SqueezeConfig("h2o", "0.3", "0.1")
    with squeezed(model, config) as run, torch.no_grad():
        run.share_prefills = True
        model(ids, past_key_values=run.cache(4))
        told, kept, alive = run.last, weakref.ref(run.kept_prefill), []
        handle = model.model.layers[0].register_forward_pre_hook(lambda *_: alive.append(kept()))
        prefill = run.prefill(ids)
        handle.remove()
        assert alive == [None]
        assert run.last is told and run.config == config and run.kept_prefill is None
        cache = run.fork(prefill, [[5, 100, 290, 310, 500], [400] * 5], max_new_tokens=3)
        assert by_sequence(cache.budgets, per_head=False).tolist() == [[5, 100, 290, 310, 500], [400] * 5]
        logits = model(ids[:, :1].expand(2, 1), past_key_values=cache).logits
        for row, budgets in enumerate([[5, 100, 290, 310, 500], [400] * 5]):
            run.use(SqueezeConfig("h2o", budgets=budgets))
            alone = run.cache(3)
            model(ids, past_key_values=alone)
            torch.testing.assert_close(model(ids[:, :1], past_key_values=alone).logits[0], logits[row])


def test_explicit_budgets_and_measured_similarities_share_what_they_can():
    """A prefill without similarities is not taken over where they are needed; one with them tells none unasked."""
    model, ids = random_model("llama"), BATCH[0][:1]
    explicit, measured = SqueezeConfig("h2o", **EXPLICIT), SqueezeConfig("h2o", "0.3", "0.1")
    with squeezed(model, measured) as run, torch.no_grad():
        model(ids, past_key_values=run.cache(4))
        expected = run.similarities, run.budgets
        run.share_prefills = True
        for config, shared in ((explicit, False), (measured, False), (explicit, True), (measured, True)):
            run.use(config)
            model(ids, past_key_values=run.cache(4))
            assert (run.shared_seconds > 0) == shared
            if config is measured:
                assert all(
                    (one == other).all() for one, other in zip((run.similarities, run.budgets), expected, strict=True)
                )
            else:
                assert run.similarities is None and run.classes is None


def settings_of(tokens):
    return {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}


@pytest.mark.parametrize(
    ("chunk", "attn"),
    [
        *[(chunk, "sdpa") for chunk in (1, 16, 45, 200)],
        (16, "eager"),
        *[pytest.param(chunk, "eager", marks=pytest.mark.slow) for chunk in (1, 45, 200)],
    ],
)
@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize("algorithm", CHUNKED)
def test_chunks_match_the_reference(algorithm, chunk, window, attn):
    """Of a prompt that is a multiple of the chunk, or not, or one chunk; a window shorter and longer than budgets."""
    prompt = torch.randint(3, 199, (90,), generator=torch.Generator().manual_seed(1))
    model = random_model("mistral", seed=6, sliding_window=window)
    compare(model, prompt, SqueezeConfig(algorithm, budgets=[5, 9, 24, 61, 110], attn=attn, prefill_chunk=chunk))
    compare(model, prompt, SqueezeConfig(algorithm, "0.1", "0.1", attn=attn, prefill_chunk=chunk))


@pytest.mark.parametrize("chunk", [1, 7, 50, 299])
@pytest.mark.parametrize("algorithm", CHUNKED)
def test_chunks_leave_the_tokens_that_the_whole_prompt_leaves(algorithm, chunk):
    """Seen where attention adds nothing to the stream: a token has the same keys whatever it attended to."""
    model, (ids, mask) = random_model("llama"), BATCH
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    found = []
    with torch.no_grad():
        for prefill_chunk in (None, chunk):
            with squeezed(model, SqueezeConfig(algorithm, **EXPLICIT, prefill_chunk=prefill_chunk)) as run:
                cache = run.cache(max_new_tokens=24)
                logits = model(ids, attention_mask=mask, past_key_values=cache).logits
                found.append((logits, cache, run.kv_bytes))
    (logits, whole, kv_bytes), (chunk_logits, chunks, chunk_kv_bytes) = found
    assert chunk_kv_bytes == kv_bytes
    for one, other in zip(whole.layers, chunks.layers, strict=True):
        torch.testing.assert_close(other.keys, one.keys, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(other.values, one.values, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(chunk_logits, logits, atol=1e-4, rtol=1e-4)
    assert chunk_logits.shape == (3, 300, 199), "of all positions, where they are asked for"


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("algorithm", "window", "chunk", "sizes"),
    [
        *(("sliding_window", None, chunk, {"budgets": [200, 210, 250, 300, 320]}) for chunk in (100, 150)),
        *(("streaming", None, chunk, {"budgets": [200, 210, 250, 300, 320]}) for chunk in (100, 150)),
        *(("sliding_window", 24, chunk, {"budgets": [23, 24, 24, 60, 400]}) for chunk in (1, 17, 100)),
        ("sliding_window", 24, 13, {"ini_size": "0.2", "kv_class3": "0.2"}),
        ("streaming", None, 300, UNIFORM),
        ("sliding_window", None, 10**9, UNIFORM),
    ],
)
def test_chunks_give_the_whole_prefills_tokens(algorithm, window, chunk, sizes, attn):
    """Nothing evicted before the last chunk, or the model's own window within what is kept. Of 300 tokens."""
    model, ids = random_model("mistral", seed=3, sliding_window=window), BATCH[0][:1]
    found = []
    for prefill_chunk in (None, chunk):
        with squeezed(model, SqueezeConfig(algorithm, **sizes, attn=attn, prefill_chunk=prefill_chunk)) as run:
            cache = run.cache(max_new_tokens=40)
            logits = model(ids, past_key_values=cache).logits
            found.append((logits, model.generate(ids, **settings_of(40)), run.budgets.tolist()))
    torch.testing.assert_close(found[1][0], found[0][0], atol=1e-3, rtol=1e-3)
    assert found[1][1].equal(found[0][1])
    assert found[1][2] == found[0][2]


@pytest.mark.parametrize(
    ("algorithm", "window", "chunk", "budget"),
    [
        ("sliding_window", None, 99, 200),
        ("streaming", None, 99, 200),
        ("sliding_window", 24, 10, 22),
        ("streaming", 24, 10, 24),
    ],
)
def test_elsewhere_chunks_are_another_method(algorithm, window, chunk, budget):
    """One token less than in the test above: the conditions that are documented are the exact ones."""
    model, ids = random_model("mistral", seed=3, sliding_window=window), BATCH[0][:1]
    found = []
    for prefill_chunk in (None, chunk):
        with squeezed(model, SqueezeConfig(algorithm, budgets=[budget] * 5, prefill_chunk=prefill_chunk)) as run:
            found.append(model(ids, past_key_values=run.cache(4)).logits)
    assert (found[0] - found[1]).abs().max() > 0.01


@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize("chunk", [5, 64])
@pytest.mark.parametrize("algorithm", CHUNKED)
def test_a_prompts_chunks_do_not_notice_its_batch(algorithm, chunk, window):
    model, (ids, mask) = random_model("mistral", sliding_window=window), BATCH
    with squeezed(model, SqueezeConfig(algorithm, **UNIFORM, prefill_chunk=chunk)) as run:
        together = model.generate(ids, attention_mask=mask, **settings_of(24))[:, -24:]
        similarities, budgets = run.similarities, run.budgets.tolist()
        for row, length in enumerate(run_lengths := mask.sum(dim=1).tolist()):
            alone = model.generate(ids[row : row + 1, -length:], **settings_of(24))[0, -24:]
            assert alone.equal(together[row]), run_lengths
            assert run.budgets[0].tolist() == budgets[row]
            torch.testing.assert_close(run.similarities[0], similarities[row], atol=1e-5, rtol=0)


def test_importance_is_the_mean_over_all_chunks():
    """Where chunks are exact it is that of the whole prompt."""
    model, (ids, mask) = random_model("mistral", sliding_window=24), BATCH
    found = []
    for prefill_chunk in (None, 7):
        with squeezed(model, SqueezeConfig("sliding_window", "1", "1", prefill_chunk=prefill_chunk)) as run:
            model.generate(ids[:2], attention_mask=mask[:2], **settings_of(2))
            found.append((torch.tensor(run.similarities), run.classes.tolist()))
    torch.testing.assert_close(found[1][0], found[0][0], atol=1e-5, rtol=0)
    assert found[1][0].shape == (2, 5)
    assert found[1][1] == found[0][1]


@pytest.mark.parametrize("sizes", [EXPLICIT, UNIFORM], ids=["explicit", "uniform"])
@pytest.mark.parametrize("algorithm", CHUNKED)
def test_the_peak_with_chunks_is_what_is_kept_and_one_layers_chunk(peak, algorithm, sizes):
    """While a chunk attends, the kept tokens of that layer are there a second time, padded, beside their chunk."""
    model, (ids, mask) = random_model("llama"), BATCH
    with squeezed(model, SqueezeConfig(algorithm, **sizes, prefill_chunk=16)) as run:
        run.share_prefills = True  # chunks depend on budgets, so there is nothing to share
        cache = run.cache(max_new_tokens=8)
        found = peak(model, input_ids=ids, attention_mask=mask, past_key_values=cache)
        largest = max(3 * 2 * int(layer.layout.budgets.max()) * 2 * 8 * 4 for layer in cache.squeezed)
        assert found <= 1.02 * (run.kv_bytes + largest + 2 * 2 * 3 * 16 * 2 * 8 * 4)


def test_embeddings_go_in_in_chunks_as_well():
    model, (ids, mask) = random_model("llama"), BATCH
    with squeezed(model, SqueezeConfig("streaming", **UNIFORM, prefill_chunk=50)), torch.no_grad():
        expected = model.generate(ids, attention_mask=mask, **settings_of(8))[:, -8:]
        inputs = model.get_input_embeddings()(ids)
        assert model.generate(inputs_embeds=inputs, attention_mask=mask, **settings_of(8)).equal(expected)
