"""The change of the residual stream by a layer's self-attention (SqueezeAttention, arXiv 2404.04793, section 4.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

#: Tokens compared at a time: float32 copies of a whole prompt cost ten times as much as the comparison, on a CPU.
BLOCK = 512


@torch.no_grad()
def similarity(
    before: torch.Tensor, after: torch.Tensor, lengths: Sequence[int], prompt_lengths: Sequence[int]
) -> torch.Tensor:
    """Mean cosine similarity over the prompt's tokens; high means that the layer changes little.

    Of a chunk of the prompt, what its tokens add to that mean.

    Args:
        before: residual stream entering the decoder layer, `(batch, tokens, hidden)`, left-padded.
        after: residual stream after self-attention is added, same shape.
        lengths: tokens of each sequence, padding excluded.
        prompt_lengths: of the whole prompt.
    Returns:
        `(batch,)`, float32, whatever the dtype of the stream.
    """
    means = []
    for row_before, row_after, length, total in zip(before, after, lengths, prompt_lengths, strict=True):
        start = len(row_before) - length
        blocks = zip(row_before[start:].split(BLOCK), row_after[start:].split(BLOCK), strict=True)
        tokens = [torch.nn.functional.cosine_similarity(a.float(), b.float(), dim=-1) for a, b in blocks]
        means.append(torch.cat(tokens).sum() / total)
    return torch.stack(means)
