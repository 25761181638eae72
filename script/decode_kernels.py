"""How to decode: grouped products, PyTorch's fused attention or flash-attn, timed on one layer's buffer.

    python script/decode_kernels.py
    python script/decode_kernels.py --device cpu

One new token a sequence in a layer that StreamingLLM has cut; heads of SmolLM2-135M and of Llama-3-8B; rows of one
length, or ragged, for which on a GPU sdpa stands for PyTorch's varlen_attn, in half precision alone. Microseconds, the
median of 30.
`squeeze.engine.kernels.decode_kernel` chooses by what this showed.
"""

import argparse
import importlib.util
import os
import statistics
import sys
import timeit
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from squeeze.threads import settings

os.environ |= settings()

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from squeeze import SqueezeConfig, squeezed
from squeeze.cli.tables import table
from squeeze.engine.attention import Rule
from squeeze.engine.decode_attention import decode
from squeeze.engine.kernels import FLASH_DTYPES

HEADS = {"SmolLM2-135M": (9, 3, 64), "Llama-3-8B": (32, 8, 128)}
SHAPES = ((1, 1536), (16, 1536), (16, 7000), (120, 1000))
KERNELS = {"cuda": ("grouped", "sdpa", "flash"), "cpu": ("grouped", "sdpa by group")}


@torch.inference_mode()
def microseconds(call, device, repeats=30, warm_up=5):
    if device.type != "cuda":
        return 1e6 * statistics.median(timeit.repeat(call, number=1, repeat=warm_up + repeats)[warm_up:])
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(warm_up + repeats)]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(1000 * start.elapsed_time(end) for start, end in events[warm_up:])


def cut_layer(heads, kv_heads, head_dim, batch, slots, dtype, device, ragged):
    """One attention layer that is cut and has taken in a token, and the keys and values that this one attends to.

    With `ragged` every row (a KV head of a sequence) has a budget of its own, up to `slots`.
    """
    config = LlamaConfig(
        hidden_size=heads * head_dim,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=8,
    )
    with device:
        model = LlamaForCausalLM(config).to(dtype).eval()
    with squeezed(model, SqueezeConfig("streaming", budgets=[slots])) as run:
        cache = run.cache(8)
        cache.begin(batch, slots, None)
        [layer] = cache.squeezed
        options = {"device": device, "dtype": dtype}
        layer.fill(*(torch.randn(batch, kv_heads, slots, head_dim, **options) for _ in range(2)), torch.empty(0))
        budgets = np.full((batch, kv_heads), slots)
        if ragged:
            budgets -= np.random.default_rng(0).integers(0, slots // 2, budgets.shape)
        cache.compress([budgets])
        with cache.step(batch):
            given = layer.update(*(torch.randn(batch, kv_heads, 1, head_dim, **options) for _ in range(2)))
    return layer, *given


def measure(heads, kv_heads, head_dim, batch, slots, dtype, device, ragged):
    """Microseconds of each kernel that takes this."""
    layer, *attended = cut_layer(heads, kv_heads, head_dim, batch, slots, dtype, device, ragged)
    queries = torch.randn(batch, heads, 1, head_dim, device=device, dtype=dtype)
    found, rule = {}, Rule(head_dim**-0.5)
    for layer.kernel in KERNELS[device.type]:
        half = dtype in FLASH_DTYPES
        if layer.kernel == "flash" and (ragged or not half or importlib.util.find_spec("flash_attn") is None):
            continue
        if layer.kernel == "sdpa" and ragged and not half:
            continue
        found[layer.kernel] = f"{microseconds(lambda: decode(queries, *attended, layer, rule, False), device):.0f}"
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--short", action="store_true", help="one small shape, to see that it runs")
    args = parser.parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("error: these timings need a GPU that PyTorch finds")
    device, lines = torch.device(args.device), []
    for name, heads in HEADS.items():
        for batch, slots in ((2, 64),) if args.short else SHAPES:
            for dtype in (torch.float32, torch.bfloat16):
                for ragged in (False, True):
                    line = {"heads of": name, "batch": str(batch), "tokens": str(slots)}
                    line |= {"dtype": str(dtype)[6:], "lengths": "ragged" if ragged else "even"}
                    found = measure(*heads, batch, slots, dtype, device, ragged)
                    lines.append(line | dict.fromkeys(KERNELS[device.type], "-") | found)
    print(torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU", "PyTorch", torch.__version__)
    print(table(list(lines[0]), lines))


if __name__ == "__main__":
    main()
