"""What attention of one layer is, beside queries, keys and values.

Shapes here and where it is computed: queries `(batch, heads, tokens, head_dim)`, keys and values
`(batch, kv_heads, tokens, head_dim)`; the query heads of one KV head are neighbours (grouped-query attention), so
`heads = kv_heads * group`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Rule(NamedTuple):
    """How one layer's attention differs from plain causal attention with a softmax.

    Args:
        scale: of the products of queries and keys.
        window: tokens that a query sees, itself included; None: all before it.
        chunk: a query sees no token before the last multiple of so many; None: all (Llama 4).
        softcap: products are bent to lie within plus and minus so much; None: they are not (Gemma 2).
        sinks: logits of each head, `(heads,)`, that take a share of the softmax and give nothing (gpt-oss); or None.
    """

    scale: float
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether PyTorch's and flash-attn's kernels know all of it."""
        return self.chunk is None and self.softcap is None and self.sinks is None

    def bend_(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits, in place, as the softcap bends them."""
        return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)

    def hidden(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Mask of the keys that queries must not see, both by their positions: `(queries, keys)`."""
        queries = queries[:, None]
        hidden = keys > queries
        if self.window is not None:
            hidden |= keys <= queries - self.window
        if self.chunk is not None:
            hidden |= keys < queries // self.chunk * self.chunk
        return hidden


def softmax_with_sinks_(logits: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """Softmax of float32 `logits` in place, with one more logit in each sum, `sinks` `(…, 1)`, that gives nothing."""
    sinks = sinks.float()
    top = torch.maximum(logits.amax(dim=-1, keepdim=True), sinks)
    logits.sub_(top).exp_()
    return logits.div_(logits.sum(dim=-1, keepdim=True) + (sinks - top).exp())
