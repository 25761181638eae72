"""The two HELM clients, asked as HELM asks them: with requests, from several threads, through its cache."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helm.common.cache import BlackHoleCacheConfig, SqliteCacheConfig
from helm.common.request import Request
from helm.proxy.retry import NonRetriableException
from tiny import TEXT, save_tiny

from squeeze import InputError
from squeeze.benchmarks.completions import prompt_logprobs
from squeeze.helm import client as helm_client
from squeeze.helm.client import ReplayClient, SqueezeClient
from squeeze.models import loading

SIZES = {"ini_size": 0.3, "KV_class3": "0.126"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=1024)


@pytest.fixture(autouse=True)
def nothing_loaded(monkeypatch):
    monkeypatch.setattr(helm_client, "_LOADED", {})


def client(tiny, cache=None, **settings):
    return SqueezeClient(cache or BlackHoleCacheConfig(), str(tiny), device="cpu", dtype="float32", **settings)


def ask(prompt=TEXT, **settings):
    start = {"temperature": 0, "max_tokens": 10, "stop_sequences": ["###"], "top_k_per_token": 1}
    return Request(model="squeeze/tiny", model_deployment="squeeze/tiny", prompt=prompt, **(start | settings))


def test_threads_and_clients_share_one_model(tiny, monkeypatch):
    loads, load = [], loading.load

    def count(*given):
        loads.append(given)
        return load(*given)

    monkeypatch.setattr(loading, "load", count)
    prompts = [f"{number}. {TEXT}" for number in range(6)]
    clients = [client(tiny), client(tiny, **SIZES)]
    expected = [clients[number % 2].make_request(ask(prompt)) for number, prompt in enumerate(prompts)]
    helm_client._LOADED.clear()
    loads.clear()
    with ThreadPoolExecutor(6) as pool:
        jobs = [pool.submit(clients[number % 2].make_request, ask(prompt)) for number, prompt in enumerate(prompts)]
        found = [job.result() for job in jobs]
    assert len(loads) == 1
    assert [one.completions[0].text for one in found] == [one.completions[0].text for one in expected]
    full = [clients[0].make_request(ask(prompt)).completions[0].text for prompt in prompts]
    assert [full[at] == one.completions[0].text for at, one in enumerate(found)] == [True, False] * 3


def test_a_completion_is_the_models(tiny):
    found = client(tiny).make_request(ask(top_k_per_token=2, num_completions=2, temperature=0.9))
    assert found.success and not found.cached and found.request_time > 0
    assert len({one.text for one in found.completions}) == 2
    for one in found.completions:
        assert "".join(token.text for token in one.tokens) == one.text
        assert one.logprob == pytest.approx(sum(token.logprob for token in one.tokens))
        assert one.finish_reason == {"reason": "length"}
    model, tokenizer = loading.load(tiny, torch.device("cpu"), torch.float32)
    tokens = tokenizer(TEXT, add_special_tokens=False, return_tensors="pt").input_ids
    new = model.generate(tokens, max_new_tokens=10, do_sample=False)[0, tokens.shape[1] :]
    [greedy] = client(tiny).make_request(ask()).completions
    assert greedy.text == tokenizer.decode(new, skip_special_tokens=True)


@pytest.mark.parametrize("sizes", [{}, SIZES])
@pytest.mark.parametrize("count", [0, 3])
def test_an_echo_scores_the_prompt(tiny, count, sizes):
    [found] = client(tiny, **sizes).make_request(ask(echo_prompt=True, max_tokens=count)).completions
    model, tokenizer = loading.load(tiny, torch.device("cpu"), torch.float32)
    tokens = tokenizer(TEXT, add_special_tokens=False, return_tensors="pt").input_ids[0]
    assert len(found.tokens) == len(tokens) + count
    assert found.text.startswith(TEXT)
    assert (found.text == TEXT) == (count == 0)
    scored = [token.logprob for token in found.tokens[: len(tokens)]]
    assert scored == pytest.approx(prompt_logprobs(model, tokens), abs=1e-4)


def test_no_tokens_and_no_echo(tiny):
    [found] = client(tiny).make_request(ask(max_tokens=0)).completions
    assert (found.text, found.tokens) == ("", [])


def test_helms_cache_knows_budgets_apart(tiny, tmp_path):
    cache = SqliteCacheConfig(str(tmp_path / "cache.sqlite"))
    budgets = [{}, SIZES, SIZES | {"ini_size": 0.4}, SIZES | {"KV_class3": 0.2}, SIZES | {"algorithm": "h2o"}]
    budgets += [SIZES | {"allocation": "squeeze-log"}, SIZES | {"start_size": 2}, {"seed": 1}]
    for settings in budgets:
        assert not client(tiny, cache, **settings).make_request(ask()).cached, settings
    for settings in budgets:
        assert client(tiny, cache, **settings).make_request(ask()).cached, settings
    for other in ({"temperature": 0.5}, {"max_tokens": 9}, {"random": "1"}, {"echo_prompt": True}, {"max_tokens": 0}):
        assert not client(tiny, cache).make_request(ask(**other)).cached, other
    # What was never asked of a model is answered without loading one.
    helm_client._LOADED.clear()
    assert client(tiny, cache, **SIZES).make_request(ask()).completions[0].text
    assert not helm_client._LOADED


def test_chats_need_a_template(tiny, tmp_path, monkeypatch):
    messages = [{"role": "user", "content": TEXT}]
    with pytest.raises(NonRetriableException, match="the request is a chat: set chat to true"):
        client(tiny).make_request(ask("", messages=messages))
    with pytest.raises(NonRetriableException, match="has no chat template: set chat to false"):
        client(tiny, chat=True).make_request(ask("", messages=messages))
    folder = save_tiny(tmp_path / "chatty")
    template = (
        "{% for message in messages %}[{{ message.content }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    (folder / "chat_template.jinja").write_text(template)
    text = {"max_tokens": 0, "echo_prompt": True}
    for request in (ask("", messages=messages, **text), ask(**text)):
        [found] = client(folder, chat=True).make_request(request).completions
        assert found.text == f"[{TEXT}]>"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"embedding": True}, "embeddings, images and sounds are not supported"),
        ({"presence_penalty": 0.5}, "penalties and response formats are not supported"),
        ({"frequency_penalty": 0.5}, "penalties and response formats are not supported"),
        ({"prompt": TEXT * 40}, "more than the model's 1024 positions"),
        ({"top_p": 2}, r"top_p must be in \(0, 1\]"),
        ({"stop_sequences": [""]}, "stop must be texts that are not empty"),
    ],
)
def test_helm_does_not_try_again_what_cannot_work(tiny, settings, said):
    with pytest.raises(NonRetriableException, match=said):
        client(tiny).make_request(ask(**settings))


def test_a_crash_is_not_tried_again_either(tiny, monkeypatch):
    def crash(*given):
        raise RuntimeError("the model is broken")

    monkeypatch.setattr(loading, "load", crash)
    with pytest.raises(NonRetriableException, match="RuntimeError: the model is broken"):
        client(tiny).make_request(ask())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"ini_size": 0.4}, "KV_class3"),
        (SIZES | {"algorithm": "h20"}, "algorithm must be one of sliding_window, streaming, h2o, .*, got h20"),
        (SIZES | {"ini_size": "1e-100000000"}, "ini_size must be a number"),
        (SIZES | {"KV_class3": float("nan")}, "KV_class3 must be a number"),
        (SIZES | {"start_size": 2**63}, "start_size must be a whole number of tokens, 0 or more and at most"),
        (SIZES | {"seed": 2**64}, "seed must be a whole number, 0 or more and at most"),
        ({"seed": "42"}, "seed must be a whole number"),
        (SIZES | {"KV_class3": 0.5}, r"KV_class3 must be in \(0, ini_size = 0.3\]"),
        ({"dtype": "float8"}, "dtype must be one of auto, float32, bfloat16, float16, got float8"),
        ({"device": "gpu"}, "device must be cpu, cuda or cuda:N, got gpu"),
    ],
)
def test_settings_that_are_wrong_are_a_sentence(tiny, settings, said):
    with pytest.raises(InputError, match=said):
        SqueezeClient(BlackHoleCacheConfig(), str(tiny), **({"device": "cpu"} | settings))


ASKED = {"prompt": "Hi", "max_tokens": 10, "temperature": 0.3, "stop": ["###"], "n": 2, "logprobs": 1}
CHOICES = [
    {
        "text": text,
        "logprobs": {
            "tokens": list(text),
            "token_logprobs": [-0.5] * len(text),
            "top_logprobs": [{one: -0.5} for one in text],
            "text_offset": list(range(len(text))),
        },
        "finish_reason": reason,
    }
    for text, reason in (("Hello", "stop"), ("Ho", "length"))
]


@pytest.fixture
def predictions(tmp_path):
    """A file of two predictions."""
    result = {"choices": CHOICES, "request_time": {"batch_time": 6.0, "batch_size": 3}}
    lines = [{"request": ASKED | {"prompt": prompt}, "result": result} for prompt in ("Hi", "Bye")]
    (tmp_path / "xsum.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "xsum.jsonl"


def replay(**change):
    return ask(**({"prompt": "Hi", "temperature": 0.3, "num_completions": 2} | change))


def test_a_replay_is_what_was_predicted(predictions):
    found = ReplayClient(str(predictions)).make_request(replay())
    assert (found.success, found.cached) == (True, False)
    assert (found.request_time, found.batch_request_time, found.batch_size) == (2.0, 6.0, 3)
    assert [one.text for one in found.completions] == ["Hello", "Ho"]
    assert [one.logprob for one in found.completions] == [-2.5, -1.0]
    assert [one.finish_reason for one in found.completions] == [{"reason": "stop"}, {"reason": "length"}]
    assert [token.text for token in found.completions[1].tokens] == ["H", "o"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompt": "Good\nmorning"}, "has no prediction for the prompt that ends in 'Good morning'"),
        ({"prompt": ""}, "has no prediction"),
        ({"temperature": 0.5}, r"with temperature 0.3 \(asked for 0.5\)"),
        ({"max_tokens": 5}, r"with max_tokens 10 \(asked for 5\)"),
        ({"stop_sequences": ["\n"]}, "with stop"),
        ({"num_completions": 1}, r"with n 2 \(asked for 1\)"),
        ({"random": "1"}, r"with random None \(asked for 1\)"),
    ],
)
def test_a_replay_never_makes_anything_up(predictions, change, said):
    with pytest.raises(NonRetriableException, match=said):
        ReplayClient(str(predictions)).make_request(replay(**change))


@pytest.mark.parametrize("content", ["{}\n", "[]\n", '{"request": {"prompt": "Hi"}, "result": {}}\n', "no json\n"])
def test_predictions_that_are_none(tmp_path, content):
    (tmp_path / "xsum.jsonl").write_text(content)
    with pytest.raises(InputError, match=r"xsum\.jsonl line 1"):
        ReplayClient(str(tmp_path / "xsum.jsonl"))


def test_predictions_that_are_nowhere(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.jsonl"):
        ReplayClient(str(tmp_path / "nowhere.jsonl"))
