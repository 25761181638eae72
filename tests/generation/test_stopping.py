"""Where generated text ends: the texts of tokens, and stop strings that they cut in any way."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from squeeze.generation.stopping import StopStrings, cut, decode, pieces

TEXT = "Zürich’s 3 “naïve” cafés 🙂👩‍👩‍👧 sold 北京烤鸭 — ###\n\n### Article"


@given(st.text(max_size=30))
def test_the_texts_of_tokens_make_the_text(tokenizer, text):
    tokens = tokenizer(TEXT + text, return_tensors="pt").input_ids[0]
    found = pieces(tokenizer, tokens)
    assert len(found) == len(tokens)
    assert "".join(found) == decode(tokenizer, tokens)


@given(st.lists(st.integers(0, 49151), max_size=20))
def test_so_they_do_for_any_tokens(tokenizer, tokens):
    found = pieces(tokenizer, torch.tensor(tokens, dtype=torch.long))
    assert "".join(found) == decode(tokenizer, torch.tensor(tokens, dtype=torch.long))


def test_a_token_inside_a_character_adds_nothing(tokenizer):
    tokens = tokenizer("🙂!", return_tensors="pt").input_ids[0]
    assert len(tokens) > 2
    assert pieces(tokenizer, tokens) == [""] * (len(tokens) - 2) + ["🙂", "!"]


def test_a_character_cut_off_by_the_end_is_shown_as_such(tokenizer):
    tokens = tokenizer("ok 𓀀", return_tensors="pt").input_ids[0][:-1]
    assert "".join(pieces(tokenizer, tokens)) == decode(tokenizer, tokens)
    assert decode(tokenizer, tokens).endswith("\ufffd")


@given(
    st.lists(st.text("ab#\n", max_size=4), max_size=12), st.lists(st.text("ab#\n", min_size=1, max_size=4), max_size=3)
)
def test_a_cut_is_exact_however_the_text_is_divided(texts, stop):
    text = "".join(texts)
    first = [index for index in range(len(text)) if any(text.startswith(word, index) for word in stop)]
    kept, stopped = cut(texts, stop)
    assert stopped == bool(first)
    assert "".join(kept) == (text[: first[0]] if first else text)
    assert all(piece == whole for piece, whole in zip(kept[:-1], texts, strict=False))
    assert texts[len(kept) - 1].startswith(kept[-1]) if kept else True


@pytest.mark.parametrize("stop", [["###"], ["\n\n#"], ["le", "##"], ["never", "🙂"]])
def test_generation_ends_with_the_first_token_that_completes_a_stop(tokenizer, stop):
    tokens = tokenizer(TEXT, return_tensors="pt").input_ids[0]
    whole = [count for count in range(1, len(tokens) + 1) if any(w in decode(tokenizer, tokens[:count]) for w in stop)]
    prompt = torch.tensor([7, 8, 9])
    rows = torch.stack([torch.cat([prompt, tokens]), torch.cat([prompt, tokens.flip(0) * 0 + 42])])
    stops = StopStrings(tokenizer, stop, rows=2, start=3)
    for count in range(1, len(tokens) + 1):
        ended = stops(rows[:, : 3 + count], None)
        assert ended.tolist() == [count >= whole[0], False]
    assert stops.ends == [whole[0], None]


def test_a_stop_in_the_prompt_stops_nothing(tokenizer):
    prompt = tokenizer("###\n", return_tensors="pt").input_ids
    new = tokenizer("# a", return_tensors="pt").input_ids
    stops = StopStrings(tokenizer, ["###"], rows=1, start=prompt.shape[1])
    assert not stops(torch.cat([prompt, new], dim=1), None).any()
