"""The files of a model's folder: which are loaded, which tell it from another, and what is not let in."""

import json
import os
import shutil
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny

from squeeze import InputError
from squeeze.models import sources
from squeeze.models.loading import load
from squeeze.models.sources import fetch, identity, resolve

CPU = torch.device("cpu")
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def folder(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "m")


def shard(folder, names=SHARDS, **index):
    """Spread a folder's weights over files of these names."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts = [dict(list(tensors.items())[number :: len(names)]) for number in range(len(names))]
    for name, part in zip(names, parts, strict=True):
        (folder / name).parent.mkdir(exist_ok=True)
        save_file(part, folder / name, {"format": "pt"}) if name.endswith("s") else torch.save(part, folder / name)
    write_index(folder, {key: name for name, part in zip(names, parts, strict=True) for key in part}, **index)
    return folder


def write_index(folder, weight_map, name="model.safetensors.index.json", **more):
    (folder / name).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map, **more}))


def known(folder, **flags):
    return identity(resolve(str(folder)), folder, **flags)


def loaded(folder, **flags):
    return load(fetch(resolve(str(folder)), **flags), CPU, torch.float32, **flags)[0]


def refused(folder, words, **flags):
    """`fetch` and `load`, which is called without it as well, both refuse the folder before any code can run."""
    with mock.patch("torch.load", side_effect=AssertionError("torch.load was called")):
        with pytest.raises(InputError, match=words):
            fetch(resolve(str(folder)), **flags)
        with pytest.raises(InputError, match=words):
            load(folder, CPU, torch.float32, **flags)


@pytest.mark.parametrize("names", [SHARDS, ("a/1.safetensors", "b.safetensors")])
def test_weights_that_an_index_names(tiny, folder, names):
    whole, ids = loaded(tiny), torch.arange(3, 40)[None]
    shard(folder, names)
    assert torch.equal(loaded(folder)(ids).logits, whole(ids).logits)
    first = known(folder)
    assert list(first["weights"]) == list(names)
    assert "model.safetensors.index.json" not in first["files_sha256"]  # as in the runs that exist
    for name in names:
        content = bytearray((folder / name).read_bytes())
        content[-1] ^= 1
        (folder / name).write_bytes(content)
        changed = known(folder)
        assert changed["weights"][name] != first["weights"][name]
        assert changed["files_sha256"] == first["files_sha256"]
        content[-1] ^= 1
        (folder / name).write_bytes(content)


def test_an_index_that_picks_other_files_makes_another_model(folder):
    """The same files, of which the index once names some and once others."""
    shard(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    for name in SHARDS:
        shutil.copy(folder / name, folder / f"tuned-{name}")
    first = known(folder)
    write_index(folder, {key: f"tuned-{name}" for key, name in index.items()})
    second = known(folder)
    assert first["weights"] == second["weights"]
    assert first["files_sha256"] != second["files_sha256"]


def test_the_whole_file_goes_before_an_index(folder):
    write_index(folder, {"model.norm.weight": "w.bin"})  # transformers does not look at it either
    assert loaded(folder).dtype == torch.float32
    assert list(known(folder)["weights"]) == ["model.safetensors"]


def test_pickles_by_an_index(folder):
    names = ("w.bin", "model-00002-of-00002.safetensors")
    shard(folder, names)
    refused(folder, r"index\.json names w\.bin, which is no safetensors file and can run code: --allow_pickle")


@pytest.mark.parametrize(
    ("names", "index"),
    [(("w.bin", "x.bin"), "model.safetensors.index.json"), (("w.pt", "y.bin"), "pytorch_model.bin.index.json")],
)
def test_pickles_that_are_allowed_are_in_the_identity(tiny, folder, names, index):
    whole, ids = loaded(tiny), torch.arange(3, 40)[None]
    shard(folder, names, name=index)
    assert torch.equal(loaded(folder, allow_pickle=True)(ids).logits, whole(ids).logits)
    first = known(folder, allow_pickle=True)
    assert list(first["weights"]) == list(names)
    torch.save({**torch.load(folder / names[0]), "more": torch.zeros(1)}, folder / names[0])
    assert known(folder, allow_pickle=True)["weights"] != first["weights"]
    (folder / names[1]).unlink()
    refused(folder, f"{index} names {names[1]}, which is not there", allow_pickle=True)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "a/../../x.safetensors", "/etc/x.safetensors", "{folder}/y.safetensors"]
)
def test_an_index_does_not_lead_out_of_the_folder(folder, name):
    shard(folder)
    for place in (folder.parent / "x.safetensors", folder / "y.safetensors"):
        shutil.copy(folder / SHARDS[0], place)
    (folder / "a").mkdir()
    write_index(folder, {"model.norm.weight": name.replace("{folder}", str(folder)), "lm_head.weight": SHARDS[1]})
    refused(folder, r"index\.json names .*, which is outside of the model's folder")


@pytest.mark.parametrize(
    "name", ["gone.safetensors", "sub.safetensors", "a\0b.safetensors", "n" * 300 + ".safetensors"]
)
def test_an_index_names_files(folder, name):
    shard(folder)
    (folder / "sub.safetensors").mkdir()
    write_index(folder, {"model.norm.weight": name})
    refused(folder, r"index\.json names .*, which is (not there|no file)")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"weight_map": {}, "metadata": {}}, "names no weights"),
        ({"weight_map": {"a": "model.safetensors"}}, "has no field metadata"),
        ({"weight_map": {"a": 5}, "metadata": {}}, "weight_map.a is not text"),
        ({"weight_map": [], "metadata": {}}, "weight_map is not a JSON object"),
        ([], "is not a JSON object"),
    ],
)
def test_an_index_of_another_form(folder, content, words):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    refused(folder, words)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json", "chat_template.jinja"]
)
def test_links_that_lead_elsewhere(folder, name):
    outside = folder.parent / "elsewhere"
    if (folder / name).exists():
        (folder / name).rename(outside)
    else:
        outside.write_text("{{ messages }}")
    (folder / name).symlink_to(outside)
    refused(folder, f"m/{name}, a link to .*elsewhere, which is outside of the model's folder: copy the file into it")
    outside.unlink()
    words = "has no config.json" if name == "config.json" else "which is not there|has no weights"
    with pytest.raises(InputError, match=words):
        fetch(resolve(str(folder)))
    (folder / name).unlink()
    (folder / name).symlink_to(name)  # in a circle
    with pytest.raises((InputError, OSError), match=words + "|symbolic links"):
        fetch(resolve(str(folder)))


def test_links_inside_of_the_folder(folder):
    (folder / "model.safetensors").rename(folder / "w-1")
    (folder / "model.safetensors").symlink_to("w-1")
    linked = folder.parent / "link"
    linked.symlink_to(folder)  # the folder itself may lie anywhere
    assert loaded(linked).config.num_hidden_layers == 5


def test_links_of_the_hubs_cache(tiny, tmp_path):
    """`snapshots/<revision>/<name>` is a link to `blobs/<hash>`, and to nothing else."""
    cache = tmp_path / "models--org--m"
    snapshot, blobs = cache / "snapshots/abc", cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(tiny.iterdir())):
        shutil.copy(path, blobs / f"hash{number}")
        (snapshot / path.name).symlink_to(os.path.relpath(blobs / f"hash{number}", snapshot))
    assert loaded(snapshot).config.num_hidden_layers == 5
    assert known(snapshot) == known(tiny)
    weights = (snapshot / "model.safetensors").resolve()
    weights.rename(tmp_path / "elsewhere")
    weights.symlink_to(tmp_path / "elsewhere")
    refused(snapshot, "elsewhere, which is outside of the model's folder")


def test_what_transformers_would_add_or_take_instead(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "org/evil", "peft_type": "LORA"})
    )
    refused(folder, "holds a PEFT adapter")
    (folder / "adapter_config.json").unlink()
    (folder / "shard-00001-model-00001-of-00001.safetensors").touch()
    refused(folder, "holds a distributed checkpoint")
    (folder / "shard-00001-model-00001-of-00001.safetensors").unlink()
    for settings, words in {
        '{"configuration_files": ["config.4.0.0.json"]}': "configuration_files names other files",
        '{"transformers_weights": "adapter_model.bin"}': "is adapter_model.bin, which is no safetensors file",
        '{"transformers_weights": "../x.safetensors"}': "which is outside of the model's folder",
        '{"transformers_weights": "x.safetensors"}': "x.safetensors, which is not there",
    }.items():
        (folder / "config.json").write_text(json.dumps(config | json.loads(settings)))
        refused(folder, words)


def test_weights_that_the_config_names(folder):
    config = json.loads((folder / "config.json").read_text())
    tuned = {key: tensor + 1 for key, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tuned, folder / "tuned.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": "tuned.safetensors"}))
    assert torch.equal(loaded(folder).model.norm.weight, tuned["model.norm.weight"])
    assert list(known(folder)["weights"]) == ["model.safetensors", "tuned.safetensors"]


def test_tokenizers_that_the_folder_names(folder):
    first = known(folder)
    said = json.loads((folder / "tokenizer_config.json").read_text())
    shutil.copy(folder / "tokenizer.json", folder.parent / "tokenizer.1.json")
    (folder / "tokenizer_config.json").write_text(json.dumps(said | {"fast_tokenizer_files": ["../tokenizer.1.json"]}))
    refused(folder, "tokenizer.1.json, which is outside of the model's folder")
    (folder / "tokenizer_config.json").write_text(json.dumps(said | {"fast_tokenizer_files": 5}))
    refused(folder, "fast_tokenizer_files must be a list of file names")
    shutil.copy(folder / "tokenizer.json", folder / "tokenizer.4.json")
    (folder / "tokenizer_config.json").write_text(json.dumps(said | {"fast_tokenizer_files": ["tokenizer.4.json"]}))
    loaded(folder)
    assert {*known(folder)["files_sha256"]} - {*first["files_sha256"]} == {"tokenizer.4.json"}


def test_the_identity_of_ordinary_folders_is_what_it_was(folder):
    """What lies beside `tokenizer.json` is not read, and not asked for: runs that exist go on."""
    first = known(folder)
    assert {*first["files_sha256"]} == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    for name in ("vocab.json", "merges.txt", "added_tokens.json", "chat_template.jinja", "README.md"):
        (folder / name).write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate/generate.py").write_text("raise SystemExit(7)")
    assert known(folder) == known(folder, allow_pickle=True) == first
    (folder / "tokenizer.json").unlink()
    assert {"vocab.json", "merges.txt", "added_tokens.json"} < {*known(folder)["files_sha256"]}


def test_chat_templates_are_known_where_they_are_used(folder):
    assert sources.chat_identity(folder) is None
    (folder / "chat_template.jinja").write_text("a")
    first = sources.chat_identity(folder)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/x.jinja").write_text("b")
    second = sources.chat_identity(folder)
    (folder / "chat_template.jinja").write_text("c")
    assert len({None, first, second, sources.chat_identity(folder)}) == 4


@pytest.mark.parametrize("name", ["tf_model.h5", "flax_model.msgpack", "model.Q4.gguf", "consolidated.safetensors"])
def test_other_formats(folder, name):
    (folder / "model.safetensors").rename(folder / name)
    refused(folder, rf"has no weights \(model\.safetensors or model\.safetensors\.index\.json\); {name} is not read")
