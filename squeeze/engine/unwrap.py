"""The model of transformers inside what PEFT, torch.compile or DistributedDataParallel made of it."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from squeeze.errors import InputError


def unwrap(model: Any) -> PreTrainedModel:
    """The causal language model of transformers that `model` is, or wraps.

    Raises:
        InputError: there is none, or PEFT puts learned tokens before every prompt.
    """
    inner = model
    while not isinstance(inner, PreTrainedModel):
        if getattr(getattr(inner, "active_peft_config", None), "is_prompt_learning", False):
            raise InputError(
                "a PEFT model with learned prompts or prefixes puts tokens before every prompt that a squeezed cache "
                "does not know of: use an adapter such as LoRA"
            )
        if hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        elif isinstance(getattr(inner, "_orig_mod", None), nn.Module):
            inner = inner._orig_mod
        elif isinstance(inner, nn.DataParallel) and len(inner.device_ids) > 1:
            raise InputError("DataParallel copies a model to every GPU and runs the copies: give squeezed its .module")
        elif isinstance(getattr(inner, "module", None), nn.Module):
            inner = inner.module
        else:
            raise InputError(f"squeezed takes a causal language model of transformers, got {type(model).__name__}")
    if not inner.can_generate():
        raise InputError(f"squeezed takes a causal language model, and a {type(inner).__name__} generates nothing")
    return inner
