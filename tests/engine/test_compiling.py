"""The compiled decode step gives the tokens of the plain one, and says what is missing where it cannot be compiled."""

import os
import re
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import random_model

from squeeze import InputError, SqueezeConfig, squeezed
from squeeze.engine import compiling
from squeeze.engine.squeezed_model import SqueezedModel
from squeeze.evictors import EVICTORS
from squeeze.models.packing import pack

#: PyTorch's compiler takes a minute for each method; its graphs are the same where another backend runs them.
COMPILERS = [("streaming", "inductor"), ("h2o", "eager"), ("tova", "eager")]
SLOW = [(algorithm, "inductor") for algorithm in ("h2o", "sliding_window")]
SLOW += [(algorithm, "eager") for algorithm in EVICTORS.names if algorithm not in ("streaming", "h2o", "tova")]
COMPILERS += [pytest.param(*one, marks=pytest.mark.slow) for one in SLOW]
SMALL = {"snapkv": "snapkv(window=4)"}
IDS = torch.randint(3, 199, (3, 40), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(40) >= torch.tensor([[0], [11], [25]])).long()


@pytest.fixture(scope="module")
def model():
    made = random_model("llama")
    pack(made)
    return made


@pytest.mark.parametrize(("algorithm", "backend"), COMPILERS)
def test_compiled_steps_give_the_plain_steps_tokens_and_buffers(model, monkeypatch, algorithm, backend):
    """A batch whose buffers fill first and evict later, then one prompt: no layer falls back to plain steps."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    budgets = [7, 19, 40, 50, 60]
    for rows in (slice(0, 3), slice(1, 2)):
        held = []
        for compile in (False, True):
            config = SqueezeConfig(SMALL.get(algorithm, algorithm), budgets=budgets, compile=compile)
            with squeezed(model, config) as run, torch.no_grad():
                cache = run.cache(max_new_tokens=30)
                settings = {"max_new_tokens": 30, "min_new_tokens": 30, "do_sample": False}
                tokens = model.generate(IDS[rows], attention_mask=MASK[rows], past_key_values=cache, **settings)
            held.append((tokens, cache))
        (expected, plain), (found, compiled) = held
        assert found.equal(expected)
        for one, other in zip(plain.layers, compiled.layers, strict=True):
            torch.testing.assert_close(other.keys, one.keys, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(other.scores, one.scores, atol=1e-4, rtol=1e-4)
            assert other.slot_positions.equal(one.slot_positions)
    counters = torch._dynamo.utils.counters
    # Where a sequence has empty slots and where none has, of a batch, for as many groups of rows as its layers have,
    # and of one prompt; and what tries the compiler.
    assert 4 <= counters["stats"]["unique_graphs"] <= 10
    assert not counters["graph_break"], dict(counters["graph_break"])


def test_the_model_is_what_it_was_afterwards(model):
    expected = model(IDS[:1]).logits
    with squeezed(model, SqueezeConfig("h2o", "0.5", "0.3", compile=True)):
        assert model(IDS[:1], use_cache=False).logits.equal(expected), "without a squeezed cache nothing is compiled"
    assert "forward" not in vars(model.model.layers[0])


@pytest.mark.parametrize(("device", "need"), [("cpu", r"a C\+\+ compiler"), ("cuda", "Triton")])
def test_without_a_compiler_there_is_a_sentence(monkeypatch, device, need):
    monkeypatch.setattr(torch, "ones", lambda *shape, **options: None)

    def broken(*args, **kwargs):
        raise RuntimeError("\nNo working compiler was found\nmore")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(InputError, match=f"--compile needs {need}.*No working compiler was found") as error:
        compiling.compiled(torch.cos, torch.device(device))
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_no_compiler_is_noticed_for_real(tmp_path):
    """In a process of its own: what the compiler could not do once is remembered for the rest of a process."""
    script = "import torch; from squeeze.engine.compiling import compiled; compiled(torch.cos, torch.device('cpu'))"
    none = {"CXX": str(tmp_path / "no-such-compiler"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | none, capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert re.search(r"InputError: --compile needs a C\+\+ compiler.*\(.*no-such-compiler.*\): install it", last), last


def test_a_model_on_several_devices_is_not_compiled():
    spread = random_model("llama")
    spread.hf_device_map = {"model.embed_tokens": "cpu", "lm_head": "disk"}
    with pytest.raises(InputError, match="compile needs the model on one device"):
        SqueezedModel(spread, SqueezeConfig("h2o", "0.5", "0.3", compile=True))
