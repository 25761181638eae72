"""The code that a page shows runs as it stands there."""

import re

import torch
from conftest import ROOT, random_model

from squeeze import SqueezeConfig, squeezed, threads

PAGE = (ROOT / "docs/library.md").read_text("utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_the_pages_own_loop_gives_what_generate_gives():
    model, ids = random_model("llama"), torch.arange(3, 90)[None]
    with squeezed(model, SqueezeConfig("streaming", "0.3", "0.1")):
        expected = model.generate(ids, max_new_tokens=32, do_sample=False, eos_token_id=None)
    [loop] = [block for block in BLOCKS if "run.cache(" in block]
    seen = {"torch": torch, "model": model, "ids": ids, "squeezed": squeezed, "SqueezeConfig": SqueezeConfig}
    exec(loop, seen)
    assert seen["cache"].steps == 31
    assert seen["output"].logits[:, -1].argmax(-1).tolist() == expected[:, -1].tolist()


def test_the_pages_other_blocks_run(monkeypatch):
    monkeypatch.setattr("os.environ", dict.fromkeys(threads.POLICIES, "ACTIVE"))
    model = random_model("llama")
    for block in BLOCKS:
        if "run.cache(" not in block:
            exec(block, {"model": model, "inputs": {"input_ids": torch.arange(3, 90)[None]}})
