"""Prompts and answers as LongBench's runner treats them: truncation, chat formats, stop rules."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from squeeze.benchmarks.encoding import tokens_after
from squeeze.benchmarks.longbench.data import generation_lengths
from squeeze.errors import InputError
from squeeze.storage.files import read_object
from squeeze.text import shortened

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

#: Few-shot and code-completion data sets are given to chat models as they are, too.
NO_CHAT = frozenset({"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"})

ASSISTANT = "A chat between a curious {} and an artificial intelligence assistant. The assistant gives helpful, "
ASSISTANT += "detailed, and polite answers to the {}'s questions."

#: Words in the names of models that were taught to chat.
CHAT_WORDS = re.compile(r"chat|instruct|(?<![a-z])(inst|it|assistant)(?![a-z])")

#: Where an answer of gpt-oss begins, in which channel it will; and how its final channel is opened.
HARMONY, FINAL_CHANNEL = "<|start|>assistant", "<|channel|>final<|message|>"

#: The chat format by `run.json` of prompts in a template that came with the model.
OWN_TEMPLATE = "the tokenizer's own chat template"


@dataclass(frozen=True)
class Family:
    """Models that LongBench's runner knows by a part of their name.

    Args:
        names: any of these in the model's name, to the letter.
        spelled: how else people write them, a pattern for a name in small letters.
        chat: the prompt with the chat format around it, `{prompt}` to be filled in.
        clean: what is scored of an answer.
        has_bases: some models of that name were not taught to chat; the chat models among those spelled otherwise
            are told by `CHAT_WORDS`.
    """

    names: tuple[str, ...]
    spelled: str
    chat: str
    clean: Callable[[str], str] = str
    has_bases: bool = True


#: Those that transformers has the code of; the first that fits is the model's.
FAMILIES = (
    Family(
        ("longchat", "vicuna"),
        r"longchat|vicuna",
        ASSISTANT.format("user", "user") + " USER: {prompt} ASSISTANT:",
        has_bases=False,
    ),
    Family(
        ("llama2",), r"llama[-_. ]?v?2(?=chat|instruct|[-_ ]|\.(?![0-9]))|llama\.2\.[0-9]+b", "[INST]{prompt}[/INST]"
    ),
    Family(
        ("xgen",),
        r"(?<![a-z])xgen(?![a-z])",
        ASSISTANT.format("human", "human") + "\n\n ### Human: {prompt}\n###",
        lambda answer: answer.strip().replace("Assistant:", ""),
    ),
    Family(
        ("internlm",),
        r"internlm(?=[-_. ]?[0-9.]+b|[-_. ]?chat)",  # a number that is no size is that of a later model
        "<|User|>:{prompt}<eoh>\n<|Bot|>:",
        lambda answer: answer.split("<eoa>")[0],
    ),
)


def family(model_name: str) -> Family | None:
    """The family whose rules apply to a model: LongBench's runner's own, or its chat models spelled otherwise."""
    name = model_name.lower()
    chat = CHAT_WORDS.search(name)
    spelled = (row for row in FAMILIES if (chat or not row.has_bases) and re.search(row.spelled, name))
    return _by_name(model_name) or next(spelled, None)


def _by_name(model_name: str) -> Family | None:
    """The family by the rule of LongBench's runner: also of base models that have llama2 in their name."""
    return next((row for row in FAMILIES if any(name in model_name for name in row.names)), None)


def chat_format(dataset: str, model_name: str, chat: bool) -> str | None:
    """Chat format of a data set's prompts, as `run.json` says it; None for prompts that stay as they are.

    Args:
        chat: the tokenizer's own template was asked for.
    """
    if dataset in NO_CHAT:
        return None
    known = family(model_name)
    return OWN_TEMPLATE if chat else known.chat if known else None


def chat_settings(dataset: str, model_name: str, chat: bool) -> dict[str, str]:
    """Settings of a data set that no other setting implies: a chat format that LongBench's runner would not use."""
    asked = chat_format(dataset, model_name, chat)
    return {"chat_format": asked} if asked and not chat and not _by_name(model_name) else {}


