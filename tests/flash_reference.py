"""What flash-attn's `flash_attn_with_kvcache` and PyTorch's `varlen_attn` compute, slowly and on any device.

Their arguments and their meaning; shapes as documented there: for the first, queries `(batch, new, heads, head_dim)`
and caches `(batch, slots, kv_heads, head_dim)`, for the second `(tokens, heads, head_dim)`.
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


def varlen_attn(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, enable_gqa=False, seqused_k=None, **other
):
    """Each sequence's queries attend to the first `seqused_k` of its keys, which lie between two of `cu_seq_k`."""
    calls.append(key.shape)
    assert not other
    assert {cu_seq_q.dtype, cu_seq_k.dtype, seqused_k.dtype} == {torch.int32}
    assert len(cu_seq_q) == len(cu_seq_k) == len(seqused_k) + 1
    assert (cu_seq_q.diff() <= max_q).all() and (cu_seq_k.diff() <= max_k).all()
    assert (seqused_k <= cu_seq_k.diff()).all() and cu_seq_k[-1] == len(key)
    heads, kv_heads = query.shape[1], key.shape[1]
    assert heads == kv_heads or enable_gqa
    output = torch.empty_like(query)
    for row, used in enumerate(seqused_k.tolist()):
        asking = slice(*cu_seq_q[row : row + 2].tolist())
        first = int(cu_seq_k[row])
        for head in range(heads):
            own = head // (heads // kv_heads)
            keys, values = key[first : first + used, own], value[first : first + used, own]
            logits = (
                query[asking, head].float() @ keys.float().T * (query.shape[2] ** -0.5 if scale is None else scale)
            )
            output[asking, head] = (logits.softmax(-1) @ values.float()).to(query.dtype)
    return output
