"""Truncation, chat formats, stop rules and answers, compared with LongBench's own runner."""

import pytest
from tiny import TEXT, tiny_tokenizer

from squeeze import InputError
from squeeze.benchmarks.longbench.prompts import (
    OWN_TEMPLATE,
    chat_format,
    chat_note,
    chat_settings,
    check_chat_template,
    clean,
    encode_prompt,
    family,
    generation_settings,
    in_template,
)


def longbench_encode(tokenizer, prompt, max_length):
    """The lines of LongBench's `pred.py` that cut a prompt."""
    tokenized_prompt = tokenizer(prompt, truncation=False, return_tensors="pt").input_ids[0]
    if len(tokenized_prompt) > max_length:
        half = int(max_length / 2)
        prompt = tokenizer.decode(tokenized_prompt[:half], skip_special_tokens=True) + tokenizer.decode(
            tokenized_prompt[-half:], skip_special_tokens=True
        )
    return tokenizer(prompt, truncation=False, return_tensors="pt").input_ids


@pytest.mark.parametrize("max_length", [1000, 40, 41, 8])
def test_long_prompts_keep_their_halves(max_length):
    tokenizer = tiny_tokenizer()
    tokens = encode_prompt(tokenizer, "samsum", TEXT * 3, max_length, "M")
    assert tokens.tolist() == longbench_encode(tokenizer, TEXT * 3, max_length)[0].tolist()


def test_a_real_tokenizer_cuts_as_longbench_does(tokenizer):
    prompt = "Überlänge: " + "naïve 中文 😀 1234 don't\r\n\t" * 30
    for max_length in (50, 51, 2000):
        expected = longbench_encode(tokenizer, prompt, max_length)
        assert encode_prompt(tokenizer, "samsum", prompt, max_length, "M").tolist() == expected[0].tolist()


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ("llama2-7b-chat-4k", "[INST]Dialogue {x}[/INST]"),
        ("llama2-7b-32k", "[INST]Dialogue {x}[/INST]"),
        (
            "vicuna-v1.5-7b-16k",
            "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
            "detailed, and polite answers to the user's questions. USER: Dialogue {x} ASSISTANT:",
        ),
        (
            "xgen-7b-8k",
            "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
            "detailed, and polite answers to the human's questions.\n\n ### Human: Dialogue {x}\n###",
        ),
        ("internlm-7b-8k", "<|User|>:Dialogue {x}<eoh>\n<|Bot|>:"),
        ("Mistral", "Dialogue {x}"),
        ("Llama-2-13b-chat-hf", "[INST]Dialogue {x}[/INST]"),
        ("Llama-2-13b-hf", "Dialogue {x}"),
    ],
)
def test_chat_format_by_model_and_data_set(tokenizer, model, text):
    def shown(dataset):
        return tokenizer.decode(encode_prompt(tokenizer, dataset, "Dialogue {x}", 100, model))

    assert shown("gov_report") == text
    for dataset in ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"):
        assert shown(dataset) == "Dialogue {x}"


@pytest.mark.parametrize(
    ("names", "known"),
    [
        ("Llama-2-7b-chat-hf llama_2_13b_chat Llama.2.7b.chat LLaMA2-70B-Chat Llama2Chat llama-v2-7b-chat", "llama2"),
        ("LLAMA-2-13B-CHAT-GPTQ LLaMA-2-7B-32K-Instruct Meta-Llama-2-7b-chat", "llama2"),
        ("Vicuna-7B-v1.5 VICUNA_13b vicuna-7b LongChat-7b-v1.5-32k", "longchat"),
        ("XGen-7B-8K-Inst XGEN_7b_8k_inst", "xgen"),
        ("InternLM-Chat-7B InternLM-20B-chat InternLM_7b_chat", "internlm"),
        # LongBench's own rule, base models and all: the prompts of the published commands stay what they are.
        ("llama2-7b-32k llama2-13B llama2-70B llama2-7b-hf myllama2x", "llama2"),
        ("xgen-7b-8k-base", "xgen"),
        ("internlm-7b internlm2-chat-7b", "internlm"),
        # Base models, and models of other versions and sizes, which have other formats.
        ("Llama-2-7b-hf LLaMA-2-7B-32K Llama-2 LLaMA2 XGen-7B-8K-Base InternLM-7B", None),
        ("Llama-2x-7b-chat Llama-20b-chat Llama-2b-chat Llama-2.5-7b-chat Sheared-LLaMA-2.7B-chat", None),
        (
            "Meta-Llama-3-8B-Instruct Llama-3.2-1B-Instruct Llama3-8B-Chat InternLM2-Chat-7B InternLM3-8B-instruct",
            None,
        ),
        ("Mistral-7B-Instruct-v0.2 SmolLM2-135M-Instruct TinyLlama-1.1B-Chat-v1.0 CodeLlama-7b-Instruct-hf", None),
    ],
)
def test_models_are_known_as_people_write_them(names, known):
    for name in names.split():
        found = family(name)
        assert (found and found.names[0]) == known, name


