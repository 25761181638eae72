"""Would H2O gain from budgets per (layer, KV head) over budgets per layer? What docs/budgets.md says of it.

    python script/head_study.py --ini_size 0.2 --data_dir DIR --datasets lcc --requests FILE --first 8 --last 18

Measured with masks, since a layer's buffer has as many slots for each of its KV heads: a prompt is prefilled once; at
its end every KV head keeps its heavy hitters and recent tokens; a text that follows is fed in one pass, in which a
head sees what it keeps and the text so far. Nothing is evicted afterwards, and no memory is saved. Loss curves are
measured in this way on the prompts of python -m squeeze.calibrate, once for layers and once for heads, and budgets
of one total (but for rounding) made from both are compared on the prompts that are named: means over prompts.
"""

import argparse
import os
import statistics
import sys
from fractions import Fraction
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from squeeze.threads import settings

os.environ |= settings()

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm
from transformers import AttentionInterface

from squeeze import PromptFacts, SqueezeConfig, calibrate, devices, squeezed
from squeeze.allocations import curves
from squeeze.benchmarks import fidelity
from squeeze.benchmarks.base import Options
from squeeze.benchmarks.registry import BENCHMARKS
from squeeze.benchmarks.scores import difference
from squeeze.engine.loss_curves import MULTIPLES, TAIL
from squeeze.evictors import make_evictor
from squeeze.models import loading, sources

NEW_TOKENS, AT_ONCE = 64, 20


class Kept:
    """A prompt, and which of its tokens each KV head keeps in the ways that are run together.

    Args:
        layers: keys, values and scores of each layer, `(1, kv_heads, tokens, ...)`.
    """

    def __init__(self, layers):
        self.layers, self.evictor, self.known = layers, make_evictor("h2o", 0), {}
        self.length = layers[0][0].shape[2]

    def choose(self, budgets):
        """Budgets `(ways, layers, kv_heads)` from here on; `masks` are `(ways, kv_heads, tokens)` of each layer."""
        self.masks = [
            torch.stack([torch.stack([self.head(layer, *one) for one in enumerate(way[layer])]) for way in budgets])
            for layer in range(len(self.layers))
        ]

    def head(self, layer, head, budget):
        key = layer, head, budget
        if key not in self.known:
            kept = self.evictor.keep(self.length, budget, self.layers[layer][2][0, head : head + 1])
            self.known[key] = torch.zeros(self.length, dtype=torch.bool).index_fill_(0, kept.flatten(), True)
        return self.known[key]


def attend(module, queries, keys, values, attention_mask, scaling, kept, **_):
    """Attention of a text over what is kept of the prompt and over itself, causally."""
    ways, heads, new, _ = queries.shape
    past_keys, past_values, _ = kept.layers[module.layer_idx]
    keys, values = (
        torch.cat([past.expand(ways, -1, -1, -1), own], dim=2)
        for past, own in ((past_keys, keys), (past_values, values))
    )
    past = kept.masks[module.layer_idx][:, :, None].expand(-1, -1, new, -1)
    causal = torch.ones(new, new, dtype=torch.bool).tril().expand(*past.shape[:3], -1)
    mask = torch.cat([past, causal], dim=-1).repeat_interleave(heads // past.shape[1], dim=1)
    output = scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scaling, enable_gqa=True)
    return output.transpose(1, 2), None


def divergences(model, layers, text, full, budgets):
    """Mean KL divergence from the full cache over a text, for budgets `(ways, layers, kv_heads)`."""
    kept, found = Kept(layers), []
    for first in range(0, len(budgets), AT_ONCE):
        some = budgets[first : first + AT_ONCE]
        kept.choose(some)
        positions = (kept.length + torch.arange(len(text))).expand(len(some), -1)
        inputs = text.expand(len(some), -1)
        model.set_attn_implementation("kept")
        logits = model(inputs, position_ids=positions, use_cache=False, kept=kept).logits
        model.set_attn_implementation("sdpa")
        logprobs = logits.float().log_softmax(dim=-1)
        found += (full.exp() * (full - logprobs)).sum(dim=-1).mean(dim=-1).tolist()
    return found


def prefill(model, tokens):
    """Keys, values and scores of each layer."""
    with squeezed(model, SqueezeConfig("h2o", "1", "1")) as run:
        return run.prefill(tokens[None]).layers


