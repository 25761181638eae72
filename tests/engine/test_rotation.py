"""Rotations against complex numbers, and what is found out about keys that were made with a known one."""

from itertools import product

import pytest
import torch
from conftest import random_model

from squeeze.engine.rotation import Rotation, Rotations, inverse_frequencies
from squeeze.models_table.zoo import build

FREQUENCIES = 10000.0 ** (-torch.arange(0, 8, 2) / 8)
POSITIONS = (1, 2, 38)
WAYS = list(product((0, 4), (False, True), (1, -1)))


def turned(vector, rotation, position):
    """One vector, pair by pair."""
    result = vector.clone().double()
    for pair, frequency in enumerate(rotation.inv_freq.tolist()):
        first = rotation.start + (2 * pair if rotation.interleaved else pair)
        second = first + (1 if rotation.interleaved else len(rotation.inv_freq))
        angle = torch.tensor(rotation.direction * position * frequency, dtype=torch.float64)
        value = torch.complex(result[first], result[second]) * torch.polar(torch.ones((), dtype=torch.float64), angle)
        result[first], result[second] = value.real, value.imag
    return result


@pytest.mark.parametrize(("start", "interleaved", "direction"), WAYS)
def test_pairs_turn_like_complex_numbers(start, interleaved, direction):
    rotation = Rotation("keys", start, interleaved, direction, FREQUENCIES)
    vectors, positions = torch.randn(2, 3, 12), torch.tensor([[[5]], [[300]]])
    found = rotation(vectors, positions)
    for row, head in product(range(2), range(3)):
        expected = turned(vectors[row, head], rotation, positions[row].item())
        torch.testing.assert_close(found[row, head].double(), expected, atol=1e-4, rtol=1e-4)
    rest = [dim for dim in range(12) if not start <= dim < start + 8]
    assert torch.equal(found[..., rest], vectors[..., rest])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_whole_head_in_halves_turns_as_it_always_did_to_the_last_bit(dtype):
    vectors, positions = torch.randn(3, 2, 8).to(dtype), torch.tensor([[[1]], [[17]], [[4000]]])
    angles = positions.float() * FREQUENCIES
    first, second = vectors.float().chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    expected = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(dtype)
    found = Rotation("keys", 0, False, 1, FREQUENCIES)(vectors, positions)
    assert found.dtype == dtype and torch.equal(found, expected)


def cached(rotation, width=12):
    """Of three sequences of the same token, and another one: two heads."""
    still = torch.randn(1, 2, 1, width).repeat(4, 1, 1, 1)
    still[3] = torch.randn(2, 1, width)
    moved = torch.stack([rotation(row, torch.tensor([[p]])) for row, p in zip(still, (*POSITIONS, 1), strict=True)])
    return still, moved


def stream(hidden=16):
    same = torch.randn(1, 1, hidden).repeat(4, 1, 1)
    same[3] = torch.randn(1, hidden)
    return same


@pytest.mark.parametrize("part", ["keys", "values"])
@pytest.mark.parametrize(("start", "interleaved", "direction"), WAYS)
def test_a_rotation_is_found_by_its_numbers(part, start, interleaved, direction):
    rotation = Rotation(part, start, interleaved, direction, FREQUENCIES)
    other, right = FREQUENCIES / 4, FREQUENCIES.clone()
    rotations = Rotations([other, right], POSITIONS, 1e-4)
    still, moved = cached(rotation)
    both = (moved, still) if part == "keys" else (still, moved)
    encoding, found = rotations.find(stream(), *both)
    assert encoding == "rope" and found.inv_freq is right
    assert (found.part, found.start, found.interleaved, found.direction) == (part, start, interleaved, direction)
    assert rotations.find(stream(), *both)[1] is found, "layers that turn alike share a rotation"


def test_what_is_no_rotation():
    still, moved = cached(Rotation("keys", 0, False, 1, FREQUENCIES))
    rotations = Rotations([FREQUENCIES], POSITIONS, 1e-4)
    assert rotations.find(stream(), still, still) == ("none", None)
    assert rotations.find(torch.randn(4, 1, 16), moved, still) == ("absolute", None)
    assert rotations.find(stream(), moved, moved) == ("unknown", None)
    assert rotations.find(stream(), moved * torch.rand(12), still) == ("unknown", None)
    assert rotations.find(None, moved, still) == ("unknown", None)
    assert Rotations([], POSITIONS, 1e-4).find(stream(), moved, still) == ("unknown", None)
    assert Rotations([FREQUENCIES / 4], POSITIONS, 1e-4).find(stream(), moved, still) == ("unknown", None)


def expected_frequencies(kind):
    plain = 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    if kind == "linear":
        return plain / 4
    if kind == "llama3":  # Llama 3.1: long waves are stretched, short ones stay, those between are mixed
        turns = 64 * plain / (2 * torch.pi)
        smooth = ((turns - 1) / (4 - 1)).clamp(0, 1)
        return (1 - smooth) * plain / 4 + smooth * plain
    return plain


@pytest.mark.parametrize("kind", ["default", "linear", "llama3", "dynamic"])
def test_frequencies_are_the_models_own(kind):
    rope = {"rope_type": kind, "rope_theta": 10000.0}
    if kind != "default":
        rope |= {"factor": 4.0}
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    (found,) = inverse_frequencies(random_model("llama", rope_parameters=rope).model)
    torch.testing.assert_close(found, expected_frequencies(kind), atol=0, rtol=1e-5)


def test_each_set_of_frequencies_is_there_once_and_sets_of_layer_types_apart():
    sliding, full = (base ** (-torch.arange(0, 16, 2) / 16) for base in (10_000.0, 1_000_000.0))
    found = inverse_frequencies(build("gemma3_text").model)
    assert len(found) == 2
    for expected in (sliding, full):
        assert any(torch.allclose(expected, frequencies) for frequencies in found)
    assert inverse_frequencies(build("gpt2").transformer) == []
    (gptj,) = inverse_frequencies(build("gptj").transformer)
    torch.testing.assert_close(gptj, FREQUENCIES)
