"""Masks as bits, eight places in a byte; the first place is the lowest bit.

Eight bools in memory are one whole number of 64 bits, so a few operations on a share of an eighth
of the places pack and unpack them.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

GATHER = 0x0102040810204080
"""Times eight bools, as one whole number: the highest byte has one bit of each."""
REPEAT = 0x0101010101010101
"""Times a byte: eight copies of it. Also: the lowest bit of each of eight bytes."""
ONE_EACH = 0x8040201008040201 - (1 << 64)
"""Of eight copies of a byte, in each another bit; as a signed number."""
BELOW_TOP = 0x7F7F7F7F7F7F7F7F


def pack(mask: Tensor) -> Tensor:
    """Pack a bool tensor into bytes, row by row; places beyond the last one are 0.

    >>> pack(torch.tensor([[False, False, True], [True, False, False], [True, False, True]]))
    tensor([76,  1], dtype=torch.uint8)
    """
    flat = mask.flatten()
    if flat.numel() % 8 or flat.storage_offset() % 8:
        flat = F.pad(flat, (0, -flat.numel() % 8)).clone()
    words = flat.view(torch.int64) * GATHER
    return (words >> 56).to(torch.uint8)


def unpack(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Unpack bytes into a bool tensor of a shape.

    >>> unpack(torch.tensor([76, 1], dtype=torch.uint8), (3, 3)).int()
    tensor([[0, 0, 1],
            [1, 0, 0],
            [1, 0, 1]], dtype=torch.int32)
    """
    words = (bits.long() * REPEAT) & ONE_EACH
    words = ((words + BELOW_TOP) >> 7) & REPEAT  # 1 in each byte that is not 0
    return words.view(torch.bool)[: math.prod(shape)].view(shape)


def count(bits: Tensor) -> int:
    """Count the bits that are 1.

    >>> count(torch.tensor([76, 1], dtype=torch.uint8))
    4
    """
    pairs = bits - ((bits >> 1) & 0x55)
    fours = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return int(((fours + (fours >> 4)) & 0x0F).sum())


def put(bits: Tensor, places: Tensor) -> None:
    """Set the bits of places to 1, in place.

    >>> bits = torch.tensor([76, 1], dtype=torch.uint8)
    >>> put(bits, torch.tensor([0, 9]))
    >>> bits
    tensor([77,  3], dtype=torch.uint8)
    """
    byte, bit = places >> 3, places & 7
    for place in range(8):  # so that no byte is written twice at a time
        at = byte.masked_select(bit == place)
        bits[at] = bits.index_select(0, at) | (1 << place)
