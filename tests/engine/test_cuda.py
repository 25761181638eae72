"""What only a GPU can show: `bash script/test.sh -m cuda`, on a machine that has one."""

import copy
import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from conftest import ROOT, random_model
from test_rope import ROPES
from tiny import save_rows, save_tiny
from torch.nn.utils.rnn import pad_sequence

import pred
from squeeze import SqueezeConfig, squeezed
from squeeze.benchmarks.longbench.data import generation_lengths
from squeeze.devices import unless_out_of_memory
from squeeze.engine import kernels, loss_curves, prefill_attention
from squeeze.engine import layer as layer_module
from squeeze.engine.attention import Rule
from squeeze.evictors import EVICTORS
from squeeze.models.loading import load
from squeeze.models_table.zoo import build

pytestmark = pytest.mark.cuda

ALGORITHMS = ("sliding_window", "streaming", "h2o")
IDS = torch.randint(3, 199, (3, 40), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(40) >= torch.tensor([[0], [11], [25]])).long()
BUDGETS = [5, 19, 40, 50, 60]


@pytest.fixture(scope="module")
def gpu():
    assert torch.cuda.is_available(), "these tests need a GPU that PyTorch finds"
    return torch.device("cuda:0")


@pytest.fixture(scope="module")
def real(embedded, gpu):
    """The embedded model in float32, on the CPU and on the GPU."""
    return embedded("llama"), copy.deepcopy(embedded("llama")).to(gpu)


def generate(model, config, ids=IDS, mask=MASK, steps=30, **more):
    """Greedy tokens, and the run."""
    settings = {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False}
    with squeezed(model, config) as run:
        ids, mask = ids.to(model.device), mask.to(model.device)
        found = model.generate(ids, attention_mask=mask, **settings, **more)
    return found[:, ids.shape[1] :].cpu(), run


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_batch_gives_the_cpus_tokens(gpu, algorithm):
    model = random_model("llama")
    on_gpu = copy.deepcopy(model).to(gpu)
    configs = SqueezeConfig(algorithm, budgets=BUDGETS), SqueezeConfig(algorithm, "0.5", "0.2")
    for config, rows in itertools.product(configs, (slice(0, 3), slice(0, 1))):  # a ragged batch, and one alone
        expected, there = generate(model, config, IDS[rows], MASK[rows])
        found, here = generate(on_gpu, config, IDS[rows], MASK[rows])
        assert found.equal(expected)
        assert here.budgets.tolist() == there.budgets.tolist()
        assert here.kv_bytes == there.kv_bytes


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("allocation", ["squeeze-log", "measured"])
def test_the_real_model_gives_the_cpus_tokens(real, prompts, algorithm, allocation):
    cpu, there = real
    ids = pad_sequence(prompts[6:9], batch_first=True, padding_side="left")
    mask = pad_sequence([torch.ones_like(one) for one in prompts[6:9]], batch_first=True, padding_side="left")
    kv_class3 = "0.15" if allocation == "squeeze-log" else None
    config = SqueezeConfig(algorithm, "0.3", kv_class3, allocation)
    expected, _ = generate(cpu, config, ids, mask, steps=24)
    found, _ = generate(there, config, ids, mask, steps=24)
    assert found.tolist() == expected.tolist()


def logits_by(kernel, model, config, monkeypatch):
    """Of each step of one forced text, with a kernel for decoding."""
    with monkeypatch.context() as patched, squeezed(model, config) as run, torch.inference_mode():
        patched.setattr(layer_module, "decode_kernel", lambda device, dtype, scored: kernel)
        cache = run.cache(max_new_tokens=40)
        ids, mask = IDS.to(model.device), MASK.to(model.device)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
        found = []
        for step in range(30):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            positions = positions[:, -1:] + 1
            token = IDS[:, step : step + 1].to(model.device)
            output = model(token, attention_mask=mask, position_ids=positions, past_key_values=cache)
            found.append(output.logits[:, -1].float())
        return torch.stack(found)


