"""Completions: their text, log-probabilities and ends, against a slow reference on a tiny and on the real model."""

import pytest
import torch
from conftest import random_model
from tiny import TEXT, tiny_tokenizer

from squeeze import SqueezeConfig, squeezed
from squeeze.benchmarks.completions import complete, prompt_logprobs, published
from squeeze.benchmarks.requests import Decoding
from squeeze.errors import InputError

PROMPTS = [TEXT, TEXT * 3, "Bob: ok"]


@pytest.fixture(scope="module")
def tiny():
    return random_model("llama", eos_token_id=150), tiny_tokenizer()


def run_all(tiny, decoding, config=None, texts=PROMPTS, seed=42):
    model, tokenizer = tiny
    prompts = [tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0] for text in texts]
    if config is None:
        return complete(model, tokenizer, prompts, texts, decoding, None, seed)
    with squeezed(model, config) as run:
        return complete(model, tokenizer, prompts, texts, decoding, run, seed)


def greedy(tiny, text, count):
    """New tokens and the log-probability of each, one forward pass over everything at a time."""
    model, tokenizer = tiny
    tokens = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    new, logprobs = [], []
    for _ in range(count):
        with torch.no_grad():
            last = model(tokens).logits[0, -1].log_softmax(dim=-1)
        new.append(int(last.argmax()))
        logprobs.append(float(last.max()))
        tokens = torch.cat([tokens, torch.tensor([new[-1:]])], dim=1)
    return new, logprobs


def test_greedy_completions_are_the_models_and_so_are_their_log_probabilities(tiny):
    found, stats = run_all(tiny, Decoding(max_tokens=12, temperature=0, logprobs=2))
    for text, [completion], measured in zip(PROMPTS, found, stats, strict=True):
        new, logprobs = greedy(tiny, text, 12)
        assert completion.text == tiny[1].decode(new, skip_special_tokens=True)
        assert "".join(completion.tokens) == completion.text
        assert completion.token_logprobs == pytest.approx(logprobs, abs=1e-4)
        assert completion.finish_reason == "length"
        assert measured.new_tokens == len(completion.tokens) == 12
        for step, top in enumerate(completion.top_logprobs):
            assert max(top.values()) == pytest.approx(logprobs[step], abs=1e-4)
            assert top[tiny[1].decode([new[step]])] == max(top.values())


def test_what_is_sampled_is_scored_by_the_model_itself(tiny):
    model, tokenizer = tiny
    found, _ = run_all(tiny, Decoding(max_tokens=8, temperature=1.5, top_p=0.9, n=2))
    texts = {completion.text for choices in found for completion in choices}
    assert len(texts) == 6
    for text, choices in zip(PROMPTS, found, strict=True):
        prompt = tokenizer(text, add_special_tokens=False).input_ids
        for completion in choices:
            # The tiny tokenizer's tokens can be read back from their texts as long as none is empty.
            ids = [tokenizer.encode(piece, add_special_tokens=False) for piece in completion.tokens]
            if any(len(one) != 1 for one in ids):
                continue
            tokens = torch.tensor([prompt + [one[0] for one in ids]])
            with torch.no_grad():
                logprobs = model(tokens).logits[0].log_softmax(dim=-1)
            expected = [float(logprobs[len(prompt) + step - 1, one[0]]) for step, one in enumerate(ids)]
            assert completion.token_logprobs == pytest.approx(expected, abs=1e-4)


def test_a_prompt_under_several_budgets_is_completed_several_times_under_each(tiny):
    model, tokenizer = tiny
    prompt = tokenizer(PROMPTS[1], add_special_tokens=False, return_tensors="pt").input_ids[0]
    configs = [SqueezeConfig("h2o", size, "0.1") for size in ("0.2", "0.6")]
    decoding = Decoding(max_tokens=10, temperature=0.8, n=2)
    with squeezed(model, configs[0]) as run:
        run.use(*configs)
        together, stats = complete(model, tokenizer, [prompt] * 2, [PROMPTS[1]] * 2, decoding, run, 1)
        for config, found, measured in zip(configs, together, stats, strict=True):
            run.use(config)
            [alone], [expected] = complete(model, tokenizer, [prompt], PROMPTS[1:2], decoding, run, 1)
            assert [one.text for one in found] == [one.text for one in alone] and len(found) == 2
            assert measured.kv_bytes == expected.kv_bytes and measured.budgets == expected.budgets


