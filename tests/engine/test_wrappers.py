"""What people put round a model: threads, PEFT, autocast, torch.compile."""

import copy
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import random_model
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import LlamaForSequenceClassification

from squeeze import InputError, SqueezeConfig, squeezed
from squeeze.engine import squeezed_model
from squeeze.engine.unwrap import unwrap
from squeeze.models.packing import pack

ALGORITHMS = ("sliding_window", "streaming", "h2o")
IDS = torch.randint(3, 199, (2, 60), generator=torch.Generator().manual_seed(4))
SETTINGS = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")


@pytest.mark.parametrize("allocation", ["squeeze", "measured"])
def test_threads_get_what_they_get_alone(allocation):
    model = random_model("llama")
    pack(model)
    prompts = [IDS.flatten().repeat(4)[None, :length] for length in (240, 230, 220, 210)]
    config = SqueezeConfig("streaming", "0.4", "0.1" if allocation == "squeeze" else None, allocation=allocation)
    start = threading.Barrier(4)

    def answer(ids):
        start.wait()
        return model.generate(ids, **SETTINGS)

    with squeezed(model, config) as run:
        alone = [model.generate(ids, **SETTINGS) for ids in prompts]
        with ThreadPoolExecutor(4) as pool:
            for _ in range(3):
                for found, expected in zip(pool.map(answer, prompts), alone, strict=True):
                    assert torch.equal(found, expected)
    assert run.kv_bytes > 0


def test_a_thread_without_a_squeezed_cache_disturbs_no_measurement():
    model = random_model("llama")
    stop = threading.Event()

    def disturb():
        with torch.no_grad():
            while not stop.is_set():
                model(IDS, use_cache=False)

    with squeezed(model, SqueezeConfig("h2o", "0.4", "0.1")) as run:
        model.generate(IDS, **SETTINGS)
        expected = run.similarities
        with ThreadPoolExecutor(1) as pool:
            pool.submit(disturb)
            try:
                for _ in range(20):
                    model.generate(IDS, **SETTINGS | {"max_new_tokens": 2})
                    assert (run.similarities == expected).all()
            finally:
                stop.set()


def test_leaving_waits_for_a_forward_pass():
    model = random_model("llama")
    inside, left, failed = threading.Event(), threading.Event(), []

    def slow(module, args):
        inside.set()
        failed.append(left.wait(0.3))  # the block is not left before this forward pass has ended

    def read(run):
        with torch.no_grad():
            model(IDS, past_key_values=run.cache(1))

    with ThreadPoolExecutor(1) as pool:
        with squeezed(model, SqueezeConfig("h2o", "0.4", "0.1")) as run:
            handle = model.model.layers[2].register_forward_pre_hook(slow)
            done = pool.submit(read, run)
            assert inside.wait(10)
        left.set()
        done.result()
    handle.remove()
    assert failed == [False]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_lora_model_is_squeezed_like_its_base(algorithm):
    peft = get_peft_model(random_model("llama"), LORA).eval()
    full = peft.generate(input_ids=IDS, **SETTINGS)
    with squeezed(peft, SqueezeConfig(algorithm, budgets=[1000] * 5)):
        assert torch.equal(peft.generate(input_ids=IDS, **SETTINGS), full)
    with squeezed(peft, SqueezeConfig(algorithm, "0.3", "0.1")) as run:
        found = peft.generate(input_ids=IDS, **SETTINGS)
    base = peft.merge_and_unload()
    with squeezed(base, SqueezeConfig(algorithm, "0.3", "0.1")) as merged:
        assert torch.equal(base.generate(IDS, **SETTINGS), found)
    assert run.budgets.tolist() == merged.budgets.tolist()


