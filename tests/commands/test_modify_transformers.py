"""The check command: passes here, and names the line that fails and what to do elsewhere."""

import pytest
import torch
from transformers import AttentionInterface

import modify_transformers
from squeeze import compatibility
from squeeze.allocations.base import Budgets
from squeeze.engine import decode_attention, patch, probe
from squeeze.engine import prefill_attention as prefilling


def test_this_environment_passes(capsys):
    assert modify_transformers.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:-1]] == [
        "ok      transformers version",
        "ok      attention interface",
        "ok      probe",
        *(f"ok      {family}" for family in ("llama", "mistral", "gemma3_text", "gpt_neox", "qwen3")),
    ]


@pytest.mark.parametrize(
    ("break_it", "line", "reason"),
    [
        (lambda m: m.setattr(compatibility, "version", lambda name: "4.34.0"), "transformers version", "4.34.0"),
        (
            lambda m: m.setattr(AttentionInterface, "register", lambda *_: None),
            "attention interface",
            "AttentionInterface",
        ),
        (lambda m: m.setattr(probe, "find_residuals", lambda layers, *_: [None] * len(layers)), "probe", "llama"),
        (
            lambda m: m.setattr(prefilling, "prefill", nothing_attended),
            "attention interface",
            "differ from its own",
        ),
        (
            lambda m: m.setattr(patch, "self_check", lambda *_: m.setattr(decode_attention, "decode", nothing)),
            "llama",
            "differs",
        ),
        (lambda m: m.setattr(patch, "prepare_cache", lambda *_: None), "llama", "names its cache"),
        (lambda m: m.setattr(patch.SqueezedModel, "_allocate", whole), "llama", "holds"),
    ],
    ids=["version", "interface", "probe", "prefill", "decode", "no-generate", "no-budgets"],
)
def test_a_broken_environment_fails_on_its_line(monkeypatch, capsys, break_it, line, reason):
    break_it(monkeypatch)
    assert modify_transformers.main([]) == 1
    failed, advice = capsys.readouterr().out.splitlines()[-2:]
    assert failed.startswith(f"FAILED  {line}")
    assert reason in failed
    assert "pip install" in advice


def nothing_attended(queries, keys, values, *_, observed, **__):
    """A prefill whose attention gives zeros."""
    return torch.zeros_like(queries), torch.zeros(keys.shape[:3] if observed != 0 else 0)


def nothing(queries, *_):
    """A decode step whose attention gives zeros."""
    return torch.zeros_like(queries)


def whole(run, config, length, max_new_tokens, similarities, **measured):
    """An allocation that gives every layer room for all tokens."""
    return Budgets([length + max_new_tokens] * 4)
