"""How much a layer's self-attention changes the residual stream (SqueezeAttention, arXiv 2404.04793, section 4.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch


@torch.no_grad()
def similarity(before: torch.Tensor, after: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Mean cosine similarity over the prompt's tokens; high means that the layer changes little.

    Args:
        before: residual stream entering the decoder layer, `(batch, tokens, hidden)`, left-padded.
        after: residual stream after self-attention is added, same shape.
        lengths: prompt tokens of each sequence, padding excluded.
    Returns:
        `(batch,)`, float32, whatever the dtype of the stream.
    """
    means = []
    for row_before, row_after, length in zip(before, after, lengths, strict=True):
        a, b = row_before[-length:].float(), row_after[-length:].float()
        means.append(torch.nn.functional.cosine_similarity(a, b, dim=-1).mean())
    return torch.stack(means)
