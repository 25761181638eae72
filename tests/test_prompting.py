"""Truncation, chat formats, stop rules and answers, compared with LongBench's own runner."""

import pytest
from tiny import TEXT, tiny_tokenizer

from squeeze import InputError
from squeeze.prompting import check_chat_template, clean, encode_prompt, generation_settings


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
        ("Llama-2-13b-chat-hf", "Dialogue {x}"),
    ],
)
def test_chat_format_by_model_and_data_set(tokenizer, model, text):
    def shown(dataset):
        return tokenizer.decode(encode_prompt(tokenizer, dataset, "Dialogue {x}", 100, model))

    assert shown("gov_report") == text
    for dataset in ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"):
        assert shown(dataset) == "Dialogue {x}"


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
    ("model", "answer", "kept"),
    [
        ("xgen-7b-8k", "\nAssistant: yes \n", " yes"),
        ("internlm-7b-8k", "yes<eoa>\nno", "yes"),
        ("llama2-7b-chat-4k", " yes<eoa> ", " yes<eoa> "),
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