@pytest.mark.parametrize("config", [PrefixTuningConfig, PromptTuningConfig])
def test_learned_prompts_are_refused(config):
    peft = get_peft_model(random_model("llama"), config(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with (
        pytest.raises(InputError, match="puts tokens before every prompt"),
        squeezed(peft, SqueezeConfig("h2o", 0.5, 0.5)),
    ):
        pass


def test_what_is_no_language_model_is_a_sentence():
    for wrong in (nn.Linear(2, 2), None, "SmolLM2-135M", random_model("llama").model):
        with pytest.raises(InputError, match="squeezed takes a causal language model"):
            unwrap(wrong)
    classifier = LlamaForSequenceClassification(random_model("llama").config)
    with pytest.raises(InputError, match="a LlamaForSequenceClassification generates nothing"):
        unwrap(classifier)


def deviation(logits, exact):
    return (logits.float() - exact).abs().mean().item()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("cut", [False, True])
def test_autocast_of_a_float32_model(algorithm, cut):
    """As near to float32 as the model itself is under autocast; the cache is held in autocast's dtype."""
    model = random_model("llama")
    settings = SETTINGS | {"return_dict_in_generate": True, "output_logits": True}
    config = SqueezeConfig(algorithm, "0.3", "0.1") if cut else SqueezeConfig(algorithm, budgets=[1000] * 5)
    exact = model.generate(IDS, **settings).logits[0]
    with torch.autocast("cpu", torch.bfloat16):
        full = model.generate(IDS, **settings).logits[0]
        with squeezed(model, config) as run:
            found = model.generate(IDS, **settings)
    assert 0 < deviation(found.logits[0], exact) < 1.5 * deviation(full, exact)
    layers = found.past_key_values.layers
    assert {layer.keys.dtype for layer in layers} == {layer.values.dtype for layer in layers} == {torch.bfloat16}
    assert run.kv_bytes == sum(2 * layer.keys.nbytes for layer in layers)
    assert all(torch.isfinite(one).all() for one in found.logits)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_prompt_may_be_read_under_autocast_and_answered_without(algorithm):
    model, text = random_model("llama"), torch.cat([IDS, IDS[:, :1]], dim=1)
    with squeezed(model, SqueezeConfig(algorithm, budgets=[1000] * 5)) as run, torch.no_grad():
        exact = model(text, use_cache=False).logits[:, -1]
        cache = run.cache(2)
        with torch.autocast("cpu", torch.bfloat16):
            full = model(text, use_cache=False).logits[:, -1]
            model(IDS, past_key_values=cache)
        logits = model(text[:, -1:], past_key_values=cache).logits[:, -1]
    assert logits.dtype == torch.float32 and 0 < deviation(logits, exact) < 4 * deviation(full, exact)


@pytest.mark.parametrize("how", ["forward", "model.compile", "torch.compile", "layers"])
def test_a_model_that_its_user_compiled(how):
    """The graph breaks where the cache is; tokens are the plain model's. The backend traces and does no more."""
    config = SqueezeConfig("streaming", "0.3", "0.1")
    plain = random_model("llama")
    with squeezed(plain, config) as run:
        expected, budgets = plain.generate(IDS, **SETTINGS), run.budgets.tolist()
    model = random_model("llama")
    wrapped = model
    if how == "forward":
        model.forward = torch.compile(model.forward, backend="eager")
    elif how == "model.compile":
        model.compile(backend="eager")
    elif how == "layers":
        for layer in model.model.layers:
            layer.compile(backend="eager")
    else:
        wrapped = torch.compile(model, backend="eager")
    with squeezed(wrapped, config) as run, torch.no_grad():
        assert torch.equal(wrapped.generate(IDS, **SETTINGS), expected)
        assert run.budgets.tolist() == budgets
        cache = run.cache(1)
        assert torch.equal(wrapped(IDS, past_key_values=cache).logits[:, -1].argmax(-1), expected[:, 60])
        assert cache.compressed


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_a_squeezed_model_is_not_copied(copied):
    model = random_model("llama")
    with (
        squeezed(model, SqueezeConfig("h2o", "0.3", "0.1")),
        pytest.raises(ValueError, match=r"leave the `with squeezed\(\.\.\.\)` block first"),
    ):
        copied(model)
    assert torch.equal(copy.deepcopy(model)(IDS).logits, model(IDS).logits)


def test_threads_that_each_squeeze_one_model_are_let_in_one_by_one(monkeypatch):
    """While one has it the others are refused, and afterwards the model is what it was."""
    model = random_model("llama")
    before = dict(vars(model)), dict(vars(model.model))
    expected = model.generate(IDS, **SETTINGS)
    start, inside = threading.Barrier(3), []
    slow = squeezed_model.SqueezedModel.__init__

    def init(self, *args):
        time.sleep(0.05)
        slow(self, *args)

    monkeypatch.setattr(squeezed_model.SqueezedModel, "__init__", init)

    def enter(_):
        start.wait()
        try:
            with squeezed(model, SqueezeConfig("h2o", "0.3", "0.1")):
                inside.append(1)
                time.sleep(0.4)
                assert len(inside) == 1
                return "in"
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor(3) as pool:
        said = sorted(pool.map(enter, range(3)))
    assert said[0] == "in" and all("squeezed already" in one for one in said[1:])
    assert (dict(vars(model)), dict(vars(model.model))) == before
    assert torch.equal(model.generate(IDS, **SETTINGS), expected)
