"""The check command: passes here, and names the line that fails and what to do elsewhere."""

import pytest

import modify_transformers
from squeeze import compatibility
from squeeze.allocations.base import Budgets
from squeeze.engine import decoder_layer as layer
from squeeze.engine import patch


def test_this_environment_passes(capsys):
    assert modify_transformers.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:-1]] == [
        "ok      transformers version",
        "ok      attention classes",
        *(f"ok      {architecture}" for architecture in ("llama", "llama", "mistral", "mistral")),
    ]


@pytest.mark.parametrize(
    ("break_it", "line", "reason"),
    [
        (lambda m: m.setattr(compatibility, "version", lambda name: "4.34.0"), "transformers version", "4.34.0"),
        (
            lambda m: m.setattr(layer, "ATTENTION_ATTRIBUTES", ("q_proj", "qkv_proj")),
            "attention classes",
            "qkv_proj",
        ),
        (
            lambda m: m.setattr(layer, "apply_rotary_pos_emb", lambda q, k, *_: (q, k)),
            "llama: full budget",
            "differs",
        ),
        (
            lambda m: m.setattr(patch, "prepare_cache", lambda *_: None),
            "llama: full budget",
            "names its cache",
        ),
        (lambda m: m.setattr(patch.SqueezedModel, "_allocate", whole), "llama: own budgets", "holds"),
    ],
    ids=["version", "attributes", "no-rope", "no-generate", "no-budgets"],
)
def test_a_broken_environment_fails_on_its_line(monkeypatch, capsys, break_it, line, reason):
    break_it(monkeypatch)
    assert modify_transformers.main([]) == 1
    failed, advice = capsys.readouterr().out.splitlines()[-2:]
    assert failed.startswith(f"FAILED  {line}")
    assert reason in failed
    assert "pip install" in advice


def whole(run, losses, similarities, length, max_new_tokens):
    """An allocation that gives every layer room for all tokens."""
    return Budgets([length + max_new_tokens] * 4)
