"""Every eviction method with every allocation, as `pred.py` runs them."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiny import save_rows, save_tiny

import pred
from squeeze import InputError
from squeeze.allocations import ALLOCATIONS
from squeeze.benchmarks.longbench.data import generation_lengths
from squeeze.config import PER
from squeeze.evictors import EVICTORS
from squeeze.models import sources

LAYERS, HEADS = 5, 2


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A tiny model, a prompt, and 5 tokens to generate."""
    monkeypatch.setitem(generation_lengths(), "samsum", 5)
    save_tiny(tmp_path / "tiny")
    save_rows(tmp_path / "data", count=1, context="Ann: hey, did you get the tickets? Bob: no :( " * 10)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def curves(algorithm, heads):
    """Made-up loss curves of a method, where runs look for them."""
    source = sources.resolve("tiny")
    parts, made = LAYERS * (HEADS if heads else 1), EVICTORS.find(algorithm)
    losses = np.random.default_rng(0).random((2, 1, parts, 3)).cumsum(axis=3)[..., ::-1]
    content = {"version": 3, "algorithm": algorithm, "start_size": 4 if "sinks" in made.fields else None}
    content |= {"shares": ["1/2"], "multiples": ["1/2", "1", "2"], "loss": losses.tolist()}
    content |= {"model": sources.identity(source, sources.fetch(source))}
    content |= {"kv_heads": [HEADS] * LAYERS} if heads else {}
    path = Path(f"config/calibration/tiny-{algorithm}{'-heads' if heads else ''}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("per", [PER[0], *(pytest.param(per, marks=pytest.mark.slow) for per in PER[1:])])
@pytest.mark.parametrize("algorithm", EVICTORS.names)
def test_every_method_keeps_to_every_allocations_budgets(place, algorithm, per):
    """Each keeps its total to the token, or a sentence says why the two do not go together."""
    curves(algorithm, heads=per == "head")
    refused = set()
    for allocation in ALLOCATIONS.names:
        flags = ["--model", "tiny", "--pred", "Long", "--data_dir", "data", "--device", "cpu", "--dtype", "float32"]
        flags += ["--enable_squeeze", "--algorithm", algorithm, "--allocation", allocation, "--ini_size", "0.6"]
        flags += ["--KV_class3", "0.4"] if "class3" in ALLOCATIONS.find(allocation).fields else []
        flags += ["--per", per, "--datasets", "samsum"]
        try:
            pred.main(flags)
        except InputError as error:
            refused.add((allocation, str(error)))
            continue
        [published] = Path("pred_Long").rglob("samples/samsum.jsonl")
        for line in published.read_text().splitlines():
            stats = json.loads(line)["stats"]
            budgets = np.array(stats["budgets"])
            assert budgets.shape == ((LAYERS,) if per == "layer" else (LAYERS, HEADS))
            total, wanted = (
                budgets.sum() * LAYERS * HEADS // budgets.size,
                LAYERS * HEADS * 0.6 * stats["prompt_tokens"],
            )
            assert wanted - HEADS < total <= wanted or allocation == "paper"
            assert total <= stats["kv_bytes"] / (2 * 8 * 4) <= 1.02 * total
        Path("pred_Long").rename(f"{allocation}-{per}")
    kind = EVICTORS.find(algorithm).make({})
    if per == "head":
        assert {allocation for allocation, _ in refused} >= set(ALLOCATIONS.names) - {"calibrated", "measured"}
        assert len(refused) == len(ALLOCATIONS.names) - (0 if kind.heads_agree else 2)
    elif per == "adakv":
        assert len(refused) == (0 if kind.scores_prompts and not kind.heads_agree else len(ALLOCATIONS.names))
    else:
        assert not refused