def test_samples_depend_on_seed_prompt_and_number_alone(tiny):
    decoding = Decoding(max_tokens=10, temperature=0.8, n=2)
    together, _ = run_all(tiny, decoding)
    for text, choices in zip(PROMPTS, together, strict=True):
        [alone], _ = run_all(tiny, decoding, texts=[text])
        assert [one.text for one in alone] == [one.text for one in choices]
        assert choices[0].text != choices[1].text
    other, _ = run_all(tiny, decoding, seed=1)
    assert [one[0].text for one in other] != [one[0].text for one in together]
    random, _ = run_all(tiny, Decoding(max_tokens=10, temperature=0.8, n=2, random="1"))
    assert [one[0].text for one in random] != [one[0].text for one in together]


@pytest.mark.parametrize("config", [None, SqueezeConfig(algorithm="streaming", ini_size="0.5", kv_class3="0.2")])
def test_a_stop_string_is_cut_exactly_and_only_its_own_row_ends(tiny, config):
    free, _ = run_all(tiny, Decoding(max_tokens=16, temperature=0), config)
    texts = [choices[0].text for choices in free]
    stop = texts[1][5:8]  # straddles tokens, which are a character or two
    assert len(stop) == 3
    found, stats = run_all(tiny, Decoding(max_tokens=16, temperature=0, stop=("never there", stop)), config)
    for text, [completion], [whole], measured in zip(texts, found, free, stats, strict=True):
        assert completion.text == text.split(stop)[0]
        assert completion.finish_reason == ("stop" if stop in text else "length")
        assert "".join(completion.tokens) == completion.text
        kept = len(completion.tokens)
        assert completion.token_logprobs == pytest.approx(whole.token_logprobs[:kept], abs=1e-4)
        assert len(completion.top_logprobs) == kept
        assert (measured.new_tokens < 16) == (stop in text and text.index(stop) + 3 < len(text) - 2)
    assert found[1][0].finish_reason == "stop"


def test_the_models_own_end_is_no_part_of_the_text(tiny):
    new, _ = greedy(tiny, TEXT, 6)
    model = random_model("llama", eos_token_id=new[3])
    found, _ = run_all((model, tiny[1]), Decoding(max_tokens=6, temperature=0, stop=("never",)), texts=[TEXT])
    [[completion]] = found
    end = new.index(new[3])
    assert completion.finish_reason == "endoftext"
    assert completion.text == tiny[1].decode(new[:end])
    assert len(completion.token_logprobs) == end


def test_the_published_form(tiny):
    [[completion]], _ = run_all(tiny, Decoding(max_tokens=5, temperature=0), texts=[TEXT])
    choice = published(completion)
    assert set(choice) == {"text", "logprobs", "finish_reason"}
    assert set(choice["logprobs"]) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    for token, offset in zip(choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"], strict=True):
        assert choice["text"][offset:].startswith(token)


def test_log_probabilities_of_a_prompt(tiny):
    model, tokenizer = tiny
    tokens = tokenizer(TEXT, return_tensors="pt").input_ids[0]
    with torch.no_grad():
        logprobs = model(tokens[None]).logits[0].log_softmax(dim=-1)
    expected = [0.0] + [float(logprobs[at, token]) for at, token in enumerate(tokens[1:].tolist())]
    for block in (3, 512):
        assert prompt_logprobs(model, tokens, block) == pytest.approx(expected, abs=1e-4)
    assert prompt_logprobs(model, tokens[:1]) == [0.0]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_tokens": 0}, "max_tokens must be a whole number, 1 or more, got 0"),
        ({"max_tokens": 5, "n": 0}, "n must be a whole number, 1 or more, got 0"),
        ({"max_tokens": 5, "temperature": -1}, "temperature must be 0 or more, got -1"),
        ({"max_tokens": 5, "top_p": 0}, r"top_p must be in \(0, 1\], got 0"),
        ({"max_tokens": 5, "stop": ("",)}, "stop must be texts that are not empty"),
    ],
)
def test_settings_out_of_range(settings, said):
    with pytest.raises(InputError, match=said):
        Decoding(**settings)


def test_the_real_model_goes_on_where_its_prompt_ends(embedded, tokenizer):
    """A question that the embedded model answers well, with half of the cache."""
    text = "Question: What is the capital of France?\nAnswer: Paris.\n\n" * 6
    text += "Question: What is the capital of Italy?\nAnswer:"
    model = embedded("llama")
    config = SqueezeConfig(algorithm="streaming", ini_size="0.5", kv_class3="0.3", allocation="squeeze-log")
    [[full]], _ = run_all((model, tokenizer), Decoding(20, temperature=0, stop=("\n\n",)), None, [text])
    [[half]], _ = run_all((model, tokenizer), Decoding(20, temperature=0, stop=("\n\n",)), config, [text])
    assert full.text.startswith(" Rome")
    assert half.text.startswith(" Rome")
    assert full.finish_reason == "stop"
