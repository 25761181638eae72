"""Recorded decode steps give the plain steps' tokens, whatever the method, the batch and the architecture.

A CUDA graph does the same operations on the same memory with the same numbers, again and again, and none of what the
host did in between. `Tape` does that on a CPU: so a number that should have been a tensor, or a tensor that is made
anew where it should have been written into, shows here.
"""

import gc
import warnings
import weakref
from contextlib import contextmanager
from dataclasses import replace
from typing import ClassVar
from unittest.mock import patch

import pytest
import torch
from conftest import random_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from squeeze import InputError, SlidingWindow, SqueezeConfig, squeezed
from squeeze.engine import graph
from squeeze.evictors import EVICTORS
from squeeze.models_table.zoo import ZOO, build

IDS = torch.randint(3, 199, (3, 40), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(40) >= torch.tensor([[0], [11], [25]])).long()

#: What waits for the device, as CUDA forbids while a graph is recorded.
QUESTIONS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select", "aten::_unique2")
QUESTIONS += ("aten::bincount", "aten::repeat_interleave.Tensor")


#: What makes tensors of the host's numbers, which is a copy to the device that cannot be recorded either.
FORBIDDEN = dict.fromkeys(("tensor", "from_numpy"), lambda *args, **kwargs: forbidden("a copy"))


class Tape(TorchDispatchMode):
    """Operations, and the tensors that they took and gave. What they changed while recorded is taken back."""

    tapes: ClassVar[list] = []

    def __init__(self, device):
        super().__init__()
        self.calls, self.before, self.replays = [], [], 0
        Tape.tapes.append(self)

    @staticmethod
    def watched(step):
        return step(), None

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, operation.name()
        masks = name.startswith("aten::index") and any(tensor.dtype == torch.bool for tensor in tensors(args[1]))
        if masks or {name, name.split(".")[0]} & set(QUESTIONS):
            forbidden(name)
        given = [*zip(operation._schema.arguments, args, strict=False)]
        given += [
            (argument, kwargs[argument.name]) for argument in operation._schema.arguments if argument.name in kwargs
        ]
        for argument, value in given:
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.before += [(tensor, tensor.clone()) for tensor in tensors(value)]
        result = operation(*args, **kwargs)
        self.calls.append((operation, args, kwargs, result))
        return result

    def record(self, step):
        try:
            with self, patch.multiple(torch, **FORBIDDEN), patch.object(torch.Tensor, "tolist", FORBIDDEN["tensor"]):
                return step()
        finally:
            for tensor, value in reversed(self.before):
                tensor.copy_(value)

    def replay(self):
        self.replays += 1
        for operation, args, kwargs, result in self.calls:
            given = {storage(tensor) for tensor in tensors((args, kwargs))}
            for old, new in zip(tensors(result), tensors(operation(*args, **kwargs)), strict=True):
                if storage(old) not in given:  # a view, or what was changed in place, is there already
                    old.copy_(new)


def forbidden(what):
    raise RuntimeError(f"operation not permitted when stream is capturing ({what})\nmore")


class Own(SlidingWindow):
    name = "own"


def tensors(nested):
    return [leaf for leaf in tree_leaves(nested) if isinstance(leaf, torch.Tensor)]


def storage(tensor):
    return id(tensor) if tensor.is_mkldnn else tensor.untyped_storage()._cdata  # weights that were packed have none


@pytest.fixture
def tapes(monkeypatch):
    monkeypatch.setitem(graph.RECORDINGS, "cpu", Tape)
    monkeypatch.setattr(Tape, "tapes", [])
    return Tape.tapes


def settings(new):
    return {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}


def answers(model, *configs, rows=slice(0, 3), new=30):
    """Tokens of a batch, the cache, and how many recordings were made."""
    with squeezed(model, configs[0]) as run, torch.no_grad():
        run.use(*configs)
        cache = run.cache(max_new_tokens=new)
        tokens = model.generate(IDS[rows], attention_mask=MASK[rows], past_key_values=cache, **settings(new))
        return tokens, cache, run.recorder


def replays():
    return sum(tape.replays for tape in Tape.tapes)