@pytest.mark.parametrize("kernel, dtype", [("sdpa", "float32"), ("sdpa", "bfloat16"), ("flash", "bfloat16")])
@pytest.mark.parametrize("algorithm", ["sliding_window", "streaming"])
def test_fused_kernels_decode_as_grouped_products_do(gpu, monkeypatch, algorithm, kernel, dtype):
    if kernel == "flash":
        pytest.importorskip("flash_attn")
    model = random_model("llama", hidden_size=384, initializer_range=0.1).to(gpu, getattr(torch, dtype))
    config = SqueezeConfig(algorithm, budgets=BUDGETS)
    expected, found = (logits_by(one, model, config, monkeypatch) for one in ("grouped", kernel))
    tolerance = 1e-3 if dtype == "float32" else 0.05
    assert expected.std() > 10 * tolerance
    assert (found - expected).abs().mean() < tolerance
    assert (found.argmax(dim=-1) == expected.argmax(dim=-1)).float().mean() > 0.9


@pytest.mark.filterwarnings("error:The CUDA Graph is empty")
@pytest.mark.parametrize("algorithm", EVICTORS.names)
def test_recorded_steps_give_the_plain_steps_tokens(gpu, algorithm):
    """Budgets by layer and by head; prompts one after the other, none of which must get another's recordings."""
    model, algorithm = random_model("llama").to(gpu), {"snapkv": "snapkv(window=4)"}.get(algorithm, algorithm)
    kinds = [[7, 19, 40, 50, 60], [[7, 9], [19, 7], [40, 41], [50, 20], [60, 9]]]
    for budgets in kinds[: 1 if algorithm == "tova" else 2]:
        config = SqueezeConfig(algorithm, budgets=budgets)
        for rows in (slice(0, 3), slice(1, 2), slice(0, 3)):
            expected, _ = generate(model, config, IDS[rows], MASK[rows])
            found, run = generate(model, replace(config, cuda_graph=True), IDS[rows], MASK[rows])
            assert run.recorder.failed is None and run.recorder.recorded > 0
            assert found.equal(expected)


