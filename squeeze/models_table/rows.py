"""A model's row of the table: what it was put through, and what the probe found out about it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from transformers import PreTrainedModel

from squeeze.engine.findings import AttentionLayer, Findings
from squeeze.engine.probe import probe
from squeeze.errors import InputError
from squeeze.models_table.checks import (
    EVICTORS,
    STEPS,
    Verdict,
    check_chunks,
    check_importance,
    check_method,
    verdict,
)
from squeeze.models_table.reference import Reference

CHECKS = (*(evictor.name for evictor in EVICTORS), "prefill_chunk", "similarities")
COLUMNS = ("model", *CHECKS, "stream", "positions", "attention", "why not")


def row(name: str, model: PreTrainedModel, steps: int = STEPS) -> dict[str, str]:
    """Put a model through every check; a cell of text for each of `COLUMNS`.

    Args:
        name: of the row.
        steps: how many tokens are decoded.
    """
    try:
        findings = probe(model)
    except InputError as error:
        return dict.fromkeys(COLUMNS, "") | dict.fromkeys(CHECKS, "–") | {"model": name, "why not": str(error)}
    layers = findings.layers
    reference = Reference(model, layers)
    verdicts = {evictor.name: verdict(check_method, model, reference, evictor, steps) for evictor in EVICTORS}
    verdicts["prefill_chunk"] = verdict(check_chunks, model, layers)
    verdicts["similarities"] = verdict(check_importance, model)
    return {
        "model": name,
        **{check: verdicts[check].cell for check in CHECKS},
        "stream": _different(layer.residual.rule if layer.residual else "not found" for layer in layers),
        "positions": _different(layer.rotation.described() if layer.rotation else layer.encoding for layer in layers),
        "attention": ", ".join(_attention(findings)),
        "why not": _reasons(verdicts),
    }


def _reasons(verdicts: dict[str, Verdict]) -> str:
    """Each reason once, after the checks that it is of."""
    by_reason: dict[str, list[str]] = {}
    for check, found in verdicts.items():
        if found.reason is not None:
            by_reason.setdefault(found.reason, []).append(check)
    if len(by_reason) == 1 and len(verdicts) == len(next(iter(by_reason.values()))):
        return next(iter(by_reason))
    said = ((", ".join(checks), reason) for reason, checks in by_reason.items())
    return "; ".join(reason if reason.startswith(checks) else f"{checks}: {reason}" for checks, reason in said)


def _attention(findings: Findings) -> Iterable[str]:
    """What is not plain about the layers."""
    layers = findings.layers
    yield from _counted(layers, {layer: f"window {layer.window}" for layer in layers if layer.window})
    yield from _counted(layers, {layer: f"chunks of {layer.chunk}" for layer in layers if layer.chunk})
    yield from _counted(layers, {layer: f"softcap {layer.softcap:g}" for layer in layers if layer.softcap})
    yield from _counted(layers, {layer: "sink logits" for layer in layers if layer.sinks})
    yield from _counted(layers, {layer: "a cache that others share" for layer in layers if len(layer.users) > 1})
    yield from _counted(layers, {layer: "code of its own" for layer in layers if not layer.interface})
    yield from _counted(layers, {layer: "a state beside" for layer in layers if layer.hybrid})
    if findings.others:
        yield f"beside {findings.others} layers that keep a state"


def _counted(layers: Sequence[AttentionLayer], marked: dict[AttentionLayer, str]) -> Iterable[str]:
    for mark in dict.fromkeys(marked.values()):
        count = list(marked.values()).count(mark)
        yield mark if count == len(layers) else f"{mark} in {count} of {len(layers)}"


def _different(texts: Iterable[str]) -> str:
    return " / ".join(dict.fromkeys(texts))
