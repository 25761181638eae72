"""Facts about prompts, in models whose layers are alike and in those whose layers differ."""

from fractions import Fraction

from hypothesis import strategies as st

from squeeze import PromptFacts

WIDTHS = st.sampled_from([96, 128, 192, 640])
fractions = st.integers(1, 1000).map(lambda n: Fraction(n, 1000))


def alike(layers, length, cap, minimum, similarities=None, width=384):
    """Layers that all reach the whole prompt."""
    return PromptFacts(length, (cap,) * layers, (length,) * layers, (width,) * layers, minimum, similarities)


@st.composite
def unlike(draw, most=12, widths=WIDTHS):
    """Layers with windows, chunks and widths of their own, or none; similarities among what is drawn."""
    layers = draw(st.integers(1, most))
    length, new = draw(st.integers(1, 600)), draw(st.integers(0, 100))
    windows = draw(st.lists(st.sampled_from([None, 3, 16, 100, 512]), min_size=layers, max_size=layers))
    return PromptFacts(
        length=length,
        caps=tuple(min(length + new, window or length + new) for window in windows),
        reach=tuple(min(length, window or length) for window in windows),
        widths=tuple(draw(st.lists(widths, min_size=layers, max_size=layers))),
        minimum=draw(st.integers(1, 6)),
        similarities=draw(st.lists(st.floats(-1, 1), min_size=layers, max_size=layers)),
    )


def weight(tokens, facts):
    """Numbers of keys and values that some tokens in each layer are."""
    return sum(count * width for count, width in zip(tokens, facts.widths, strict=True))
