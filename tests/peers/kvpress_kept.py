"""Which positions kvpress keeps of prompts; run by the Python of its own environment, see test_kvpress.py.

    PYTHON kvpress_kept.py MODEL_FOLDER PROMPTS.json SHARE OUT.npz

Writes `<method>-<prompt>`, the positions `(layers, kv_heads, kept)`, ascending. Of ObservedAttentionPress, which is
not quite H2O, it writes the scores, `(layers, kv_heads, tokens)`.
"""

import json
import sys
from pathlib import Path

import kvpress
import numpy as np
import torch
from transformers import AutoModelForCausalLM, DynamicCache

PRESSES = {
    "snapkv": lambda ratio: kvpress.SnapKVPress(ratio, window_size=32, kernel_size=5),
    "tova": kvpress.TOVAPress,
    "knorm": kvpress.KnormPress,
    "keydiff": kvpress.KeyDiffPress,
    "expected_attention": kvpress.ExpectedAttentionPress,
    "lagkv": kvpress.LagKVPress,
    "streaming": kvpress.StreamingLLMPress,
    "h2o": kvpress.ObservedAttentionPress,
}


@torch.no_grad()
def prefill(model, ids):
    """The cache of a prompt."""
    cache = DynamicCache()
    model(ids, past_key_values=cache, logits_to_keep=1)
    return cache.layers


def kept(model, press, ids, whole):
    """Positions of the keys that a press leaves, found among those of a prefill without it."""
    with press(model):
        pairs = zip(prefill(model, ids), whole, strict=True)
    places = [torch.cdist(left.keys[0], layer.keys[0]).argmin(-1) for left, layer in pairs]
    return torch.stack(places).sort(-1).values.numpy()


def observed(model, press, ids, whole):
    """What ObservedAttentionPress gives the tokens of each layer."""
    scores, real = [], press.score
    press.score = lambda *given, **more: scores.append(real(*given, **more)) or scores[-1]
    kept(model, press, ids, whole)
    return torch.cat(scores).numpy()


if __name__ == "__main__":
    folder, prompts, share, out = sys.argv[1:]
    found = {}
    for attn in ("sdpa", "eager"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attn).eval()
        for number, prompt in enumerate(json.loads(Path(prompts).read_text())):
            ids = torch.tensor([prompt])
            whole = prefill(model, ids)
            # Half a token more, which rounding down takes away again.
            ratio = 1 - (round(float(share) * len(prompt)) + 0.5) / len(prompt)
            for name, make in PRESSES.items():
                if (name == "h2o") == (attn == "eager"):
                    look = observed if name == "h2o" else kept
                    found[f"{name}-{number}"] = look(model, make(ratio), ids, whole)
    np.savez(out, **found)
