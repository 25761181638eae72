"""Several tokens on a cut cache: a question after a text, and a conversation that goes on."""

import pytest
import torch
from conftest import random_model
from test_methods import METHODS

from squeeze import H2O, Explicit, SlidingWindow, StreamingLLM, Uniform, squeezed
from squeeze.compatibility import cache_argument
from squeeze.engine.probe import probe
from squeeze.models_table.checks import LENGTHS, Batch
from squeeze.models_table.reference import Reference
from squeeze.models_table.zoo import build

EVICTORS = (SlidingWindow(), StreamingLLM(sinks=2), H2O(), *METHODS)
STEPS = 24


def fed(model, run, batch, sizes):
    """Log-probabilities after the prompts and after each token of their answers, which come in pieces."""
    cache = run.cache(STEPS)
    given = {cache_argument(): cache, "use_cache": True}
    mask, parts, done = batch.mask, [], 0
    positional = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    parts.append(model(batch.ids, attention_mask=mask, **positional, **given).logits[:, -1:])
    for size in sizes:
        tokens = batch.answer[:, done : done + size]
        mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)
        places = {"position_ids": (mask.cumsum(-1) - 1)[:, -size:]}
        parts.append(model(tokens, attention_mask=mask, **places, **given).logits)
        done += size
    return torch.cat(parts, dim=1).float().log_softmax(-1)


@pytest.mark.parametrize("evictor", EVICTORS, ids=str)
def test_pieces_give_what_single_tokens_give_and_the_reference(evictor):
    """Of a padded batch; budgets fill first and evict later."""
    model = random_model("llama")
    batch = Batch.of(model, LENGTHS, STEPS)
    budgets = [8, 20, 33, 45, 60]
    with squeezed(model, evictor, Explicit(budgets)) as run, torch.no_grad():
        single, pieces = (fed(model, run, batch, sizes) for sizes in ([1] * STEPS, [7, 1, 16]))
    torch.testing.assert_close(pieces, single, atol=1e-4, rtol=0)  # products of more tokens round otherwise
    reference = Reference(model, probe(model).layers)
    for row in range(2):
        expected = reference(evictor, budgets, batch.prompt(row), batch.answer[row])
        assert (pieces[row] - expected).abs().max() < 1e-3


def test_pieces_where_heads_have_budgets_of_their_own():
    """And where a prompt is shorter than the sinks, which then come while it is gone on with."""
    model = random_model("llama")
    for evictor, lengths in ((H2O(), LENGTHS), (StreamingLLM(sinks=6), (9, 3))):
        batch = Batch.of(model, lengths, STEPS)
        with (
            squeezed(model, evictor, Explicit([[8, 20], [33, 9], [12, 12], [40, 25], [10, 30]])) as run,
            torch.no_grad(),
        ):
            single, pieces = (fed(model, run, batch, sizes) for sizes in ([1] * STEPS, [7, 1, 16]))
        torch.testing.assert_close(pieces, single, atol=1e-4, rtol=0)


#: Kinds of models, and whether a pass may bring them several tokens.
KINDS = {"llama": True, "gemma3_text": True, "gpt2": True, "jamba": False, "falcon": False, "deepseek_v3": False}


@pytest.mark.parametrize("name", KINDS)
def test_pieces_on_models_of_other_kinds(name):
    """Windows, learned positions, states beside attention, attention of their own, latent attention."""
    model = build(name)
    lengths = (LENGTHS[0], LENGTHS[0])
    batch = Batch.of(model, lengths, STEPS)
    with squeezed(model, H2O() if name != "deepseek_v3" else SlidingWindow(), Uniform("0.4")) as run, torch.no_grad():
        found = []
        for sizes in ([1] * STEPS, [7, 1, 16]):
            cache, parts, done, calls = run.cache(STEPS), [], 0, []
            hook = run.layers[0].block.register_forward_hook(lambda *given, calls=calls: calls.append(given))
            for size in (0, *sizes):
                tokens = batch.answer[:, done : done + size] if size else batch.ids
                parts.append(model(tokens, **{cache_argument(): cache}).logits[:, -max(size, 1) :])
                done += size
            hook.remove()
            found.append(torch.cat(parts, dim=1).log_softmax(-1))
            assert len(calls) == 1 + (len(sizes) if KINDS[name] else STEPS)
    torch.testing.assert_close(*found, atol=1e-4, rtol=0)


