"""How LongBench's runner puts a prompt to a model and reads its answer: truncation, chat formats, stop rules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from squeeze.config import InputError
from squeeze.longbench import generation_lengths

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

#: Few-shot and code-completion data sets are given to chat models as they are, too.
NO_CHAT = frozenset({"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"})

ASSISTANT = "A chat between a curious {} and an artificial intelligence assistant. The assistant gives helpful, "
ASSISTANT += "detailed, and polite answers to the {}'s questions."


@dataclass(frozen=True)
class Family:
    """Models that LongBench's runner knows by a part of their name.

    Args:
        names: any of these in the model's name.
        chat: the prompt with the chat format around it, `{prompt}` to be filled in.
        clean: what is scored of an answer.
    """

    names: tuple[str, ...]
    chat: str
    clean: Callable[[str], str] = str


#: Those that can be Llamas or Mistrals; the first that fits is the model's.
FAMILIES = (
    Family(("longchat", "vicuna"), ASSISTANT.format("user", "user") + " USER: {prompt} ASSISTANT:"),
    Family(("llama2",), "[INST]{prompt}[/INST]"),
    Family(
        ("xgen",),
        ASSISTANT.format("human", "human") + "\n\n ### Human: {prompt}\n###",
        lambda answer: answer.strip().replace("Assistant:", ""),
    ),
    Family(("internlm",), "<|User|>:{prompt}<eoh>\n<|Bot|>:", lambda answer: answer.split("<eoa>")[0]),
)


def family(model_name: str) -> Family | None:
    """The family whose rules LongBench's runner applies to a model, or None."""
    return next((one for one in FAMILIES if any(name in model_name for name in one.names)), None)


def clean(answer: str, model_name: str) -> str:
    """What LongBench's runner keeps of a model's answer."""
    found = family(model_name)
    return found.clean(answer) if found else answer


def check_chat_template(tokenizer: PreTrainedTokenizerBase, model_name: str) -> None:
    """Raises InputError if the tokenizer has no chat template of its own."""
    if tokenizer.chat_template is None:
        raise InputError(f"{model_name} has no chat template of its own: leave --chat out")


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
    tokens = tokenizer(prompt, truncation=False).input_ids
    if len(tokens) > max_length:
        half = max_length // 2
        first = tokenizer.decode(tokens[:half], skip_special_tokens=True)
        prompt = first + tokenizer.decode(tokens[-half:], skip_special_tokens=True)
    special = True
    if dataset not in NO_CHAT:
        found = family(model_name)
        if chat:
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
            special = False  # the template has written them
        elif found:
            prompt = found.chat.replace("{prompt}", prompt)
    return tokenizer(prompt, truncation=False, add_special_tokens=special, return_tensors="pt").input_ids[0]


def generation_settings(tokenizer: PreTrainedTokenizerBase, dataset: str) -> dict[str, Any]:
    """What LongBench passes to `generate`: greedy, and for samsum a stop at a newline that is not the first token."""
    settings: dict[str, Any] = {"max_new_tokens": generation_lengths()[dataset], "num_beams": 1, "do_sample": False}
    if dataset == "samsum":
        newline = tokenizer.encode("\n", add_special_tokens=False)[-1:]
        ends = [token for token in (tokenizer.eos_token_id, *newline) if token is not None]
        settings |= {"min_new_tokens": 1} | ({"eos_token_id": ends} if ends else {})
    return settings