@pytest.mark.parametrize("algorithm", ["streaming", "h2o"])
@pytest.mark.parametrize("heads", [False, True])
def test_recorded_steps_in_half_precision(gpu, algorithm, heads, monkeypatch):
    """By PyTorch's kernel for rows of any lengths, and by the fused one: the same kernels, so the same numbers but for
    the masks of empty slots."""
    model = random_model("llama", num_attention_heads=4, hidden_size=64).to(gpu, torch.bfloat16)
    budgets = [[own, 2 * own // 3 + 3] for own in BUDGETS] if heads else BUDGETS
    config = SqueezeConfig(algorithm, budgets=budgets)
    kernel = kernels.decode_kernel(gpu, torch.bfloat16, algorithm == "h2o")
    plain, recorded = (
        logits_by(kernel, model, each, monkeypatch) for each in (config, replace(config, cuda_graph=True))
    )
    assert (recorded - plain).abs().mean() < 0.02 * plain.std()


def test_what_waits_for_the_gpu_is_not_recorded(gpu):
    """And sampling goes on after it."""
    model, config = build("dbrx").to(gpu), SqueezeConfig("h2o", "0.4", allocation="uniform", cuda_graph=True)
    with pytest.warns(UserWarning, match="waits for the GPU"), squeezed(model, config) as run:
        model.generate(IDS.to(gpu), attention_mask=MASK.to(gpu), max_new_tokens=6, do_sample=True)
    assert run.recorder.failed and run.recorder.recorded == 0
    torch.cuda.empty_cache()
    assert torch.rand(3, device=gpu).isfinite().all()


@pytest.mark.parametrize("way", [{}, {"cuda_graph": True}])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_compiled_steps_give_the_plain_steps_tokens(gpu, algorithm, way):
    model = random_model("llama").to(gpu)
    expected, _ = generate(model, SqueezeConfig(algorithm, budgets=BUDGETS))
    found, run = generate(model, SqueezeConfig(algorithm, budgets=BUDGETS, compile=True, **way))
    assert found.equal(expected)
    assert run.recorder.failed is None and (run.recorder.recorded > 0) == bool(way)


def peak(model, config, ids, share=False):
    """The most bytes that a prefill had allocated beside the model, and what it kept."""
    with squeezed(model, config) as run, torch.inference_mode():
        run.share_prefills = share
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        cache = run.cache(8)
        model(ids, past_key_values=cache, logits_to_keep=1)
        return torch.cuda.max_memory_allocated() - before, cache.kv_bytes


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_bounded_prefill_never_holds_all_layers(gpu, algorithm):
    """The allocator's own peak, with budgets known before and with a prefill that is kept whole."""
    layers, length = 16, 8192
    shape = {"num_hidden_layers": layers, "max_position_embeddings": length + 8, "num_key_value_heads": 6}
    model = random_model("llama", hidden_size=192, **shape).to(gpu)
    ids = torch.randint(3, 199, (1, length), generator=torch.Generator().manual_seed(1)).to(gpu)
    config = SqueezeConfig(algorithm, "0.1", "0.1")
    bounded, kept = peak(model, config, ids)
    whole, _ = peak(model, config, ids, share=True)
    one = 2 * length * 192 * 4  # a layer's keys and values
    assert abs(kept - 0.1 * layers * one) < 0.01 * layers * one
    less = (layers - 1) * one - kept
    assert whole - bounded > 0.95 * less, f"{whole / one:.1f} and {bounded / one:.1f} layers"


def test_loss_curves_are_the_cpus(gpu):
    model, prompt = random_model("llama"), torch.arange(3, 190).repeat(2)[:230]
    found = []
    for one in (model, copy.deepcopy(model).to(gpu)):
        with squeezed(one, SqueezeConfig("h2o", "0.3", "0.3")) as run:
            found.append(torch.tensor(loss_curves.measure(run, prompt, [Fraction(3, 10)])))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_autocast_of_a_float32_model(gpu, algorithm):
    """As near to float32 as the model itself is under autocast, read and answered on a cache in half precision."""
    model = random_model("llama", hidden_size=384, initializer_range=0.1).to(gpu)
    ids = IDS[:1].to(gpu)
    settings = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    exact = torch.stack(model.generate(ids, **settings).logits)
    with torch.autocast("cuda", torch.bfloat16):
        full = torch.stack(model.generate(ids, **settings).logits)
        with squeezed(model, SqueezeConfig(algorithm, budgets=[100] * 5)):
            output = model.generate(ids, **settings)
    found = torch.stack(output.logits)
    assert {layer.keys.dtype for layer in output.past_key_values.layers} == {torch.bfloat16}
    assert (found[0].float() - exact[0]).abs().mean() < 2 * (full[0].float() - exact[0]).abs().mean()


@pytest.mark.parametrize("rope", ROPES)
def test_angles_by_length_are_the_cpus(gpu, rope):
    model = random_model("llama", **copy.deepcopy(ROPES[rope]))
    config = SqueezeConfig("h2o", budgets=[1000] * 5)
    ids, mask = IDS.repeat(1, 3), torch.cat([MASK.repeat_interleave(2, dim=1), torch.ones_like(MASK)], dim=1)
    expected, _ = generate(model, config, ids, mask)
    found, _ = generate(copy.deepcopy(model).to(gpu), config, ids, mask)
    assert found.equal(expected)


def test_threads_get_what_they_get_alone(gpu):
    model = random_model("llama").to(gpu)
    prompts = [IDS.flatten()[None, :length].to(gpu) for length in (120, 110, 100, 90)]
    settings = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None}
    with squeezed(model, SqueezeConfig("h2o", "0.4", "0.1")):
        alone = [model.generate(ids, **settings) for ids in prompts]
        with ThreadPoolExecutor(4) as pool:
            found = pool.map(lambda ids: model.generate(ids, **settings), prompts * 3)
            assert all(one.equal(expected) for one, expected in zip(found, alone * 3, strict=True))


def test_running_out_of_memory_is_noticed_and_passes(gpu):
    assert unless_out_of_memory(lambda: torch.empty(1 << 50, dtype=torch.uint8, device=gpu)) is None
    assert unless_out_of_memory(lambda: torch.ones(3, device=gpu).sum().item()) == 3


def test_layers_that_wait_on_the_cpu(gpu, prompts):
    """A map that leaves half of the layers in the CPU's memory gives the tokens of the GPU alone."""
    rest = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    split = dict.fromkeys(rest, 0) | {f"model.layers.{layer}": 0 if layer < 15 else "cpu" for layer in range(30)}
    prompt, found = prompts[2][None], []
    for device_map in (None, split):
        model, _ = load(ROOT / "models/SmolLM2-135M", gpu, torch.float32, device_map=device_map)
        assert ("cpu" in getattr(model, "hf_device_map", {}).values()) == (device_map is split)
        found.append(generate(model, SqueezeConfig("h2o", "0.3", "0.2"), prompt, torch.ones_like(prompt), 16)[0])
    assert found[0].equal(found[1])


def test_the_command_says_what_it_ran_on(gpu, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(generation_lengths(), "samsum", 8)
    save_tiny(tmp_path / "tiny")
    save_rows(tmp_path / "data", count=3)
    common = ["--model", "tiny", "--data_dir", "data", "--datasets", "samsum", "--batch_size", "2"]
    pred.main([*common, "--enable_squeeze", "--ini_size", "0.5", "--KV_class3", "0.2"])
    folder = Path("pred_Long/tiny/0.5/20")
    content = json.loads((folder / "run.json").read_text())
    assert torch.cuda.get_device_name(gpu) in json.dumps(content)
    assert content["datasets"]["samsum"]["peak_memory_bytes"] > 0


def test_the_full_cache_with_flash_attention(gpu, tmp_path, monkeypatch):
    pytest.importorskip("flash_attn")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(generation_lengths(), "samsum", 8)
    save_tiny(tmp_path / "tiny")
    save_rows(tmp_path / "data", count=3)
    common = ["--model", "tiny", "--data_dir", "data", "--datasets", "samsum", "--dtype", "bfloat16"]
    pred.main([*common, "--attn", "flash_attention_2"])
    assert len(Path("pred_Long/tiny/full/samsum.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 200])
@pytest.mark.parametrize("heads", [(9, 3, 64), (8, 8, 128), (4, 2, 80)])
def test_fused_attention_and_sums_after_it_are_those_of_one_matrix(gpu, dtype, window, heads):
    """Of whole prompts, one of them padded; blocks with a float32 softmax, of the same numbers, say what is right."""
    count, kv_heads, width = heads
    generator = torch.Generator(gpu).manual_seed(0)
    drawn = [
        torch.randn(2, 700, number, width, generator=generator, device=gpu).to(dtype).transpose(1, 2)
        for number in (count, kv_heads, kv_heads)
    ]
    lengths = [700, 333]
    rule, places = Rule(width**-0.5, window), [[(kv_heads, torch.arange(length, device=gpu))] for length in lengths]
    assert kernels.sums_columns(gpu, dtype), "on a GPU of this age"
    found = prefill_attention.prefill(*drawn, places, lengths, rule, True, None)
    exact = prefill_attention.prefill(*(part.float() for part in drawn), places, lengths, rule, True, None)
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one.float(), other, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_configurations_of_one_prompt_in_a_batch_give_the_cpus_tokens(gpu, algorithm):
    model = random_model("llama")
    configs = [SqueezeConfig(algorithm, size, class3) for size, class3 in (("0.5", "0.2"), ("0.2", "0.2"))]
    found = []
    for device in (torch.device("cpu"), gpu):
        model = model.to(device)
        with squeezed(model, configs[0]) as run:
            run.use(*configs)
            ids = IDS[:1].repeat(2, 1).to(device)
            found.append(model.generate(ids, max_new_tokens=20, min_new_tokens=20, do_sample=False).cpu())
    assert found[0].equal(found[1])