def test_a_format_is_a_setting_only_where_longbench_would_not_use_it():
    inst = "[INST]{prompt}[/INST]"
    assert chat_format("qasper", "Llama-2-7b-chat-hf", False) == inst
    assert chat_settings("qasper", "Llama-2-7b-chat-hf", False) == {"chat_format": inst}
    assert chat_format("qasper", "llama2-7b-32k", False) == inst
    assert chat_settings("qasper", "llama2-7b-32k", False) == {}, "runs that are there go on"
    assert chat_format("samsum", "Llama-2-7b-chat-hf", False) is None
    assert chat_settings("samsum", "Llama-2-7b-chat-hf", False) == {}
    assert chat_format("qasper", "Llama-2-7b-chat-hf", True) == OWN_TEMPLATE
    assert chat_settings("qasper", "Llama-2-7b-chat-hf", True) == {}, "--chat is a setting of its own"
    assert chat_format("qasper", "Mistral", False) is None


def test_what_is_said_of_chat_formats(tmp_path):
    def said(name, datasets=("samsum", "qasper", "lcc"), chat=False):
        return chat_note(datasets, name, tmp_path, chat)

    assert said("Vicuna-7B-v1.5").startswith(
        "prompts of qasper are put into LongBench's chat format for longchat and "
    )
    assert said("llama2-7b-32k").endswith(": [INST]{prompt}[/INST]")
    assert "\n" not in said("xgen-7b-8k-inst")
    assert said("Llama-2-7b-chat-hf", ["samsum", "lcc"]) is None, "LongBench gives these to chat models as they are"
    assert said("Llama-2-7b-chat-hf", chat=True) is None, "it was asked for"
    assert said("Mistral") is None and said("gemma-7b-item") is None
    for name in ("Mistral-7B-Instruct-v0.2", "TinyLlama-1.1B-Chat", "gemma-2b-it"):
        assert said(name).startswith(f"{name} looks like a chat model, and prompts of qasper are put to it without")
        assert said(name).endswith("its tokenizer has no chat template")
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": null}')
    assert said("Mistral") is None
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    assert said("Mistral").endswith("--chat uses its tokenizer's own chat template")
    assert said("Mistral", ["samsum"]) is None
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(InputError, match=r"tokenizer_config\.json"):
        said("Mistral")
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert "--chat" in said("Mistral")


def test_the_tokenizers_own_chat_template(tokenizer):
    tokens = encode_prompt(tokenizer, "hotpotqa", "Dialogue", 100, "SmolLM2-135M", chat=True)
    message = [{"role": "user", "content": "Dialogue"}]
    expected = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert tokens.tolist() == expected
    assert tokenizer.decode(tokens).endswith("Dialogue<|im_end|>\n<|im_start|>assistant\n")
    plain = encode_prompt(tokenizer, "samsum", "Dialogue", 100, "SmolLM2-135M", chat=True)
    assert tokenizer.decode(plain) == "Dialogue"
    check_chat_template(tokenizer, "SmolLM2-135M")
    with pytest.raises(InputError, match="M has no chat template of its own: leave --chat out"):
        check_chat_template(tiny_tokenizer(), "M")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ messages[0].content }}{% if enable_thinking is not false %}<think>{% endif %}", "Ann"),  # as Qwen3's
        ("{{ messages[0].content }}<|start|>assistant", "Ann<|start|>assistant<|channel|>final<|message|>"),  # gpt-oss
        ("<|start|>assistant{{ messages[0].content }}", "<|start|>assistantAnn"),
    ],
)
def test_no_thinking_aloud(template, expected):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    assert in_template(tokenizer, [{"role": "user", "content": "Ann"}]) == expected


@pytest.mark.parametrize(
    ("model", "answer", "kept"),
    [
        ("xgen-7b-8k", "\nAssistant: yes \n", " yes"),
        ("internlm-7b-8k", "yes<eoa>\nno", "yes"),
        ("llama2-7b-chat-4k", " yes<eoa> ", " yes<eoa> "),
        ("InternLM-Chat-7B", "yes<eoa>\nno", "yes"),
        ("Mistral", " Assistant: yes ", " Assistant: yes "),
    ],
)
def test_what_is_kept_of_an_answer(model, answer, kept):
    assert clean(answer, model) == kept


def test_stop_rules(tokenizer):
    settings = generation_settings(tokenizer, "samsum")
    assert settings.pop("eos_token_id") == [tokenizer.eos_token_id, tokenizer.encode("\n")[-1]]
    assert settings == {"max_new_tokens": 128, "num_beams": 1, "do_sample": False, "min_new_tokens": 1}
    assert generation_settings(tokenizer, "trec") == {"max_new_tokens": 64, "num_beams": 1, "do_sample": False}


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1/0 }}",
        "{% for %}",
        "{{ messages[5].x.y }}",
        "{{ raise_exception('no\nway') }}",
        "{% for i in range(10**9) %}a{% endfor %}",
        "{{ messages[0].content.__class__.__mro__ }}",
        {"rag": "x"},
    ],
)
def test_a_chat_template_that_fails_is_a_sentence(template):
    """It is a program that came with the model."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(InputError, match="chat template cannot be used") as error:
        check_chat_template(tokenizer, "tiny")
    assert "\n" not in str(error.value)