def chat_note(datasets: Sequence[str], model_name: str, folder: Path, chat: bool) -> str | None:
    """A sentence on what prompts are put into, or on a chat model whose prompts stay as they are; None for neither.

    Args:
        folder: the model's.
    Raises:
        InputError: the tokenizer's settings cannot be read.
    """
    concerned = [dataset for dataset in datasets if dataset not in NO_CHAT]
    if chat or not concerned:
        return None
    where = f"prompts of {', '.join(concerned)}"
    known = family(model_name)
    if known:
        shown = known.chat.replace("\n", "\\n")
        return f"{where} are put into LongBench's chat format for {' and '.join(known.names)}: {shown}"
    template = has_chat_template(folder)
    if template or CHAT_WORDS.search(model_name.lower()):
        remedy = "--chat uses its tokenizer's own chat template" if template else "its tokenizer has no chat template"
        return (
            f"{model_name} looks like a chat model, and {where} are put to it without a chat format, since LongBench "
            f"has none for that name: {remedy}"
        )
    return None


def has_chat_template(folder: Path) -> bool:
    """Whether a model's folder has a chat template; InputError if its tokenizer's settings cannot be read."""
    if any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    settings = folder / "tokenizer_config.json"
    return settings.is_file() and bool(read_object(settings).get("chat_template"))


def clean(answer: str, model_name: str) -> str:
    """The part of a model's answer that LongBench's runner keeps."""
    known = family(model_name)
    return known.clean(answer) if known else answer


def check_chat_template(tokenizer: PreTrainedTokenizerBase, model_name: str) -> None:
    """Raises InputError if the tokenizer has no chat template of its own, or one that fails on a short message."""
    if tokenizer.chat_template is None:
        raise InputError(f"{model_name} has no chat template of its own: leave --chat out")
    in_template(tokenizer, [{"role": "user", "content": "a"}])


def in_template(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]) -> str:
    """Messages in the tokenizer's own chat template, up to where an answer begins: one without thinking aloud, which
    a benchmark's few tokens have no room for. Templates with a switch for it (Qwen3's) are told so, and in the format
    of gpt-oss (harmony) the answer begins in the channel `final`.

    Raises:
        InputError: the template, which is a program that came with the model, fails.
    """
    try:
        settings: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
        text = str(tokenizer.apply_chat_template(list(messages), **settings))
        return text + FINAL_CHANNEL if text.endswith(HARMONY) else text
    except Exception as error:  # whatever a template raises
        reason = shortened(" ".join(str(error).split()), 200)
        raise InputError(f"the model's chat template cannot be used: {type(error).__name__}: {reason}") from None


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, dataset: str, prompt: str, max_length: int, model_name: str, chat: bool = False
) -> torch.Tensor:
    """Turn a prompt into tokens: one that is too long keeps its first and last halves, then comes the chat format.

    Args:
        max_length: the most tokens of the prompt, before the chat format.
        model_name: decides on the chat format.
        chat: use the tokenizer's own chat template in place of LongBench's format for the name.
    Returns:
        Token ids, (tokens,).
    """
    return encode_parts(tokenizer, dataset, prompt, "", max_length, model_name, chat)[0]


def encode_parts(
    tokenizer: PreTrainedTokenizerBase,
    dataset: str,
    prompt: str,
    after: str,
    max_length: int,
    model_name: str,
    chat: bool = False,
) -> tuple[torch.Tensor, int]:
    """A prompt's token ids, as `encode_prompt` gives them, and how many of them follow on its context.

    Args:
        after: the end of the prompt, which follows on the context; of one that is too long, as far as it stays.
    """
    tokens = tokenizer(prompt, truncation=False).input_ids
    if len(tokens) > max_length:
        half = max_length // 2
        first = tokenizer.decode(tokens[:half], skip_special_tokens=True)
        last = tokenizer.decode(tokens[-half:], skip_special_tokens=True)
        prompt = first + last
        after = after if after.strip() in prompt else last
    special = True
    if dataset not in NO_CHAT:
        known = family(model_name)
        if chat:
            prompt = in_template(tokenizer, [{"role": "user", "content": prompt}])
            special = False  # the template has written them
        elif known:
            prompt = known.chat.replace("{prompt}", prompt)
    found = tokenizer(prompt, truncation=False, add_special_tokens=special, return_tensors="pt").input_ids[0]
    return found, tokens_after(tokenizer, prompt, after, found, special) if after else 0


def generation_settings(tokenizer: PreTrainedTokenizerBase, dataset: str) -> dict[str, Any]:
    """LongBench's settings for `generate`: greedy, and for samsum a stop at a newline that is not the first token."""
    settings: dict[str, Any] = {"max_new_tokens": generation_lengths()[dataset], "num_beams": 1, "do_sample": False}
    if dataset == "samsum":
        newline = tokenizer.encode("\n", add_special_tokens=False)[-1:]
        ends = [token for token in (tokenizer.eos_token_id, *newline) if token is not None]
        settings |= {"min_new_tokens": 1} | ({"eos_token_id": ends} if ends else {})
    return settings
