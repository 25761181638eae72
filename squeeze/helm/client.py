"""HELM clients: `ReplayClient` answers from a file of predictions, `SqueezeClient` runs a squeezed model.

HELM makes them from `model_deployments.yaml`, where `client_spec.class_name` names the class and `args` its arguments;
`squeeze.helm_env` and `script/helm.sh` write that file. HELM calls clients from several threads, and can make two of
one deployment at once.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from helm.clients.client import CachingClient, Client
from helm.common.cache import CacheConfig
from helm.common.hierarchical_logger import hlog
from helm.common.request import GeneratedOutput, Request, RequestResult, Token, wrap_request_time
from helm.proxy.retry import NonRetriableException

from squeeze.benchmarks.records import AnsweredRequest, Completions
from squeeze.benchmarks.requests import Decoding, key, parse
from squeeze.errors import InputError
from squeeze.numbers import MOST_SEED, whole_number
from squeeze.storage.files import read_jsonl


class ReplayClient(Client):
    """Answers HELM's requests from `pred.py`'s predictions, by prompt and decoding settings.

    Args:
        predictions: the file, such as `pred_xsum/Mistral/0.4/25/xsum.jsonl`.
    Raises:
        InputError: it is not such a file.
    """

    def __init__(self, predictions: str) -> None:
        self.predictions = predictions
        self._results: dict[str, Completions] = {}
        self._settings: dict[str, Decoding] = {}
        for number, line in read_jsonl(Path(predictions), AnsweredRequest):
            request = parse(line["request"], f"{predictions} line {number}")
            for index, choice in enumerate(line["result"]["choices"]):
                if len(choice["logprobs"]["tokens"]) != len(choice["logprobs"]["token_logprobs"]):
                    where = f"{predictions} line {number}: result.choices[{index}].logprobs"
                    raise InputError(f"{where} does not have a log-probability for each token")
            self._results[key(request.prompt, request.decoding)] = line["result"]
            self._settings[request.prompt] = request.decoding

    def make_request(self, request: Request) -> RequestResult:
        """The prediction of this very request.

        Raises:
            NonRetriableException: there is none.
        """
        with _for_helm():
            decoding = decoding_of(request)
            result = self._results.get(key(request.prompt, decoding))
            if result is None:
                raise InputError(self._unanswered(request.prompt, decoding))
        seconds, size = result["request_time"]["batch_time"], result["request_time"]["batch_size"]
        completions = []
        for choice in result["choices"]:
            logprobs = choice["logprobs"]
            texts = zip(logprobs["tokens"], logprobs["token_logprobs"], strict=True)
            completions.append(_output(choice["text"], list(texts), choice["finish_reason"]))
        return RequestResult(
            success=True,
            cached=False,
            embedding=[],
            completions=completions,
            request_time=seconds / size,
            batch_request_time=seconds,
            batch_size=size,
        )

    def _unanswered(self, prompt: str, decoding: Decoding) -> str:
        end = prompt[-80:].replace("\n", " ")
        there = self._settings.get(prompt)
        if there is None:
            return (
                f"{self.predictions} has no prediction for the prompt that ends in '{end}': the predictions were made "
                "from other requests than this run's"
            )
        differ = ", ".join(
            f"{name} {value} (asked for {decoding.key[name]})"
            for name, value in there.key.items()
            if value != decoding.key[name]
        )
        return f"{self.predictions} has the prompt that ends in '{end}' with {differ}"


class SqueezeClient(CachingClient):
    """Runs a model with a full or a squeezed KV cache, one request at a time.

    A process loads a model once, however many clients, deployments and threads use it. HELM's cache of responses tells
    settings apart, so that other budgets are never answered from it. Prompts are tokenized without special tokens.

    Args:
        model: a name in `config/model2path.json`, a local folder or a Hub name.
        ini_size, KV_class3: budgets as fractions of the prompt; None for the full cache.
        algorithm, allocation, per, start_size: see `squeeze.SqueezeConfig`.
        device, dtype: as `pred.py` has them.
        seed: of sampling.
        chat: put prompts into the tokenizer's chat template, and answer requests that are chats.
    Raises:
        InputError: a setting is none of those allowed, or there is no such model.
    """

    def __init__(
        self,
        cache_config: CacheConfig,
        model: str,
        ini_size: str | float | None = None,
        KV_class3: str | float | None = None,
        algorithm: str | None = None,
        allocation: str = "squeeze",
        per: str = "layer",
        start_size: int = 4,
        device: str | None = None,
        dtype: str = "auto",
        seed: int = 42,
        chat: bool = False,
    ) -> None:
        super().__init__(cache_config=cache_config)
        from squeeze import devices
        from squeeze.models.sources import chat_identity
        from squeeze.runs.folder import cache_settings
        from squeeze.runs.resolve import reader, resolve
        from squeeze.runs.spec import RunSpec

        whole_number("seed", seed, 0, most=MOST_SEED)
        spec = RunSpec(model=model, device=device, dtype=dtype, seed=seed, chat=chat)
        if ini_size is not None or KV_class3 is not None:
            spec = replace(
                spec,
                enable_squeeze=True,
                ini_size=ini_size,
                KV_class3=KV_class3,
                algorithm=algorithm,
                allocation=allocation,
                per=per,
                start_size=start_size,
            )
        self._device = devices.pick_device(device)
        self._dtype = devices.pick_dtype(dtype, self._device)
        resolved = resolve(spec, reader())
        self._folder = resolved.folder
        self._positions = resolved.positions
        self._squeeze = resolved.config
        self._seed = seed
        self._chat = chat
        self._settings = {
            "model": resolved.identity,
            "dtype": str(self._dtype),
            "seed": seed,
            "chat": chat,
            **({"chat_template": chat_identity(self._folder)} if chat else {}),
            **cache_settings(self._squeeze),
        }

    def make_request(self, request: Request) -> RequestResult:
        """Complete the prompt of a request.

        With `echo_prompt` the prompt's tokens come first, with their log-probabilities: a prompt is read whole, so
        these do not depend on budgets.

        Raises:
            NonRetriableException: whatever goes wrong, since it would go wrong again.
        """
        with _for_helm():
            if request.embedding or request.multimodal_prompt or request.image_generation_parameters:
                raise InputError("a squeezed model completes text: embeddings, images and sounds are not supported")
            if request.presence_penalty or request.frequency_penalty or request.response_format:
                raise InputError("penalties and response formats are not supported")
            if request.messages and not self._chat:
                raise InputError("the request is a chat: set chat to true in model_deployments.yaml")
            asked = {"messages": request.messages} if request.messages else {"prompt": request.prompt}
            asked |= decoding_of(request, least=1).key | {"settings": self._settings}
            asked |= {"max_tokens": request.max_tokens, "echo": request.echo_prompt}
            response, cached = self.cache.get(asked, lambda: self._answer(request))
        return RequestResult(
            success=True,
            cached=cached,
            embedding=[],
            completions=[_output(*completion) for completion in response["completions"]],
            request_time=response["request_time"],
            request_datetime=response["request_datetime"],
        )

    def _answer(self, request: Request) -> dict[str, Any]:
        """Completions and the time they took, without the time that other threads had the model."""
        with loaded(self._folder, self._device, self._dtype) as (model, tokenizer):
            return wrap_request_time(lambda: self._generate(request, model, tokenizer))()

    def _generate(self, request: Request, model: Any, tokenizer: Any) -> dict[str, Any]:
        """Completions as (text, (token, log-probability) of each, finish reason)."""
        from squeeze import squeezed
        from squeeze.benchmarks import completions
        from squeeze.generation.stopping import pieces

        decoding = decoding_of(request, least=1)
        text = self._prompt(request, tokenizer)
        tokens = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
        if len(tokens) + request.max_tokens > self._positions:
            raise InputError(
                f"the prompt has {len(tokens)} tokens, which with {request.max_tokens} new ones is more than the "
                f"model's {self._positions} positions"
            )
        answers: list[tuple[str, list[tuple[str, float]], str]] = [("", [], "length")] * decoding.n
        if request.max_tokens > 0:
            with squeezed(model, self._squeeze) if self._squeeze else nullcontext() as run:
                [choices], [stats] = completions.complete(
                    model, tokenizer, [tokens], [text], decoding, run, self._seed
                )
            answers = [
                (choice.text, list(zip(choice.tokens, choice.token_logprobs, strict=True)), choice.finish_reason)
                for choice in choices
            ]
            kept = 100 * stats.kv_bytes / stats.full_kv_bytes
            hlog(f"{stats.prompt_tokens} prompt tokens, {stats.new_tokens} new ones, KV kept {kept:.1f}%")
        if request.echo_prompt:
            logprobs = completions.prompt_logprobs(model, tokens)
            echo = list(zip(pieces(tokenizer, tokens), logprobs, strict=True))
            answers = [(text + new, echo + more, reason) for new, more, reason in answers]
        return {"completions": answers}

    def _prompt(self, request: Request, tokenizer: Any) -> str:
        if not self._chat:
            return request.prompt
        if tokenizer.chat_template is None:
            raise InputError(f"the tokenizer in {self._folder} has no chat template: set chat to false")
        from squeeze.benchmarks.longbench.prompts import in_template

        messages = request.messages or [{"role": "user", "content": request.prompt}]
        return in_template(tokenizer, messages)


def decoding_of(request: Request, least: int = 0) -> Decoding:
    """A request's settings.

    Args:
        least: tokens that a request for none counts as.
    """
    return Decoding(
        max_tokens=max(request.max_tokens, least),
        temperature=request.temperature,
        top_p=request.top_p,
        n=request.num_completions,
        stop=tuple(request.stop_sequences),
        logprobs=request.top_k_per_token,
        random=request.random,
    )


_LOADED: dict[tuple[str, str, str], tuple[Any, Any]] = {}
_LOCK = threading.RLock()


@contextmanager
def loaded(folder: Path, device: Any, dtype: Any) -> Iterator[tuple[Any, Any]]:
    """A model and its tokenizer, loaded by the first who asks, for one thread of this process at a time."""
    from squeeze.models import loading

    with _LOCK:
        name = (str(folder), str(device), str(dtype))
        if name not in _LOADED:
            hlog(f"Loading {folder} on {device} in {dtype}")
            _LOADED[name] = loading.load(folder, device, dtype)
        yield _LOADED[name]


@contextmanager
def _for_helm() -> Iterator[None]:
    """Make errors such that HELM does not try again: nothing that fails here would succeed then."""
    try:
        yield
    except NonRetriableException:
        raise
    except Exception as error:
        message = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        raise NonRetriableException(message) from error


def _output(text: str, tokens: list[tuple[str, float]], finish_reason: str) -> GeneratedOutput:
    return GeneratedOutput(
        text=text,
        logprob=sum(logprob for _, logprob in tokens),
        tokens=[Token(text=piece, logprob=logprob) for piece, logprob in tokens],
        finish_reason={"reason": finish_reason},
    )