@pytest.mark.parametrize("budgets", [[7, 19, 40, 50, 60], [[7, 9], [19, 7], [40, 41], [50, 20], [60, 9]]])
@pytest.mark.parametrize("name", EVICTORS.names)
def test_recorded_steps_give_the_plain_steps_tokens_and_buffers(tapes, name, budgets):
    """A batch whose rows fill first and evict later, then one prompt."""
    if name == "tova" and isinstance(budgets[0], list):
        pytest.skip("its heads agree")
    model, config = (
        random_model("llama"),
        SqueezeConfig({"snapkv": "snapkv(window=4)"}.get(name, name), budgets=budgets),
    )
    for rows in (slice(0, 3), slice(1, 2)):
        expected, plain, _ = answers(model, config, rows=rows)
        tapes.clear()
        found, graphed, recorder = answers(model, replace(config, cuda_graph=True), rows=rows)
        assert found.equal(expected)
        for one, other in zip(plain.layers, graphed.layers, strict=True):
            torch.testing.assert_close(other.keys, one.keys, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(other.scores, one.scores, atol=1e-4, rtol=1e-4)
            assert other.slot_positions.equal(one.slot_positions)
        assert 1 <= recorder.recorded == len(tapes) <= 3, "however many layers fill one after the other"
        assert replays() >= 29 - 3, "of every kind one step is not"


#: What they bring: windows and softcaps, layers that share a cache, sink logits, chunks, latent attention, one that
#: gives other widths, several kinds of positions, and experts that ask the host, with which nothing can be recorded.
SOME = ("gemma2", "gemma3n_text", "gpt_oss", "llama4_text", "deepseek_v3", "gpt2", "dbrx", "jetmoe")


@pytest.mark.parametrize(
    "name", [name if name in SOME else pytest.param(name, marks=pytest.mark.slow) for name in ZOO]
)
def test_every_architecture_gives_the_same_tokens_or_a_sentence(tapes, name):
    model, sizes = build(name), {"ini_size": "0.4", "allocation": "uniform"}
    try:
        expected, _, _ = answers(model, SqueezeConfig("sliding_window", **sizes), new=12)
    except InputError:
        return  # it cannot be squeezed, or not so
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            found, _, recorder = answers(model, SqueezeConfig("sliding_window", **sizes, cuda_graph=True), new=12)
        except InputError as error:
            assert "cuda_graph needs a model that caches nothing but attention" in str(error)
            return
    assert found.equal(expected)
    told = [str(one.message) for one in said if "CUDA graph" in str(one.message)]
    assert bool(recorder.failed) == bool(told) and len(told) < 2
    assert replays() == (0 if recorder.failed else 10)
    assert all("\n" not in text and "not permitted" in text for text in told)


def test_some_of_them_are_recorded(tapes):
    """And the test above does not only see refusals."""
    for name, failed in {"gemma2": False, "deepseek_v3": False, "dbrx": True, "jetmoe": True}.items():
        config = SqueezeConfig("sliding_window", "0.4", allocation="uniform", cuda_graph=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert (answers(build(name), config, new=4)[2].failed is not None) == failed, name


def test_what_has_failed_once_is_not_tried_again(tapes):
    model, config = build("dbrx"), SqueezeConfig("h2o", "0.4", allocation="uniform", cuda_graph=True)
    expected = answers(model, replace(config, cuda_graph=False), new=8)[0]
    with squeezed(model, config) as run, torch.no_grad():
        with pytest.warns(UserWarning, match="without a CUDA graph, which could not be recorded: .*not permitted"):
            assert model.generate(IDS, attention_mask=MASK, **settings(8)).equal(expected)
        assert model.generate(IDS, attention_mask=MASK, **settings(8)).equal(expected)
        assert len(tapes) == 1 and run.recorder.failed.startswith("operation not permitted")
        assert run.cache(8).graph is None and not run.cache(8).whole_buffers


def test_a_step_that_waits_for_the_host_is_not_recorded(tapes, monkeypatch):
    """As it is seen where it is run kernel by kernel: PyTorch does not always get over a recording that failed."""
    monkeypatch.setattr(Tape, "watched", lambda step: (step(), "model.py:3 waits for the GPU"))
    with pytest.warns(UserWarning, match=r"could not be recorded: model.py:3 waits for the GPU"):
        _, _, recorder = answers(random_model("llama"), SqueezeConfig("h2o", budgets=[9] * 5, cuda_graph=True))
    assert not tapes and recorder.failed


def test_where_memory_is_short_a_batch_goes_on_without_and_the_next_one_is_recorded(tapes, monkeypatch):
    model, config, record = random_model("llama"), SqueezeConfig("h2o", budgets=[9] * 5, cuda_graph=True), Tape.record
    monkeypatch.setattr(Tape, "record", lambda self, step: (_ for _ in ()).throw(torch.OutOfMemoryError("none")))
    with squeezed(model, config) as run, torch.no_grad():
        expected = model.generate(IDS, attention_mask=MASK, **settings(8))
        assert len(tapes) == 1 and replays() == 0 and run.recorder.failed is None
        monkeypatch.setattr(Tape, "record", record)
        assert model.generate(IDS, attention_mask=MASK, **settings(8)).equal(expected)
        assert replays() == 6


def test_autocast_of_its_own_for_every_block(tapes):
    """A cast that autocast keeps is gone with its block, and a recorded step may run in the next one."""
    model, said = random_model("llama"), []
    for graphed in (False, True):
        with squeezed(model, SqueezeConfig("h2o", budgets=[9] * 5, cuda_graph=graphed)) as run, torch.no_grad():
            cache, logits = run.cache(20), []
            for step in range(-1, 12):
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=step < 4 or step > 7):
                    ids = IDS[:1] if step < 0 else IDS[1:2, step : step + 1]
                    logits.append(model(ids, past_key_values=cache).logits[:, -1].float())
            said.append(torch.stack(logits))
    assert said[1].equal(said[0]) and len(tapes) == 3


@pytest.mark.parametrize("algorithm", ["streaming(sinks=6)", "h2o"])
def test_copies_and_several_tokens_go_on_by_themselves(tapes, algorithm):
    """A cache is copied in the middle of recorded steps; both go on, one of them with several tokens at once. The
    second sequence is shorter than the sinks, which come while the first one evicts."""
    model, said = random_model("llama"), []
    answer = torch.randint(3, 199, (2, 40), generator=torch.Generator().manual_seed(1))
    for graphed in (False, True):
        config = SqueezeConfig(algorithm, budgets=[7, 12, 20, 31, 60], cuda_graph=graphed)
        with squeezed(model, config) as run, torch.no_grad():
            logits, cache = [], run.cache(60)
            model(
                IDS[:2, :20],
                attention_mask=(torch.arange(20) >= torch.tensor([[0], [17]])).long(),
                past_key_values=cache,
            )

            def feed(cache, *tokens, logits=logits):
                for part in tokens:
                    places = (cache.get_seq_length() + torch.arange(part.shape[1])).expand(2, -1)
                    # Of padded prompts, a step without positions is not recorded.
                    given = {"position_ids": places} if cache.steps % 7 else {}
                    logits.append(model(part, past_key_values=cache, **given).logits)

            feed(cache, *answer[:, :12].split(1, dim=1))
            other = cache.copy()
            for start in (12, 18, 24):
                tokens = answer[:, start : start + 6]
                feed(cache, tokens, *tokens.split(1, dim=1))
                feed(other, *tokens.split(1, dim=1))
            said.append(torch.cat(logits, dim=1))
    torch.testing.assert_close(said[1], said[0], atol=1e-4, rtol=0)
    assert replays() > 30


def test_several_configurations_are_recorded_as_one_batch(tapes):
    model, budgets = random_model("llama"), ([9] * 5, [40] * 5, [7, 19, 40, 50, 60])
    plain = [SqueezeConfig("h2o", budgets=own) for own in budgets]
    graphed = [replace(config, cuda_graph=True) for config in plain]
    expected, found = (answers(model, *configs)[0] for configs in (plain, graphed))
    assert found.equal(expected) and replays() > 20
    with squeezed(model, graphed[0]) as run, pytest.raises(InputError, match="must agree in cuda_graph"):
        run.use(graphed[0], plain[1])


def test_the_output_is_not_changed_by_later_steps(tapes):
    """Nor is it another kind of output: hidden states, and tuples."""
    model = random_model("llama")
    with squeezed(model, SqueezeConfig("h2o", "0.4", "0.3", cuda_graph=True)) as run, torch.no_grad():
        cache, kept = run.cache(9), []
        model(IDS[:1], past_key_values=cache)
        for step in range(8):
            output = model.model(IDS[:1, step : step + 1], past_key_values=cache, output_hidden_states=True)
            kept.append((output, output.last_hidden_state.clone(), output.hidden_states[2].clone()))
        assert all(
            one.last_hidden_state.equal(last) and one.hidden_states[2].equal(third) for one, last, third in kept
        )
        assert len({one.last_hidden_state.sum().item() for one, _, _ in kept}) == 8
        assert isinstance(model.model(IDS[:1, :1], past_key_values=cache, return_dict=False), tuple)


def test_a_cache_is_gone_as_soon_as_nobody_holds_it(tapes):
    """And not when Python next looks for cycles: a prompt's keys and values would stay beside the next one's."""
    gc.collect()
    gc.disable()
    try:
        _, cache, _ = answers(random_model("llama"), SqueezeConfig("h2o", budgets=[9] * 5, cuda_graph=True))
        there = weakref.ref(cache)
        assert replays() > 20
        tapes.clear()
        del cache
        assert there() is None
    finally:
        gc.enable()


def test_what_fails_while_cuda_records_is_told_and_the_recording_ended(monkeypatch):
    """The order of calls alone, of a CUDA that is not there."""
    calls = []

    class Fake:
        def __init__(self, name="graph"):
            self.name = name

        def __getattr__(self, name):
            def call(*args, **kwargs):
                calls.append(f"{self.name}.{name}")
                if name == "capture_end":
                    raise RuntimeError("operation failed due to a previous error during capture")

            return call

    @contextmanager
    def within(what):
        calls.append(f"in {what if isinstance(what, torch.device) else what.name}")
        yield

    fakes = {"CUDAGraph": Fake, "Stream": lambda: Fake("own"), "current_stream": lambda: Fake("stream")}
    for name, fake in {**fakes, "stream": within, "device": within}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)

    def step():
        calls.append("step")
        raise RuntimeError("the step's own error")

    recorder = graph.Recorder(torch.device("cuda:1"))
    with pytest.warns(UserWarning, match="could not be recorded: the step's own error"):
        assert recorder.record(step) is None
    assert recorder.failed == "the step's own error"
    began = ["in cuda:1", "own.wait_stream", "in own", "graph.capture_begin"]
    assert calls == [*began, "step", "graph.capture_end"]


