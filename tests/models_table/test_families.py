"""Models of many architectures through every check of the table, and what docs/models.md says of them.

With `-m slow` all that the page has.
"""

import re
from importlib.metadata import version

import pytest
from conftest import ROOT

from squeeze import H2O
from squeeze.engine import prefill
from squeeze.engine.probe import probe
from squeeze.engine.rotation import Rotation
from squeeze.models_table import checks
from squeeze.models_table.checks import check_importance, check_method, verdict
from squeeze.models_table.reference import Reference
from squeeze.models_table.rows import CHECKS, COLUMNS, row
from squeeze.models_table.zoo import ZOO, build

#: Name → checks that cannot be made, of those that always run.
FAMILIES = {
    **dict.fromkeys(("llama", "mistral (window)", "qwen3", "gemma3_text"), ()),
    **dict.fromkeys(("phi", "phi3", "olmo2", "granite", "cohere2", "starcoder2", "stablelm", "gpt_neox"), ()),
    **dict.fromkeys(("gpt_oss", "llama4_text", "deepseek_v3"), ()),
    **dict.fromkeys(("opt", "gpt2"), ("streaming",)),
    **dict.fromkeys(("jamba", "falcon_h1", "falcon"), ("prefill_chunk",)),
    "bloom": CHECKS,
}


#: Of an older transformers: models whose own code makes masks or caches that nobody asked for.
OLDER = {"5.0": ("stablelm", "opt", "jamba", "falcon_h1")}
RELEASE = ".".join(version("transformers").split(".")[:2])
#: The page's own release; rows of others may differ in what they say.
DOCUMENTED = f"with transformers {version('transformers')} " in (ROOT / "docs/models.md").read_text("utf-8")


def documented():
    """Rows of the table in docs/models.md, by model."""
    lines = [line for line in (ROOT / "docs/models.md").read_text("utf-8").splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return {cell[0]: dict(zip(COLUMNS, cell, strict=True)) for cell in cells if len(cell) == len(COLUMNS)}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_computes_what_it_should(name):
    found, gaps = row(name, build(name)), CHECKS if name in OLDER.get(RELEASE, ()) else FAMILIES[name]
    assert {check for check in CHECKS if found[check] != "ok"} == set(gaps), found["why not"]
    assert "WRONG" not in found.values()
    assert not DOCUMENTED or documented()[name] == found


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ZOO if name not in FAMILIES])
def test_every_model_of_the_zoo_is_as_documented(name):
    found = row(name, build(name))
    assert "WRONG" not in found.values(), found["why not"]
    assert not DOCUMENTED or documented()[name] == found


def test_the_page_has_every_model():
    assert list(documented())[2:] == list(ZOO)  # after the head and its line


def test_an_error_of_the_engine_is_seen(monkeypatch):
    model = build("qwen3")
    reference = Reference(model, probe(model).layers)
    window, heavy, streaming = checks.EVICTORS
    real = prefill.similarity
    with monkeypatch.context() as patch:  # evicts the oldest
        patch.setattr(H2O, "slot", lambda self, position, budget, held, scores: held.argmin(-1))
        found = verdict(check_method, model, reference, heavy)
        assert found.cell == "WRONG" and re.match(r"with budgets \[.*\], log-probabilities differ by", found.reason)
    with monkeypatch.context() as patch:
        patch.setattr(
            Rotation, "__call__", lambda self, vectors, positions: vectors.expand(len(positions), *vectors.shape[1:])
        )
        assert verdict(check_method, model, reference, window).cell == "ok"
        assert verdict(check_method, model, reference, streaming).cell == "WRONG"
    with monkeypatch.context() as patch:  # padding counts
        patch.setattr(prefill, "similarity", lambda *given: real(*given[:2], [41, 41], [41, 41]))
        assert verdict(check_importance, model).cell == "WRONG"
