"""Attention that tokens after a prompt are expected to give it, from the queries of the prompt (arXiv 2510.00636)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from squeeze.engine.rotation import Rotation
from squeeze.evictors.base import Future


@torch.no_grad()
def expected_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    lengths: Sequence[int],
    scale: float,
    rotation: Rotation | None,
    future: Future,
) -> torch.Tensor:
    """Probabilities that a query of the future is expected to give a prompt's tokens (section 3).

    Queries before RoPE are taken to be normally distributed, with the mean and the covariance of the prompt's own, and
    turned by the mean rotation of the future's positions; then `E[exp(q k)] = exp(mean k + k covariance k / 2)`.

    Args:
        queries: `(batch, heads, tokens, head_dim)`, left-padded, after RoPE.
        keys: `(batch, kv_heads, tokens, head_dim)`, likewise.
        lengths: tokens of each prompt, padding excluded.
        scale: of the products of queries and keys.
        rotation: how a query turns with its position; None where it does not.
    Returns:
        `(batch, kv_heads, tokens)` float32, summed over the query heads of a KV head; zeros where there is padding,
        and for the tokens that are skipped, which take no share from the others.
    """
    scores = keys.new_zeros(keys.shape[:3], dtype=torch.float32)
    group = queries.shape[1] // keys.shape[1]
    for row, length in enumerate(lengths):
        places = torch.arange(length + future.tokens, device=keys.device)[:, None]
        skipped, turn = min(future.skipped, length - 1), None
        if rotation is not None:
            one = torch.eye(keys.shape[-1], device=keys.device)[:, None].expand(-1, future.tokens, -1)
            turn = rotation(one, places[length:]).mean(dim=1)
        for head in range(keys.shape[1]):  # one at a time: in float32 all of them together are as large as many layers
            own = queries[row, head * group : (head + 1) * group, -length:].float()
            held = keys[row, head, -length:].float()[skipped:]
            if rotation is not None:
                own = rotation(own, -places[:length])
            own = own[:, skipped:]
            mean = own.mean(dim=1)
            centred = own - mean[:, None]
            covariance = centred.transpose(1, 2) @ centred / own.shape[1]
            if turn is not None:
                mean, covariance = mean @ turn, turn.T @ covariance @ turn
            spread = torch.stack([(held @ of_query * held).sum(dim=-1) for of_query in covariance])
            logits = (mean @ held.T) * scale + spread * (scale * scale / 2)
            scores[row, head, skipped - length :] = logits.softmax(dim=-1).sum(dim=0)
    return scores
