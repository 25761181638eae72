"""Facts about prompts in models whose layers are alike, and in those whose layers differ."""

from squeeze import PromptFacts


def alike(layers, length, cap, minimum, similarities=None, width=384):
    """Layers that all reach the whole prompt."""
    return PromptFacts(length, (cap,) * layers, (length,) * layers, (width,) * layers, minimum, similarities)
