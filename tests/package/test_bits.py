"""Masks as bits: they come back, whatever the size and wherever in memory they begin."""

import pytest
import torch

from itop_prune import bits


def drawn(*shape: int, share: float = 0.3) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape))) < share


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 15, 16, 63, 64, 65, 1001])
def test_a_mask_of_any_size_comes_back_and_is_counted(size: int) -> None:
    for mask in (drawn(size), drawn(size, share=0.0), drawn(size, share=1.1)):
        packed = bits.pack(mask)
        assert (packed.dtype, len(packed)) == (torch.uint8, -(-size // 8))
        assert torch.equal(bits.unpack(packed, (size,)), mask)
        assert bits.count(packed) == mask.sum()


@pytest.mark.parametrize("shape", [(3, 5), (4, 3, 3, 3), (8, 1), ()])
def test_a_mask_of_any_shape_comes_back(shape: tuple[int, ...]) -> None:
    mask = drawn(*shape)
    found = bits.unpack(bits.pack(mask), shape)
    assert (found.dtype, found.shape) == (torch.bool, mask.shape)
    assert torch.equal(found, mask)


@pytest.mark.parametrize("offset", range(9))
def test_a_part_of_a_tensor_is_packed_wherever_it_begins(offset: int) -> None:
    mask = drawn(200)
    part = mask[offset : offset + 64]
    assert torch.equal(bits.pack(part), bits.pack(part.clone()))


def test_the_order_is_that_of_the_rows_whatever_the_memory_format() -> None:
    mask = drawn(4, 3, 5, 5)
    other = mask.to(memory_format=torch.channels_last)
    assert torch.equal(bits.pack(other), bits.pack(mask))
    assert torch.equal(bits.pack(drawn(6, 8).t()), bits.pack(drawn(6, 8).t().contiguous()))


def test_places_beyond_the_last_are_0_so_that_bits_can_be_joined() -> None:
    one, other = drawn(13), drawn(13, share=0.6)
    joined = bits.pack(one) | bits.pack(other)
    assert torch.equal(bits.unpack(joined, (13,)), one | other)
    assert bits.count(joined) == (one | other).sum()


def test_packing_writes_nothing_and_what_was_unpacked_is_independent() -> None:
    mask = drawn(64)
    before, packed = mask.clone(), bits.pack(mask)
    saved = packed.clone()
    bits.unpack(packed, (64,)).logical_not_()
    assert torch.equal(mask, before)
    assert torch.equal(packed, saved)


def test_every_bit_of_a_byte_is_counted() -> None:
    for byte in range(256):
        assert bits.count(torch.tensor([byte], dtype=torch.uint8)) == byte.bit_count()
    assert bits.count(torch.full((300,), 255, dtype=torch.uint8)) == 2400