def loss_curves(model, tokens, share, heads, per_head):
    """Losses of layers, or of KV heads, `(groups, multiples)`; all others keep `share`."""
    length, layers = len(tokens) - TAIL, model.config.num_hidden_layers
    held, tail = prefill(model, tokens[:length]), tokens[length:]
    full = model(tokens[None], use_cache=False, logits_to_keep=TAIL).logits[0].float().log_softmax(dim=-1)
    sizes = [min(max(int(one * share * length), 2), length) for one in MULTIPLES]
    groups = layers * heads if per_head else layers
    ways = np.full((groups, len(sizes), layers, heads), sizes[MULTIPLES.index(1)])
    for group, index in np.ndindex(groups, len(sizes)):
        layer, head = divmod(group, heads) if per_head else (group, slice(None))
        ways[group, index, layer, head] = sizes[index]
    found = divergences(model, held, tail, full, ways.reshape(-1, layers, heads).tolist())
    return np.array(found).reshape(groups, len(sizes))


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ini_size", default="0.2")
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--datasets", default="")
    parser.add_argument("--requests", help="of HELM's XSum, as pred.py takes them")
    parser.add_argument("--first", type=int, default=0, help="rows from this one on")
    parser.add_argument("--last", type=int, default=8, help="rows before this one")
    parser.add_argument("--max_length", type=int, default=2000, help="tokens of a prompt of LongBench")
    args = parser.parse_args()
    AttentionInterface.register("kept", attend)
    source = sources.resolve("SmolLM2-135M", None)
    device = devices.pick_device("cpu", 0)
    model, tokenizer = loading.load(sources.fetch(source), device, torch.float32, "auto")
    heads, share = model.config.num_key_value_heads, Fraction(args.ini_size)

    def prompts(task, dataset, location, limit=8192):
        benchmark = BENCHMARKS[task]
        data, options = benchmark.read(dataset, location), Options(max_length=limit, model_name=source.name)
        return benchmark.encode(tokenizer, data, len(data.rows), options)

    known = {False: [], True: []}
    own = Path(__file__).parent.parent / "data/longbench"
    for dataset in tqdm(calibrate.DATASETS.split(","), desc="loss curves", unit="prompt"):
        tokens = prompts("Long", dataset, own)[0].tokens
        for per_head, found in known.items():
            found.append(loss_curves(model, tokens, share, heads, per_head))
    kl = {"uniform": [], "by layer": [], "by layer and KV head": []}
    chosen = []
    for dataset in filter(None, args.datasets.split(",")):
        chosen += prompts("Long", dataset, args.data_dir, args.max_length)[args.first : args.last]
    if args.requests:
        chosen += prompts("xsum", "xsum", args.requests)[args.first : args.last]
    for prompt in tqdm(chosen, desc="prompts", unit="prompt"):
        settings = dict(prompt.settings)
        settings["max_new_tokens"] = min(settings["max_new_tokens"], NEW_TOKENS)
        answer = fidelity.answer(model, [prompt.tokens], settings)
        if len(answer.logprobs) < 2:  # nothing follows on the first token
            continue
        length = len(prompt.tokens)
        by = {}
        for per_head, found in known.items():
            groups = len(found[0])  # of one width: layers, or heads
            facts = PromptFacts(length, (length,) * groups, (length,) * groups, (1,) * groups, 2)
            by[per_head] = curves.budgets(MULTIPLES, np.array(found), share, facts).tokens
        layers = len(by[False])
        budgets = [
            [[int(share * length)] * heads] * layers,
            [[one] * heads for one in by[False]],
            np.array(by[True]).reshape(layers, heads).tolist(),
        ]
        text, full = answer.tokens[0][: len(answer.logprobs) - 1], torch.cat(answer.logprobs[1:])
        found = divergences(model, prefill(model, prompt.tokens), text, full, budgets)
        for those, one in zip(kl.values(), found, strict=True):
            those.append(one)
    for name, found in kl.items():
        for other in kl:
            if other != name:
                mean, low, high = difference(kl[other], found)
                print(f"{name}: KL {statistics.fmean(found):.4f}, less {other} {mean:+.4f} [{low:+.4f}, {high:+.4f}]")
    print(f"{len(chosen)} prompts, ini_size {args.ini_size}")


if __name__ == "__main__":
    main()
