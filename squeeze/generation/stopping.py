"""The end of generated text: stop strings, found and cut exactly, however the tokens divide them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria


class StopStrings(StoppingCriteria):
    """Ends a row when its new text has one of the strings, however its tokens cut it.

    Args:
        start: tokens before the new ones.
    Attributes:
        ends: for each row, the new tokens there were when it ended; None as long as it goes on.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], rows: int, start: int) -> None:
        self.tokenizer = tokenizer
        self.stop = stop
        self.start = start
        self.ends: list[int | None] = [None] * rows

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor | None, **kwargs: Any) -> torch.Tensor:
        new = input_ids[:, self.start :]
        for row, end in enumerate(self.ends):
            if self.stop and end is None:
                text = decode(self.tokenizer, new[row])
                self.ends[row] = new.shape[1] if any(word in text for word in self.stop) else None
        return torch.tensor([end is not None for end in self.ends], device=input_ids.device)


def decode(tokenizer: PreTrainedTokenizerBase, tokens: torch.Tensor) -> str:
    """The text of new tokens, their blanks as they are."""
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def pieces(tokenizer: PreTrainedTokenizerBase, tokens: torch.Tensor) -> list[str]:
    """The text that each token adds to those before it; put together, the text of all.

    A token that ends inside a character adds nothing, and the one that completes it all of it.
    """
    texts: list[str] = []
    first, shown = 0, 0  # what follows is decoded from `first`, since a tokenizer may drop a blank at the start
    for count in range(1, len(tokens) + 1):
        text = decode(tokenizer, tokens[first:count])
        if text.endswith("\ufffd") and count < len(tokens):
            texts.append("")
            continue
        texts.append(text[len(decode(tokenizer, tokens[first:shown])) :])
        first, shown = shown, count
    return texts


def cut(texts: list[str], stop: Sequence[str]) -> tuple[list[str], bool]:
    """Cut tokens' texts exactly before the first of the stop strings, and say whether there is one."""
    text = "".join(texts)
    ends = [text.index(word) for word in stop if word in text]
    if not ends:
        return texts, False
    kept: list[str] = []
    left = min(ends)
    for piece in texts:
        if left == 0:
            break
        kept.append(piece[:left])
        left -= len(kept[-1])
    return kept, True
