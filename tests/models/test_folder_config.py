"""Of a model's configuration files its architecture and special tokens count, and nothing else has any effect."""

import json
from pathlib import Path

import pytest
import torch
from conftest import random_model
from tiny import save_rows, save_tiny, tiny_tokenizer
from transformers import LlamaConfig

import pred
from squeeze import InputError, SqueezeConfig, squeezed
from squeeze.generation.generate import generate, greedy, pad_left, stop_tokens
from squeeze.models import loading
from squeeze.models.folder_config import generation_config, model_config
from squeeze.models.sources import greedy_wishes
from squeeze.ranks import ALONE
from squeeze.runs.jobs import prepare
from squeeze.runs.spec import RunSpec

CPU, IDS = torch.device("cpu"), torch.arange(3, 60)
ROPE = {"rope_type": "linear", "factor": 2.0, "rope_theta": 777.0}

#: What a generation_config.json may hold, each with a value that would change or break a run.
WISHES = {
    "use_cache": False,
    "do_sample": True,
    "temperature": 0.01,
    "top_k": 1,
    "num_beams": 3,
    "num_return_sequences": 2,
    "return_dict_in_generate": True,
    "output_attentions": True,
    "output_hidden_states": True,
    "output_scores": True,
    "prompt_lookup_num_tokens": 3,
    "stop_strings": ["e"],
    "cache_implementation": "static",
    "cache_config": {"nbits": 4},
    "prefill_chunk_size": 4,
    "max_length": 5,
    "max_new_tokens": 1,
    "min_length": 50,
    "max_time": 0.001,
    "repetition_penalty": 50.0,
    "no_repeat_ngram_size": 1,
    "bad_words_ids": [[5], [9]],
    "suppress_tokens": list(range(3, 100)),
    "begin_suppress_tokens": list(range(3, 150)),
    "forced_bos_token_id": 7,
    "forced_eos_token_id": 7,
    "guidance_scale": 3.0,
    "penalty_alpha": 0.6,
    "dola_layers": "high",
    "watermarking_config": {"greenlist_ratio": 0.25},
    "assistant_early_exit": 2,
    "decoder_start_token_id": 4,
    "compile_config": {"fullgraph": True},
    "nonsense": {"a": [1]},
}

#: The same of a config.json.
LEFTOVERS = {
    "use_cache": False,
    "sliding_window": 3,
    "layer_types": ["sliding_attention"] * 5,
    "output_hidden_states": True,
    "output_attentions": True,
    "return_dict": False,
    "is_encoder_decoder": True,
    "attn_implementation": "flash_attention_2",
    "_attn_implementation": "flash_attention_2",
    "torch_dtype": "float16",
    "num_beams": 4,
    "temperature": 0.1,
    "pad_token_id": -1,
    "architectures": ["GPT2LMHeadModel"],
    "auto_map": {"AutoModelForCausalLM": "own.Own"},
    "get_text_config": 5,
    "rope_parameters_of_another": {"x": 1},
}


def change(folder, file, **keys):
    path = Path(folder, file)
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("plain") / "m")


@pytest.fixture
def folder(tmp_path):
    return save_tiny(tmp_path / "m")


def answers(folder, config=None, tokens=(IDS,), new=12):
    model, _ = loading.load(folder, CPU, torch.float32)
    if config is None:
        return [one.tolist() for one in generate(model, tokens, greedy(new), None)[0]]
    with squeezed(model, config) as run:
        return [one.tolist() for one in generate(model, tokens, greedy(new), run)[0]]


@pytest.fixture(scope="module")
def expected(plain):
    return answers(plain), answers(plain, SqueezeConfig("h2o", "0.3", "0.2"))


@pytest.mark.parametrize("key", WISHES)
def test_no_key_of_a_generation_config_has_an_effect(folder, expected, key):
    change(folder, "generation_config.json", **{key: WISHES[key]})
    assert (answers(folder), answers(folder, SqueezeConfig("h2o", "0.3", "0.2"))) == expected


@pytest.mark.parametrize("key", LEFTOVERS)
def test_no_leftover_key_of_a_config_has_an_effect(folder, expected, key):
    change(folder, "config.json", **{key: LEFTOVERS[key]})
    assert (answers(folder), answers(folder, SqueezeConfig("h2o", "0.3", "0.2"))) == expected


def test_what_describes_the_architecture_counts(folder):
    for legacy in ({"rope_parameters": ROPE}, {"rope_parameters": None, "rope_theta": 777.0, "rope_scaling": ROPE}):
        change(folder, "config.json", **legacy)
        assert {**model_config(folder).rope_parameters} == ROPE
    change(folder, "config.json", rms_norm_eps=0.5, tie_word_embeddings=True)
    made = model_config(folder)
    assert (made.rms_norm_eps, made.tie_word_embeddings, made.hidden_size) == (0.5, True, 48)
    assert isinstance(made, LlamaConfig)


def test_a_config_that_describes_no_model_is_a_sentence(folder):
    change(folder, "config.json", hidden_size=47)
    with pytest.raises(InputError, match=r"config\.json") as error:
        model_config(folder)
    assert "\n" not in str(error.value)


def test_a_window_counts_where_the_architecture_has_one(folder):
    change(folder, "config.json", sliding_window=16)
    assert not hasattr(model_config(folder), "sliding_window")
    change(folder, "config.json", model_type="mistral")
    assert model_config(folder).sliding_window == 16


