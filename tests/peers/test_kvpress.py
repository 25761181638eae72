"""The tokens that are kept of real prompts, against kvpress itself, in an environment of its own.

python3.11 -m venv .venv-peers && .venv-peers/bin/pip install -r requirements-peers.txt
script/test.sh -m slow tests/peers
"""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

from squeeze import Uniform, squeezed
from squeeze.evictors import make_evictor

PYTHON = Path(os.environ.get("PEER_PYTHON", ROOT / ".venv-peers/bin/python"))
SHARE, TOKENS = 0.2, 800

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="kvpress has an environment of its own: requirements-peers.txt"),
]


@pytest.fixture(scope="module")
def texts(tokenizer):
    """Eight real prompts of four tasks."""
    found = []
    for dataset in ("samsum", "lcc", "passage_retrieval_en", "repobench-p"):
        rows = [
            json.loads(line) for line in (ROOT / f"data/longbench/{dataset}.jsonl").read_text("utf-8").splitlines()
        ]
        found += [tokenizer(row["context"] + row["input"]).input_ids[:TOKENS] for row in rows[:2]]
    assert all(len(text) == TOKENS for text in found), "so that a fifth is whole tokens"
    return found


@pytest.fixture(scope="module")
def peers(texts, tmp_path_factory):
    """What kvpress keeps, by method and prompt."""
    place = tmp_path_factory.mktemp("kvpress")
    (place / "prompts.json").write_text(json.dumps(texts))
    script = Path(__file__).with_name("kvpress_kept.py")
    given = [ROOT / "models/SmolLM2-135M", place / "prompts.json", str(SHARE), place / "kept.npz"]
    done = subprocess.run(
        [PYTHON, script, *given], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ""}
    )
    assert done.returncode == 0, done.stderr
    return np.load(place / "kept.npz")


def kept_here(model, method, prompt):
    """Positions `(layers, kv_heads, kept)`, ascending, by the keys that a prefill leaves."""
    ids, places = torch.tensor([prompt]), []
    with torch.no_grad():
        whole = model(ids, use_cache=True).past_key_values
        with squeezed(model, method, Uniform(SHARE)) as run:
            cache = run.cache(1)
            model(ids, past_key_values=cache)
    for own, layer in zip(cache.squeezed, whole.layers, strict=True):
        [(heads, _)] = own.layout.pieces(0)  # all with one budget
        places.append(torch.cdist(heads.view(own.keys), layer.keys[0]).argmin(-1).sort(-1).values)
    return torch.stack(places).numpy()


def heavy_hitters(scores):
    """H2O's tokens from the scores of ObservedAttentionPress.

    The press divides the attention that a token has gathered by how many queries see it, and keeps no tokens for being
    recent. The paper does not divide, and half of its budget is for recent tokens.
    """
    tokens = scores.shape[-1]
    budget = round(SHARE * tokens)
    recent = budget // 2
    sums = scores * np.arange(tokens, 0, -1)
    heavy = np.sort(np.argsort(-sums[..., : tokens - recent], axis=-1)[..., : budget - recent], axis=-1)
    last = np.broadcast_to(np.arange(tokens - recent, tokens), (*heavy.shape[:2], recent))
    return np.concatenate([heavy, last], axis=-1)


@pytest.mark.parametrize(
    "name", ["snapkv", "tova", "knorm", "keydiff", "expected_attention", "lagkv", "streaming", "h2o"]
)
def test_the_tokens_kept_are_those_of_kvpress(embedded, texts, peers, name):
    same = total = 0
    for number, prompt in enumerate(texts):
        found, expected = kept_here(embedded("llama"), make_evictor(name, 4), prompt), peers[f"{name}-{number}"]
        expected = heavy_hitters(expected) if name == "h2o" else expected
        assert found.shape[:2] == expected.shape[:2] and found.shape[2] == expected.shape[2] == round(
            SHARE * len(prompt)
        )
        for layer in range(found.shape[0]):
            for head in range(found.shape[1]):
                same += len(set(found[layer, head].tolist()) & set(expected[layer, head].tolist()))
        total += expected.size
    print(f"{name}: {same / total:.5f} of {total} positions")
    assert same >= 0.995 * total
