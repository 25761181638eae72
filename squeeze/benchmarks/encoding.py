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


def tokens_after(
    tokenizer: PreTrainedTokenizerBase, text: str, after: str, tokens: torch.Tensor, special: bool
) -> int:
    """How many of a prompt's last tokens begin with what follows on its context; a token that the two share does.

    Args:
        text: the prompt.
        after: the text that follows on the context, blanks around it aside.
        tokens: of the prompt, `(tokens,)`.
        special: whether special tokens were added to them.
    Raises:
        InputError: the text is not in the prompt.
    """
    start = text.rfind(after.strip())
    if start < 0:
        raise InputError(f"a prompt does not have the text after its context, {shortened(after.strip())}")
    before = tokenizer(text[:start], truncation=False, add_special_tokens=special).input_ids
    pairs = enumerate(zip(before, tokens.tolist(), strict=False))
    same = next((index for index, (one, other) in pairs if one != other), min(len(before), len(tokens)))
    return min(max(len(tokens) - same, 1), len(tokens) - 1)


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
