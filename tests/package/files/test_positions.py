"""Positions as bytes and back, few of them; weights packed and unpacked."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from itop_prune.files.positions import Packed, decode, encode


def scattered(size: int, density: float, seed: int = 0) -> Tensor:
    """Return which of so many are active, each with the same probability."""
    return torch.rand(size, generator=torch.Generator().manual_seed(seed)) < density


def entropy(density: float) -> float:
    """Return the bits that one position takes at least, active or not."""
    return -density * math.log2(density) - (1 - density) * math.log2(1 - density)


def test_the_code_is_bytes() -> None:
    assert encode(torch.tensor([3])).dtype == torch.uint8


@given(st.integers(0, 4000), st.floats(0, 1), st.integers(0, 2**32))
def test_scattered_positions_come_back(size: int, density: float, seed: int) -> None:
    positions = scattered(size, density, seed).nonzero().squeeze(1)
    assert torch.equal(decode(encode(positions), len(positions)), positions)


@given(st.sets(st.integers(0, 10**6), max_size=50), st.integers(1, 40))
def test_runs_with_gaps_of_every_size_come_back(starts: set[int], length: int) -> None:
    positions = torch.tensor(
        sorted({start + more for start in starts for more in range(length)}), dtype=torch.int64
    )
    assert torch.equal(decode(encode(positions), len(positions)), positions)


@pytest.mark.parametrize(
    "gap", [2**power + more for power in (2, 4, 7, 8, 9, 16, 24, 33) for more in (-2, -1, 0, 1)]
)
def test_gaps_about_each_width_come_back(gap: int) -> None:
    positions = torch.arange(1, 4) * gap
    assert torch.equal(decode(encode(positions), len(positions)), positions)


def test_no_position_is_a_byte() -> None:
    code = encode(torch.zeros(0, dtype=torch.int64))
    assert len(code) == 1
    assert decode(code, 0).tolist() == []


@pytest.mark.parametrize("size", [1, 7, 8, 9, 1000])
def test_of_a_full_mask_the_code_is_a_bit_a_position(size: int) -> None:
    assert len(encode(torch.arange(size))) == 1 + math.ceil(size / 8)


@pytest.mark.parametrize("density", [0.001, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1])
def test_few_scattered_positions_take_little_more_than_their_entropy(density: float) -> None:
    size = 1_000_000
    assert (
        8 * len(encode(scattered(size, density).nonzero().squeeze(1)))
        < 1.35 * entropy(density) * size
    )


@pytest.mark.parametrize("density", [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99])
def test_of_many_scattered_positions_each_takes_two_bits_or_little_more(density: float) -> None:
    size = 1_000_000
    assert 8 * len(encode(scattered(size, density).nonzero().squeeze(1))) < 2.2 * size


def test_a_packed_weight_is_zero_off_the_mask_whatever_the_weight_holds() -> None:
    weight, mask = (
        torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]),
        torch.tensor([[1, 0, 0], [0, 1, 1]]).bool(),
    )
    packed = Packed.of(weight, mask)
    assert packed.values.tolist() == [1.0, 5.0, 6.0]
    unpacked, places = packed.unpack()
    assert torch.equal(places, mask)
    assert torch.equal(unpacked, weight * mask)


@pytest.mark.parametrize("shape", [(0, 3), (5,), (3, 4), (2, 3, 4), (2, 3, 4, 5), (2, 2, 2, 3, 3)])
def test_a_packed_weight_of_any_shape_comes_back(shape: tuple[int, ...]) -> None:
    mask = scattered(math.prod(shape), 0.4).view(shape)
    weight = torch.randn(shape) * mask
    assert all(
        torch.equal(*pair)
        for pair in zip(Packed.of(weight, mask).unpack(), (weight, mask), strict=True)
    )


def test_the_memory_format_of_a_weight_does_not_matter() -> None:
    weight, mask = torch.randn(4, 5, 3, 3), scattered(180, 0.3).view(4, 5, 3, 3)
    one = Packed.of(weight, mask)
    other = Packed.of(
        *(tensor.contiguous(memory_format=torch.channels_last) for tensor in (weight, mask))
    )
    assert torch.equal(one.values, other.values)
    assert torch.equal(one.code, other.code)


def test_filling_overwrites_what_was_there_in_the_dtype_that_is_there() -> None:
    mask = scattered(60, 0.3).view(6, 10)
    packed = Packed.of(torch.randn(6, 10), mask)
    weight, places = (
        torch.full((6, 10), float("nan"), dtype=torch.bfloat16),
        torch.ones(6, 10, dtype=torch.bool),
    )
    packed.fill(weight, places)
    assert torch.equal(places, mask)
    assert torch.equal(weight, packed.unpack()[0].bfloat16())
