"""A slow, obvious model of what the engine must compute: no ring, no buffer, no in-place trick.

Every decode step is recomputed from explicit sets of positions. Keys and values of all tokens are kept before RoPE,
so that StreamingLLM's positions can be applied literally: tokens in the cache are numbered 0, 1, 2, …
"""

from __future__ import annotations

import torch


class Reference:
    """One sequence through a Llama or Mistral model, teacher-forced, with explicit kept sets per layer and KV head.

    Args:
        budgets: tokens, one a layer or in each one a KV head.
    """

    def __init__(self, model, algorithm: str, budgets, start_size: int = 4):
        self.model, self.algorithm, self.start_size = model, algorithm, start_size
        config = model.config
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.budgets = [[own] * self.kv_heads if isinstance(own, int) else own for own in budgets]
        self.head_dim = config.hidden_size // self.heads
        self.window = getattr(config, "sliding_window", None)
        self.layers = model.model.layers
        self.keys = [torch.zeros(self.kv_heads, 0, self.head_dim) for _ in self.layers]
        self.values = [torch.zeros(self.kv_heads, 0, self.head_dim) for _ in self.layers]
        #: positions each KV head of each layer still holds, in order of position
        self.kept = [[[] for _ in range(self.kv_heads)] for _ in self.layers]
        #: position -> accumulated attention
        self.scores = [[{} for _ in range(self.kv_heads)] for _ in self.layers]
        self.seen = 0

    def rope(self, x, positions):
        """Rotate `(..., head_dim)` vectors to `positions`, pair by pair, as a complex multiplication."""
        angles = torch.as_tensor(positions, dtype=torch.float32)[..., None] * self.model.model.rotary_emb.inv_freq
        half = x.shape[-1] // 2
        turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([turned.real, turned.imag], dim=-1)

    def project(self, layer, stream):
        attn, normed = layer.self_attn, layer.input_layernorm(stream)
        split = lambda x: x.view(len(stream), -1, self.head_dim).transpose(0, 1)  # noqa: E731
        return split(attn.q_proj(normed)), split(attn.k_proj(normed)), split(attn.v_proj(normed))

    def finish(self, layer, stream, attended):
        stream = stream + layer.self_attn.o_proj(attended.transpose(0, 1).reshape(len(stream), -1))
        return stream + layer.mlp(layer.post_attention_layernorm(stream))

    def logits(self, stream):
        return self.model.lm_head(self.model.model.norm(stream[-1]))

    @torch.no_grad()
    def prefill(self, tokens, chunk=None):
        """Full causal attention over the prompt; returns the last position's logits.

        With `chunk`, tokens that the budget would not have kept at a chunk's start are hidden from its queries.
        """
        count = len(tokens)
        starts = list(range(count - chunk, 0, -chunk)) if chunk else []
        positions = torch.arange(count)
        hidden = positions[None, :] > positions[:, None]
        if self.window is not None:
            hidden |= positions[None, :] <= positions[:, None] - self.window
        stream = self.model.model.embed_tokens(tokens)
        for i, layer in enumerate(self.layers):
            q, k, v = self.project(layer, stream)
            self.keys[i], self.values[i] = k, v
            q, k = self.rope(q, positions), self.rope(k, positions)
            attended = torch.empty_like(q)
            for head in range(self.heads):
                kv = head // (self.heads // self.kv_heads)
                unseen = hidden.clone()
                for start in starts:
                    gone = set(range(start)) - set(self.survivors(i, kv, start))
                    unseen[start:, sorted(gone)] = True
                weights = (q[head] @ k[kv].T / self.head_dim**0.5).masked_fill(unseen, -torch.inf).softmax(-1)
                attended[head] = weights @ v[kv]
                for position, score in enumerate(weights.sum(0).tolist()):
                    self.scores[i][kv][position] = self.scores[i][kv].get(position, 0.0) + score
            for kv in range(self.kv_heads):
                self.kept[i][kv] = self.survivors(i, kv, count)
            stream = self.finish(layer, stream, attended)
        self.seen = count
        return self.logits(stream)

    def survivors(self, i, kv, count):
        """What a prompt of `count` tokens leaves in the cache."""
        budget = self.budgets[i][kv]
        if count <= budget:
            return list(range(count))
        if self.algorithm == "sliding_window":
            return list(range(count))[-budget:]
        if self.algorithm == "streaming":
            recent = list(range(count))[-(budget - self.start_size) :]
            return list(range(self.start_size)) + recent
        recent = list(range(count))[-(budget // 2) :]
        older = range(count - len(recent))
        rest = sorted(older, key=lambda p: (self.left(p, count), -self.scores[i][kv][p]))
        return sorted(rest[: budget - budget // 2]) + recent

    def victim(self, i, kv):
        """Which of the tokens held makes room for the new one."""
        kept, budget = self.kept[i][kv], self.budgets[i][kv]
        if self.algorithm == "sliding_window":
            return min(kept)
        if self.algorithm == "streaming":
            return min(p for p in kept if p >= self.start_size)
        # the new token counts as recent, so budget // 2 - 1 of those held do
        recent = sorted(kept)[len(kept) - (budget // 2 - 1) :]
        older = [p for p in kept if p not in recent]
        return min(older, key=lambda p: (not self.left(p, self.seen), self.scores[i][kv][p]))

    def left(self, position, query):
        """Whether the model's own window would not show a token to the query at a position."""
        return self.window is not None and position <= query - self.window

    @torch.no_grad()
    def step(self, token):
        """One decode step; returns its logits."""
        position = self.seen
        stream = self.model.model.embed_tokens(token.view(1))
        for i, layer in enumerate(self.layers):
            q, k, v = self.project(layer, stream)
            self.keys[i] = torch.cat([self.keys[i], k], 1)
            self.values[i] = torch.cat([self.values[i], v], 1)
            attended = torch.empty_like(q)
            for kv in range(self.kv_heads):
                if len(self.kept[i][kv]) >= self.budgets[i][kv]:
                    self.kept[i][kv].remove(self.victim(i, kv))
                self.kept[i][kv].append(position)
                kept = sorted(self.kept[i][kv])
                assert len(kept) <= self.budgets[i][kv]
                places = list(range(len(kept))) if self.algorithm == "streaming" else kept
                keys = self.rope(self.keys[i][kv][kept], places)
                group = self.heads // self.kv_heads
                for head in range(kv * group, (kv + 1) * group):
                    query = self.rope(q[head], [places[-1]])
                    weights = (query @ keys.T / self.head_dim**0.5).softmax(-1)
                    attended[head] = weights @ self.values[i][kv][kept]
                    for p, score in zip(kept, weights[0].tolist(), strict=True):
                        self.scores[i][kv][p] = self.scores[i][kv].get(p, 0.0) + score
            stream = self.finish(layer, stream, attended)
        self.seen += 1
        return self.logits(stream)
