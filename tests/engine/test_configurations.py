"""A batch whose sequences have a configuration each gives what each gives alone; prompts that are in it again and
again are read once."""

import weakref

import pytest
import torch
from conftest import random_model
from test_patch import left_pad

from squeeze import H2O, InputError, SqueezeConfig, squeezed
from squeeze.engine import prefill_attention
from squeeze.engine.layer import SqueezeLayer
from squeeze.models_table.zoo import build

PROMPTS = [torch.arange(3, 143) % 199, torch.arange(20, 90), torch.arange(5, 70)]
SIZES = [("0.5", "0.2"), ("0.2", "0.2"), ("0.9", "0.3")]


def steps(model, inputs, mask, **settings):
    settings |= {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
    given = {"attention_mask": mask, "return_dict_in_generate": True, "output_logits": True}
    output = model.generate(inputs, **given, **settings)
    return torch.stack(output.logits)


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "falcon_h1", "gemma4_text"])
@pytest.mark.parametrize("algorithm", ["streaming", "h2o", "snapkv(window=8)", "tova"])
@pytest.mark.parametrize("read", ["one prompt", "two prompts, for each configuration", "prompts of their own"])
def test_each_sequence_is_what_its_configuration_gives_alone(architecture, algorithm, read):
    model = build(architecture)
    configs = [SqueezeConfig(algorithm, size, class3) for size, class3 in SIZES]
    rows, prompts = configs, {"one prompt": [PROMPTS[0][:60]] * 3, "prompts of their own": PROMPTS}.get(read)
    if prompts is None:
        rows, prompts = [config for config in configs for _ in range(2)], PROMPTS[:2] * 3
    if architecture == "falcon_h1":
        prompts = [prompt[:60] for prompt in prompts]  # a state space reads padding
    with squeezed(model, configs[0]) as run:
        alone, told = [], []
        for prompt, config in zip(prompts, rows, strict=True):
            run.use(config)
            alone.append(steps(model, prompt[None], torch.ones(1, len(prompt))))
            told.append(
                (run.budgets[0].tolist(), run.own_bytes[0], (run.kv_bytes, run.state_bytes), run.classes[0].tolist())
            )
        run.use(*configs)
        together = steps(model, *left_pad(prompts))
        assert (run.shared_seconds > 0) == (read != "prompts of their own"), "each is read once"
        assert together.shape[1] == len(rows) and len({str(budgets) for budgets, *_ in told}) >= 3
        torch.testing.assert_close(together, torch.cat(alone, dim=1), atol=2e-4, rtol=1e-3)
        for row, (budgets, own, whole, classes) in enumerate(told):
            assert run.budgets[row].tolist() == budgets and run.own_bytes[row] == own == whole
            assert run.classes[row].tolist() == classes
        assert run.kv_bytes <= 1.02 * sum(held for held, _ in run.own_bytes)


def test_bytes_of_a_sequence_are_those_that_it_has_alone():
    model = random_model("llama")
    with squeezed(model, SqueezeConfig("h2o", 0.5, 0.2)) as run:
        alone = []
        for prompt in PROMPTS:
            steps(model, prompt[None], torch.ones(1, len(prompt)))
            alone.append((run.kv_bytes, run.state_bytes))
        steps(model, *left_pad(PROMPTS))
        assert run.own_bytes == alone and len(set(alone)) > 1


def test_a_prompt_is_read_once_for_all_and_may_be_taken_over(monkeypatch):
    model = random_model("llama")
    configs = [SqueezeConfig("h2o", size, class3, per="adakv") for size, class3 in SIZES]
    inputs = PROMPTS[0].repeat(3, 1)
    with squeezed(model, configs[0]) as run:
        calls, original = [], prefill_attention.prefill
        monkeypatch.setattr(prefill_attention, "prefill", lambda *a, **k: calls.append(len(a[0])) or original(*a, **k))
        run.use(*configs)
        first = steps(model, inputs, torch.ones_like(inputs))
        assert calls == [1] * len(run.layers), "each layer has read one sequence"
        assert run.kept_prefill is None and run.shared_seconds > 0, "what the others would have taken"
        run.share_prefills = True
        for expected in (2, 2):
            assert steps(model, inputs, torch.ones_like(inputs)).equal(first)
            assert len(calls) == expected * len(run.layers)
        run.use(configs[1])
        taken = steps(model, inputs[:1], torch.ones_like(inputs[:1]))
        assert len(calls) == 2 * len(run.layers) and run.shared_seconds > 0
        torch.testing.assert_close(taken, first[:, 1:2], atol=2e-4, rtol=1e-3)


def test_whole_prompts_are_let_go_of_as_layers_are_cut(monkeypatch):
    """And what is read once for several configurations is no one's afterwards."""
    model = random_model("llama")
    configs = [SqueezeConfig("h2o", size, class3) for size, class3 in SIZES]
    whole, alive, original = [], [], SqueezeLayer.compress

    def compress(layer, *args):
        whole.append(weakref.ref(layer.keys))
        original(layer, *args)
        alive.append(sum(reference() is not None for reference in whole))

    monkeypatch.setattr(SqueezeLayer, "compress", compress)
    inputs, mask = left_pad(PROMPTS[:2] * 3)
    with squeezed(model, configs[0]) as run:
        whole.clear(), alive.clear()  # of the check that a model is patched rightly
        run.use(*configs)
        whole.clear(), alive.clear()
        steps(model, inputs, mask)
        assert alive == [0] * len(run.layers)
        with pytest.raises(ValueError, match="a prefill of one prompt can be forked, and this is of 2"):
            run.fork(run.prefill(inputs[:2], mask=mask[:2]), [[9] * len(run.layers)], 1)


def test_what_configurations_of_a_batch_have_in_common():
    model, first = random_model("llama"), SqueezeConfig("h2o", "0.5", "0.2")
    inputs = PROMPTS[0].repeat(2, 1)
    with squeezed(model, first) as run:
        for other, name in (
            (SqueezeConfig("streaming", "0.5", "0.2"), "evictor"),
            (SqueezeConfig("h2o", "0.5", "0.2", per="adakv"), "per"),
            (SqueezeConfig("h2o", "0.5", "0.2", attn="eager"), "attn"),
        ):
            with pytest.raises(InputError, match=f"the configurations of one batch must agree in {name}"):
                run.use(first, other)
        windows = [SqueezeConfig("h2o", "0.5", allocation=f"cake(window={window})") for window in (8, 64)]
        with pytest.raises(InputError, match="must look at the attention of as many queries each"):
            run.use(*windows)
        run.use(first, windows[0])
        run.use(first, first, first)
        assert run.configs == [first] * 3 and run.evictor == H2O()
        with pytest.raises(ValueError, match="had 3 configurations, and the batch has 2 sequences"):
            steps(model, inputs, torch.ones_like(inputs))
        run.use(first)
        steps(model, inputs, torch.ones_like(inputs))
        assert run.own_bytes == [(run.kv_bytes / 2, run.state_bytes / 2)] * 2
