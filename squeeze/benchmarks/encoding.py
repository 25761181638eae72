"""A bar over texts that are being tokenized."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tqdm import tqdm

from squeeze.ranks import Ranks

#: Characters that take seconds to tokenize.
LONG_TEXT = 5_000_000


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