@pytest.mark.parametrize("evictor", [H2O(), StreamingLLM(sinks=2)], ids=str)
def test_questions_on_one_context_do_not_see_one_another(evictor):
    model = random_model("llama")
    ids = torch.randint(3, 199, (1, 60), generator=torch.Generator().manual_seed(3))
    questions = [torch.randint(3, 199, (1, n), generator=torch.Generator().manual_seed(n)) for n in (9, 14)]
    settings = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
    with squeezed(model, evictor, Uniform("0.3")) as run, torch.no_grad():
        context = run.cache(40)
        model(ids, past_key_values=context)
        before = [layer.keys.clone() for layer in context.squeezed]
        answers = []
        for _ in range(2):  # in turns
            for question in questions:
                whole = torch.cat([ids, question], dim=1)
                answers.append(model.generate(whole, past_key_values=context.copy(), **settings).tolist())
        assert all(layer.keys.equal(keys) for layer, keys in zip(context.squeezed, before, strict=True))
        assert answers[:2] == answers[2:] and answers[0] != answers[1]
        last = model.generate(torch.cat([ids, questions[1]], dim=1), past_key_values=context, **settings)
        assert last.tolist() == answers[1]


def test_a_hybrid_models_copy_has_states_of_its_own():
    model = build("jamba")
    ids = torch.arange(3, 50)[None]
    with squeezed(model, SlidingWindow(), Uniform("0.4")) as run, torch.no_grad():
        context = run.cache(20)
        model(ids, past_key_values=context)
        first = model(ids[:, :5], past_key_values=context.copy()).logits
        assert model(ids[:, :5], past_key_values=context).logits.equal(first)


def test_a_conversation_goes_on_with_one_cache():
    """Three turns by `generate` are what feeding the same tokens one by one gives, greedily."""
    model = random_model("llama")
    turns = [torch.randint(3, 199, (1, n), generator=torch.Generator().manual_seed(n)) for n in (50, 8, 11)]
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    with squeezed(model, H2O(), Uniform("0.3")) as run, torch.no_grad():
        cache, said = run.cache(60), torch.empty(1, 0, dtype=torch.long)
        for turn in turns:
            said = torch.cat([said, turn], dim=1)
            mask = torch.ones_like(said)  # the random model also says what pads
            said = model.generate(said, attention_mask=mask, past_key_values=cache, **settings)
        budgets = run.budgets
        other, position = run.cache(60), 50
        logits = model(said[:, :position], past_key_values=other).logits
        generated = [*range(50, 56), *range(64, 70), *range(81, 87)]
        for position in range(50, said.shape[1]):
            if position in generated:
                assert logits[0, -1].argmax() == said[0, position], position
            logits = model(said[:, position : position + 1], past_key_values=other).logits
        assert (run.budgets == budgets).all() and cache.steps == said.shape[1] - 51


def test_what_cannot_follow_is_a_sentence():
    model, ids = random_model("llama"), torch.arange(3, 43)[None].repeat(2, 1)
    with squeezed(model, H2O(), Uniform("0.5")) as run, torch.no_grad():
        cache = run.cache(8)
        with pytest.raises(ValueError, match="only a cache whose prompt is cut"):
            cache.copy()
        model(ids, past_key_values=cache)
        mask = torch.ones(2, 44, dtype=torch.long)
        mask[1, 41] = 0
        with pytest.raises(ValueError, match="cannot be padded"):
            model(ids[:, :4], attention_mask=mask, past_key_values=cache)
        with pytest.raises(ValueError, match="made for 8 new tokens, of which 0 are used up, and got 9"):
            model(ids[:, :9], past_key_values=cache)
        model(ids[:, :8], past_key_values=cache)
        with pytest.raises(ValueError, match="of which 8 are used up"):
            model(ids[:, :2], past_key_values=cache)
