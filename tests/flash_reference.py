"""What flash-attn's `flash_attn_with_kvcache` computes, slowly and on any device: its arguments, and its meaning.

Shapes as documented there: queries `(batch, new, heads, head_dim)`, caches `(batch, slots, kv_heads, head_dim)`.
"""

import torch

calls = []


def flash_attn_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, *, cache_seqlens=None, softmax_scale=None, causal=False
):
    """New keys and values, if given, are appended in place at `cache_seqlens`; queries attend to what is valid."""
    batch, new, heads, head_dim = q.shape
    calls.append(k_cache.shape)
    assert q.stride(-1) == k_cache.stride(-1) == v_cache.stride(-1) == 1
    assert heads % k_cache.shape[2] == 0
    assert cache_seqlens is None or (cache_seqlens.dtype == torch.int32 and cache_seqlens.shape == (batch,))
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    group = heads // k_cache.shape[2]
    output = torch.empty_like(q)
    for row in range(batch):
        length = k_cache.shape[1] if cache_seqlens is None else int(cache_seqlens[row])
        if k is not None:
            k_cache[row, length : length + k.shape[1]] = k[row]
            v_cache[row, length : length + v.shape[1]] = v[row]
            length += k.shape[1]
        for head in range(heads):
            keys, values = k_cache[row, :length, head // group], v_cache[row, :length, head // group]
            logits = q[row, :, head].float() @ keys.float().T * scale
            if causal:  # the last query sees the last key
                hidden = torch.ones(new, length, dtype=torch.bool).triu(length - new + 1)
                logits = logits.masked_fill(hidden, -torch.inf)
            output[row, :, head] = (logits.softmax(-1) @ values.float()).to(q.dtype)
    return output