def test_what_waits_is_seen_where_a_step_is_run_as_it_is(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def step():
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("another", stacklevel=1)
        return 3

    with pytest.warns(UserWarning, match="another") as said:
        output, asks = graph.CudaGraph.watched(step)
    assert output == 3 and asks.startswith(__file__) and asks.endswith("waits for the GPU")
    assert len(said) == 1 and modes == ["warn", 0]
    assert graph.CudaGraph.watched(lambda: 4) == (4, None)


def test_where_nothing_can_be_recorded_there_is_a_sentence(tapes, monkeypatch):
    config, dynamic = SqueezeConfig("h2o", "0.4", "0.3", cuda_graph=True), {"rope_type": "dynamic", "factor": 2.0}
    spread = random_model("llama")
    spread.hf_device_map = {"model.embed_tokens": "cpu", "lm_head": "disk"}
    for model, sentence in (
        (spread, "cuda_graph needs the model on one device"),
        (build("jamba"), "cuda_graph needs a model that caches nothing but attention"),
        (random_model("llama", rope_parameters=dynamic | {"rope_theta": 1e4}), "angles do not depend on the length"),
    ):
        with pytest.raises(InputError, match=sentence), squeezed(model, config):
            pass
    model, own = random_model("llama"), replace(config, algorithm=Own())
    with pytest.raises(InputError, match="for the eviction methods of this project: what own answers"):
        squeezed(model, own).__enter__()
    monkeypatch.delitem(graph.RECORDINGS, "cpu")
    with pytest.raises(InputError, match="on an NVIDIA GPU, and it is on cpu: leave it out"):
        squeezed(model, config).__enter__()
