"""A bar over texts that are being tokenized."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from squeeze.errors import InputError
from squeeze.ranks import Ranks
from squeeze.text import shortened

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

#: Characters that take seconds to tokenize.
LONG_TEXT = 5_000_000


def tokens_after(tokenizer: PreTrainedTokenizerBase, tokens: torch.Tensor, after: str) -> int:
    """How many of a prompt's last tokens, `(tokens,)`, begin with the text that follows on its context.

    A token that the two share belongs to what follows.

    Raises:
        InputError: the text is not in them.
    """
    wanted = after.strip()
    count = max(len(tokenizer(wanted, add_special_tokens=False).input_ids) - 2, 1)
    while count < len(tokens):
        if wanted in tokenizer.decode(tokens[-count:]):
            return count
        count += 1
    raise InputError(f"the prompt's tokens do not have the text after its context: {shortened(wanted)}")


def tokenizing(texts: Sequence[str], dataset: str, ranks: Ranks) -> Iterator[str]:
    """The texts, with a bar over their characters where they take a while: at once, if there are many."""
    total = sum(map(len, texts))
    shown: dict[str, Any] = {} if ranks.first else {"disable": True}
    delay = 0 if total > LONG_TEXT else 2
    title = f"{dataset}: tokenizing"
    with tqdm(total=total, desc=title, unit="char", unit_scale=True, delay=delay, leave=False, **shown) as bar:
        for text in texts:
            yield text
            bar.update(len(text))
