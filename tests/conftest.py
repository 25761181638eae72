"""Models and prompts shared by the tests. Nothing here may wait for a hub."""

import json
import os
import signal
from pathlib import Path

from squeeze.threads import cores, settings

os.environ["HF_HUB_OFFLINE"] = "1"
# Of the processes of pytest-xdist each has its share of the cores.
os.environ |= settings(cores() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)))

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

# Ctrl-C as in a terminal: what a shell's script starts in the background ignores it, and so do its children.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parent.parent
EMBEDDED = {"llama": "SmolLM2-135M", "mistral": "SmolLM2-135M-Mistral"}


@pytest.fixture(scope="session")
def embedded():
    """`embedded("llama")`: the real model of an architecture, loaded once."""
    loaded = {}

    def load(architecture):
        folder = ROOT / "models" / EMBEDDED[architecture]
        assert folder.exists(), f"{folder} is missing: bash script/setup.sh makes it"
        if architecture not in loaded:
            loaded[architecture] = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        return loaded[architecture]

    return load


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "models" / EMBEDDED["llama"])


@pytest.fixture(scope="session")
def prompts(tokenizer):
    """Token ids of the demo prompts, cut to different lengths (160 to 430 tokens)."""
    rows = [json.loads(line) for line in (ROOT / "data/longbench/samsum.jsonl").read_text("utf-8").splitlines()]
    texts = [row["context"] + "\n\n" + row["input"] for row in rows]
    return [tokenizer(text, return_tensors="pt").input_ids[0, -(160 + 15 * i) :] for i, text in enumerate(texts[:19])]


def random_model(architecture, seed=0, **settings):
    """A tiny model with random weights, other head counts than the embedded one, and sharp attention."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": 199,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 5,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | settings
    if architecture == "llama":
        return LlamaForCausalLM(LlamaConfig(**settings)).eval()
    return MistralForCausalLM(MistralConfig(**({"sliding_window": None} | settings))).eval()
