"""The slow reference by masks, beside the one in plain loops that the engine has for Llama and Mistral."""

import pytest
import torch
from conftest import random_model
from reference import Reference as Loops

from squeeze import H2O, SlidingWindow, StreamingLLM
from squeeze.engine.probe import probe
from squeeze.models_table.reference import Reference, fit

BUDGETS = [17, 9, 12, 26, 7]


@pytest.mark.parametrize("evictor", [SlidingWindow(), H2O(), StreamingLLM(3)], ids=lambda evictor: evictor.name)
@pytest.mark.parametrize(("architecture", "settings"), [("llama", {}), ("mistral", {"sliding_window": 30})])
def test_it_computes_what_plain_loops_do(architecture, settings, evictor):
    model = random_model(architecture, **settings)
    prompt, answer = torch.randint(3, 199, (60,), generator=torch.Generator().manual_seed(0)).split((40, 20))
    reference = Reference(model, probe(model).layers)
    loops = Loops(model, evictor.name, BUDGETS, evictor.sinks)
    logits = [loops.prefill(prompt), *(loops.step(token) for token in answer)]
    got = reference(evictor, BUDGETS, prompt, answer)
    torch.testing.assert_close(got, torch.stack(logits).log_softmax(-1), rtol=0, atol=2e-4)
    assert model.config._attn_implementation == "sdpa"
    full = model(torch.cat([prompt, answer])[None]).logits[0, 39:].log_softmax(-1)
    assert (got - full).abs().max() > 0.1  # something was masked


def test_a_move_that_is_not_linear_is_no_reference():
    before = torch.randn(1, 2, 40, 8)
    turned = before @ torch.linalg.qr(torch.randn(8, 8)).Q
    torch.testing.assert_close(before @ fit(before, turned), turned)
    with pytest.raises(ArithmeticError, match="no linear function"):
        fit(before, turned.abs())
