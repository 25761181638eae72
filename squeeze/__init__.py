"""KV-cache budgets per layer for Llama and Mistral: SqueezeAttention (arXiv 2404.04793) and its peers."""

from typing import TYPE_CHECKING, Any

from squeeze.cli import interrupt

if interrupt.is_command():
    interrupt.ends()

from squeeze.config import SqueezeConfig
from squeeze.errors import InputError

if TYPE_CHECKING:
    from squeeze.engine.patch import squeezed

__all__ = ["InputError", "SqueezeConfig", "squeezed"]


def __getattr__(name: str) -> Any:
    """`squeezed` is imported when it is first asked for: torch and transformers take seconds, `--help` should not."""
    if name != "squeezed":
        raise AttributeError(f"module {__name__} has no attribute {name}")
    from squeeze.compatibility import check_transformers

    check_transformers()
    from squeeze.engine.patch import squeezed

    return squeezed
