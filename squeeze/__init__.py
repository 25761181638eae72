"""KV-cache budgets per layer for Llama and Mistral: SqueezeAttention (arXiv 2404.04793) and its peers."""

from squeeze.config import InputError, SqueezeConfig
from squeeze.patch import squeezed

__all__ = ["InputError", "SqueezeConfig", "squeezed"]