def test_a_llama_with_a_leftover_window_keeps_and_sees_everything():
    """Also in the library, on a model that somebody else loaded."""
    model = random_model("llama", sliding_window=16)
    with torch.no_grad():
        want = model(IDS[None], use_cache=False).logits[:, -1]
    with squeezed(model, SqueezeConfig("h2o", budgets=[1000] * 5)) as run:
        settings = {"max_new_tokens": 1, "return_dict_in_generate": True, "output_logits": True, "do_sample": False}
        got = model.generate(IDS[None], **settings).logits[0]
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert run.budgets.tolist() == [[58] * 5]


@pytest.mark.parametrize(
    ("generation", "config", "of_tokenizer", "expected"),
    [
        ({"eos_token_id": [5, 6]}, {"eos_token_id": 7}, 8, [5, 6]),
        ({"eos_token_id": 5}, {"eos_token_id": 7}, 8, [5]),
        ({"eos_token_id": None}, {"eos_token_id": 7}, 8, [7]),
        (None, {"eos_token_id": [7, 9]}, 8, [7, 9]),
        (None, {"eos_token_id": None}, 8, [8]),
        ({"eos_token_id": [-1, 999, 5]}, {}, 8, [5]),
        ({"eos_token_id": -1}, {"eos_token_id": 199}, None, None),
    ],
)
def test_the_end_of_a_text(folder, generation, config, of_tokenizer, expected):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None if of_tokenizer is None else tokenizer.convert_ids_to_tokens(of_tokenizer)
    if generation is None:
        (folder / "generation_config.json").unlink()
    else:
        change(folder, "generation_config.json", **generation)
    change(folder, "config.json", **config)
    assert generation_config(folder, 199, tokenizer).eos_token_id == expected


@pytest.mark.parametrize(("pad", "expected"), [(4, 4), (-1, 2), (199, 2), (None, 2)])
def test_padding_is_any_token_that_there_is(folder, pad, expected):
    change(folder, "generation_config.json", pad_token_id=pad)
    change(folder, "config.json", pad_token_id=pad)
    assert generation_config(folder, 199).pad_token_id == expected
    assert answers(folder, None, (IDS, IDS[:20])) == answers(folder, None, (IDS,)) + answers(folder, None, (IDS[:20],))


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"eos_token_id": "x"}', '{"pad_token_id": [1]}', '{"eos_token_id": 1.5}']
)
def test_a_generation_config_that_is_none_is_a_sentence(folder, content):
    (folder / "generation_config.json").write_text(content)
    with pytest.raises(InputError, match=r"generation_config\.json") as error:
        loading.load(folder, CPU, torch.float32)
    assert "\n" not in str(error.value) and "cannot be loaded" not in str(error.value)


def test_ids_that_a_model_does_not_have_end_nothing():
    model = random_model("llama")
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = [-1, 5, 400], -1
    assert stop_tokens(model, {}).tolist() == [5]
    assert pad_left(model, [IDS, IDS[:2]])[0][1, 0] == 5
    model.generation_config.eos_token_id = None
    assert stop_tokens(model, {}).tolist() == [] and pad_left(model, [IDS, IDS[:2]])[0][1, 0] == 0


def test_a_tokenizer_that_is_another_models_is_a_sentence():
    model = random_model("llama")
    with pytest.raises(InputError, match="gives token 199, and the model's tokens are 0 to 198"):
        pad_left(model, [IDS, torch.tensor([5, 199])])
    with pytest.raises(InputError, match="makes no tokens of a prompt"):
        pad_left(model, [IDS, torch.tensor([], dtype=torch.long)])


def test_a_checkpoint_saved_after_training_predicts_like_any(tmp_path, monkeypatch):
    """`use_cache: false` in both files, and no end token in the tokenizer: full and squeezed, by pred.py."""
    monkeypatch.chdir(tmp_path)
    save_rows(tmp_path / "data", count=2)
    for name in ("plain", "trained"):
        save_tiny(tmp_path / name)
    for file in ("config.json", "generation_config.json"):
        change("trained", file, use_cache=False)
    for squeeze in ([], ["--enable_squeeze", "--ini_size", "0.3", "--KV_class3", "0.1"]):
        found = []
        for name in ("plain", "trained"):
            pred.main(["--model", name, "--data_dir", "data", "--dtype", "float32", *squeeze])
            place = "0.3/10" if squeeze else "full"
            found.append(Path(f"pred_Long/{name}/{place}/samsum.jsonl").read_text())
        assert found[0] == found[1]
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "endless")
    random_model("llama").save_pretrained(tmp_path / "endless")
    pred.main(["--model", "endless", "--data_dir", "data", "--dtype", "float32"])
    assert Path("pred_Long/endless/full/samsum.jsonl").read_text().count("\n") == 2


def test_a_run_that_an_earlier_version_began_with_other_answers_does_not_go_on(folder):
    """What the file asks for beside special tokens had an effect then, and is a setting now."""
    assert greedy_wishes(folder) == []
    change(folder, "generation_config.json", repetition_penalty=5.0, do_sample=True, min_length=0, temperature=0.2)
    assert greedy_wishes(folder) == ["repetition_penalty"]
    save_rows(folder.parent / "data", count=1)
    job = prepare(RunSpec(model=str(folder), data_dir=str(folder.parent / "data")), ALONE)
    assert job.settings["without_effect"] == ["repetition_penalty"]
