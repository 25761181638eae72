"""Every eviction method against a slow reference in plain words, on models of several kinds; and what it refuses."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from conftest import random_model
from test_patch import left_pad

from squeeze import (
    H2O,
    TOVA,
    ExpectedAttention,
    Future,
    InputError,
    KeyDiff,
    KNorm,
    LagKV,
    Random,
    SlidingWindow,
    SnapKV,
    SqueezeConfig,
    StreamingLLM,
    Tokens,
    Uniform,
    squeezed,
)
from squeeze.engine.probe import probe
from squeeze.evictors import EVICTORS
from squeeze.models_table.checks import check_method
from squeeze.models_table.reference import Reference
from squeeze.models_table.zoo import build

#: With parameters small enough for short prompts.
METHODS = (
    *(SnapKV(window=4, kernel=3), TOVA(), ExpectedAttention(future=7, first=2), KNorm(), KeyDiff()),
    *(LagKV(lag=6, first=3), Random(seed=1)),
)
IDS = [str(method) for method in METHODS]


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "falcon", "gpt_oss"])
@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_a_method_holds_what_the_reference_holds(method, name):
    """Ragged batches; budgets that are alike, each head's own, and by similarity; room for everything."""
    model = build(name)
    blind = name == "falcon" and isinstance(method.observed, Future)
    with pytest.raises(InputError, match="looks at queries, and falcon") if blind else nullcontext():
        check_method(model, Reference(model, probe(model).layers), method)


@pytest.mark.parametrize(
    "method", [one if one.name == "tova" else pytest.param(one, marks=pytest.mark.slow) for one in METHODS], ids=str
)
def test_compiled_steps_give_the_plain_steps_tokens(monkeypatch, method):
    """In a ragged batch whose buffers fill first and evict later, traced as for PyTorch's compiler."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, found = random_model("llama"), []
    ids, mask = left_pad(
        [torch.randint(3, 199, (n,), generator=torch.Generator().manual_seed(n)) for n in (40, 29, 15)]
    )
    settings = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    for compile in (False, True):
        with squeezed(model, SqueezeConfig(method, budgets=[9, 19, 40, 50, 60], compile=compile)):
            found.append(model.generate(ids, attention_mask=mask, **settings))
    assert found[0].equal(found[1])
    assert not torch._dynamo.utils.counters["graph_break"]


def test_every_built_in_method_is_looked_at():
    known = {type(method) for method in (*METHODS, SlidingWindow(), StreamingLLM(), H2O())}
    assert known == {EVICTORS.find(name).kind for name in EVICTORS.names}


def test_a_prefill_is_shared_only_where_the_same_queries_were_observed():
    model = random_model("llama")
    ids = torch.randint(3, 199, (1, 60), generator=torch.Generator().manual_seed(0))
    methods = [Random(), SnapKV(window=4), SnapKV(window=9), TOVA(), H2O(), KeyDiff(), StreamingLLM()]
    methods += [ExpectedAttention(), ExpectedAttention(future=2)]
    found = {}
    for share in (False, True):
        with squeezed(model, SqueezeConfig(methods[0], allocation=Uniform(0.3))) as run:
            run.share_prefills = share
            for method in methods:
                run.use(SqueezeConfig(method, allocation=Uniform(0.3)))
                found[share, str(method)] = model.generate(ids, max_new_tokens=20, do_sample=False).tolist()
    for method in methods:
        assert found[True, str(method)] == found[False, str(method)]
    assert len({str(tokens) for tokens in found.values()}) == len(methods)


def test_a_method_that_observes_the_prompt_takes_no_chunks():
    class Observer(SlidingWindow):
        observed = 3

    with pytest.raises(InputError, match="which chooses among the tokens of the whole prompt"):
        SqueezeConfig(Observer(), allocation=Uniform(0.5), prefill_chunk=8)


def test_what_lies_in_an_empty_slot_is_no_key():
    keys, positions = torch.randn(2, 6, 8), torch.arange(6).repeat(2, 1)
    positions[:, 4:] = -1
    nothing = [torch.empty(2, 0)] * 3
    found = KeyDiff().score(Tokens(positions, nothing[0], keys, *nothing[1:]))
    expected = KeyDiff().score(Tokens(positions[:, :4], nothing[0], keys[:, :4], *nothing[1:]))
    torch.testing.assert_close(found[:, :4], expected)


def test_chance_is_fair_and_the_same_again():
    positions = torch.arange(4096).expand(3, -1)
    heads = torch.tensor([[0], [1], [1 << 16]])
    tokens = Tokens(positions, heads, *[torch.empty(3, 0)] * 3)
    lots = Random().score(tokens)
    assert lots.min() >= 0 and lots.max() < 1
    torch.testing.assert_close(lots.mean(dim=1), torch.full((3,), 0.5), atol=0.02, rtol=0)
    assert torch.corrcoef(lots).fill_diagonal_(0).abs().max() < 0.06
    later = Random().score(Tokens(positions[:, 7:8], heads, *[torch.empty(3, 0)] * 3))
    assert later.equal(lots[:, 7:8]) and not Random(seed=1).score(tokens).equal(lots)


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        ("snapkv(kernel=4)", {}, "kernel must be odd"),
        ("snapkv(window=0)", {}, "window must be a whole number of tokens, 1 or more"),
        ("snapkv(windows=4)", {}, "has no parameter windows: did you mean window?"),
        ("snapkv", {"budgets": [20] * 5}, "budgets must be at least 33 tokens for snapkv"),
        ("tova", {"budgets": [[20, 30]] * 5}, "by which all heads of a layer keep the same tokens"),
        ("tova", {"ini_size": 0.5, "allocation": "uniform", "per": "adakv"}, "by which all heads of a layer keep"),
        ("knorm", {"ini_size": 0.5, "allocation": "uniform", "prefill_chunk": 8}, "prefill_chunk cannot be used"),
        ("expected_attention(future=0)", {}, "future must be a whole number of tokens, 1 or more"),
        ("lagkv(lag=1)", {}, "lag must be a whole number of tokens, 2 or more"),
        ("random(seed=-1)", {}, "seed must be"),
    ],
)
def test_what_cannot_be_is_a_sentence(text, options, said):
    options = options or {"ini_size": 0.5, "allocation": "uniform"}
    model, ids = random_model("llama"), torch.arange(3, 63)[None]
    with pytest.raises(InputError, match=said), squeezed(model, SqueezeConfig(text, **options)):
        model.generate(ids, max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize("method", [KNorm(), KeyDiff()], ids=str)
def test_keys_that_are_not_cached_cannot_be_looked_at(method):
    said = "looks at keys, and deepseek_v3 caches something else"
    with pytest.raises(InputError, match=said), squeezed(build("deepseek_v3"), method, Uniform(0.5)):
        pass
