"""How to decode on a GPU: grouped products, PyTorch's fused attention or flash-attn, timed on one layer's buffer.

    python script/decode_kernels.py

One new token a sequence; heads of SmolLM2-135M and of Llama-3-8B; buffers of one length, or ragged. Microseconds, the
median of 30. `squeeze.engine.kernels.decode_kernel` chooses by what this showed.
"""

import importlib.util
import os
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent.parent))

from squeeze.threads import settings

os.environ |= settings()

import torch

from squeeze.cli.tables import table
from squeeze.engine.attention import decode
from squeeze.engine.kernels import FLASH_DTYPES
from squeeze.evictors import make_evictor

HEADS = {"SmolLM2-135M": (9, 3, 64), "Llama-3-8B": (32, 8, 128)}
SHAPES = ((1, 1536), (16, 1536), (16, 7000), (120, 1000))
KERNELS = ("grouped", "sdpa", "flash")


def microseconds(call, repeats=30, warm_up=5):
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(warm_up + repeats)]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(1000 * start.elapsed_time(end) for start, end in events[warm_up:])


def measure(heads, kv_heads, head_dim, batch, slots, dtype, ragged):
    """Microseconds of each kernel that takes this."""
    options = {"device": "cuda", "dtype": dtype}
    queries = torch.randn(batch, heads, 1, head_dim, **options)
    keys, values = (torch.randn(batch, kv_heads, slots, head_dim, **options) for _ in range(2))
    lengths = torch.full((batch, 1), slots - 5 if ragged else slots, device="cuda")
    layer = SimpleNamespace(keys=keys, values=values, longest=slots, ragged=ragged, lengths=lengths)
    layer.evictor, found = make_evictor("streaming", 4), {}
    for layer.kernel in KERNELS:
        if layer.kernel == "flash" and (dtype not in FLASH_DTYPES or importlib.util.find_spec("flash_attn") is None):
            continue
        found[layer.kernel] = f"{microseconds(lambda: decode(queries, layer, head_dim**-0.5)):.0f}"
    return found


def main():
    if not torch.cuda.is_available():
        sys.exit("error: these timings need a GPU that PyTorch finds")
    lines = []
    for name, heads in HEADS.items():
        for batch, slots in SHAPES:
            for dtype in (torch.float32, torch.bfloat16):
                for ragged in (False, True):
                    line = {"heads of": name, "batch": str(batch), "tokens": str(slots)}
                    line |= {"dtype": str(dtype)[6:], "lengths": "ragged" if ragged else "even"}
                    lines.append(line | dict.fromkeys(KERNELS, "-") | measure(*heads, batch, slots, dtype, ragged))
    print(torch.cuda.get_device_name(), "PyTorch", torch.__version__)
    print(table(list(lines[0]), lines))


if __name__ == "__main__":
    main()
