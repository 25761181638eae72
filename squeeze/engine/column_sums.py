"""Attention probabilities summed up over a prompt's queries, for every key, on a GPU (Triton).

PyTorch's fused kernel gives the log-sum-exp of each query's logits beside its output. This one computes the
probabilities anew from it, a tile at a time, and adds them up: it reads no values and writes no matrix of
probabilities, where blocks of queries write all of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

#: Queries and keys of a tile.
QUERIES, KEYS = 64, 64


@triton.jit
def _sum_columns(
    queries,
    keys,
    lse,
    sums,
    query_head,
    query_token,
    key_head,
    key_token,
    tokens,
    window,
    scale,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """A program has some keys of one KV head, and walks the queries that see them."""
    kv_head = tl.program_id(1)
    first_key = tl.program_id(0) * KEYS
    at_key = (first_key + tl.arange(0, KEYS)).to(tl.int64)  # an offset can pass 2 ** 31
    numbers = tl.arange(0, PADDED)
    key_tile = tl.load(
        keys + kv_head * key_head + at_key[None, :] * key_token + numbers[:, None],
        mask=(at_key[None, :] < tokens) & (numbers[:, None] < WIDTH),
        other=0.0,
    )
    if WIDEN:
        key_tile = key_tile.to(tl.float32)
    found = tl.zeros((KEYS,), dtype=tl.float32)
    end = tl.minimum(tokens, first_key + KEYS - 1 + window)
    for start in range(first_key // QUERIES * QUERIES, end, QUERIES):
        at_query = (start + tl.arange(0, QUERIES)).to(tl.int64)
        distance = at_query[:, None] - at_key[None, :]
        seen = (distance >= 0) & (distance < window) & (at_query[:, None] < tokens)
        for member in range(GROUP):
            head = (kv_head * GROUP + member).to(tl.int64)
            query_tile = tl.load(
                queries + head * query_head + at_query[:, None] * query_token + numbers[None, :],
                mask=(at_query[:, None] < tokens) & (numbers[None, :] < WIDTH),
                other=0.0,
            )
            if WIDEN:
                query_tile = query_tile.to(tl.float32)
            total = tl.load(lse + head * tokens + at_query, mask=at_query < tokens, other=0.0)
            logits = tl.dot(query_tile, key_tile, input_precision="ieee") * scale
            found += tl.sum(tl.where(seen, tl.exp(logits - total[:, None]), 0.0), axis=0)
    tl.store(sums + kv_head * tokens + at_key, found, mask=at_key < tokens)


def column_sums(
    queries: torch.Tensor, keys: torch.Tensor, lse: torch.Tensor, scale: float, window: int | None
) -> torch.Tensor:
    """Probabilities of causal attention of a whole prompt, summed over the queries of each KV head's group.

    Args:
        queries, keys: `(heads, tokens, head_dim)` and `(kv_heads, tokens, head_dim)`, a token's numbers side by side.
        lse: log-sum-exp of each query's scaled logits, `(heads, tokens)` float32.
        window: tokens that a query sees, itself included; None: all before it.
    Returns:
        `(kv_heads, tokens)` float32.
    """
    kv_heads, tokens, width = keys.shape
    lse = lse.contiguous()
    sums = torch.empty(kv_heads, tokens, dtype=torch.float32, device=keys.device)
    with torch.cuda.device_of(keys):  # Triton launches on the current device
        _sum_columns[(triton.cdiv(tokens, KEYS), kv_heads)](
            queries,
            keys,
            lse,
            sums,
            *queries.stride()[:2],
            *keys.stride()[:2],
            tokens,
            tokens if window is None else window,
            scale,
            GROUP=len(queries) // kv_heads,
            WIDTH=width,
            PADDED=max(triton.next_power_of_2(width), 16),
            QUERIES=QUERIES,
            KEYS=KEYS,
            WIDEN=keys.device.type == "cpu",  # Triton's interpreter knows no products of bfloat16
        )
    return sums
