"""Masked weights in little memory: the active values, and where they are in little more than that must take.

Distances in few bits with exceptions are those of Zukowski et al., "Super-Scalar RAM-CPU Cache
Compression", 2006. Tensors only.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """A weight and its mask."""

    values: Tensor
    """Of the active positions, in rising order."""
    code: Tensor
    """The positions in the weight laid out row by row, as `encode` writes them."""
    shape: tuple[int, ...]

    @classmethod
    def of(cls, weight: Tensor, mask: Tensor) -> "Packed":
        """Pack a weight and the mask of its shape, in whatever memory format, on the CPU."""
        positions = mask.flatten().nonzero().squeeze(1)
        return cls(weight.flatten()[positions], encode(positions), tuple(weight.shape))

    def unpack(self) -> tuple[Tensor, Tensor]:
        """Return the weight, 0 wherever the mask is False, and the mask."""
        weight, mask = self.values.new_empty(self.shape), torch.empty(self.shape, dtype=torch.bool)
        self.fill(weight, mask)
        return weight, mask

    @torch.no_grad()
    def fill(self, weight: Tensor, mask: Tensor) -> None:
        """Write the weight and the mask into contiguous tensors of the shape, of whatever dtype and device."""
        positions = decode(self.code, len(self.values)).to(weight.device)
        weight.view(-1).zero_().index_copy_(0, positions, self.values.to(weight))
        mask.view(-1).zero_().index_fill_(0, positions, True)


EXCEPTION = 64
"""The bits of two whole numbers that an exception takes."""


def encode(positions: Tensor) -> Tensor:
    """Return rising positions as bytes: few, and soon read.

    They are the distances from each position to the next, and of the first from 0. The first byte
    is a width of w bits, the best there is. Then come the lowest bits of all distances, their
    second bits, and so on up to the w-th: a byte holds those of eight distances, the first in its
    lowest bit; the last eight are filled up with 0. Where a distance is wider, what it is without
    its w lowest bits is an exception: after the bytes stand which distances have one, and then the
    exceptions, each as four bytes, the lowest first.

    From 0 by way of 2 5 6 8 11 12 15 1000 it is 2 3 1 2 3 1 3 985. With w = 2 the lowest bits of
    these eight distances are 0 1 1 0 1 1 1 1 and the others 1 1 0 1 1 0 1 0; the last distance, 4 *
    246 + 1, has an exception:

    >>> encode(torch.tensor([2, 5, 6, 8, 11, 12, 15, 1000])).tolist()
    [2, 246, 91, 7, 0, 0, 0, 246, 0, 0, 0]
    """
    distances = positions.diff(prepend=positions.new_zeros(1))
    longest = int(distances.amax()).bit_length() if len(distances) else 1
    widths = range(
        max(1, longest - 31), max(1, min(longest, 31)) + 1
    )  # what goes beyond must fit into four bytes
    width = min(
        widths, key=lambda w: w * len(distances) + EXCEPTION * int((distances >= 1 << w).sum())
    )
    rest = distances >> width
    which = rest.nonzero().squeeze(1)
    planes = [_bytes(((distances >> place) & 1).to(torch.uint8)) for place in range(width)]
    exceptions = torch.cat([which, rest[which]]).int().view(torch.uint8)
    return torch.cat([exceptions.new_tensor([width]), *planes, exceptions])


def decode(code: Tensor, count: int) -> Tensor:
    """Return so many positions, as `encode` was given them.

    >>> decode(torch.tensor([2, 246, 91, 7, 0, 0, 0, 246, 0, 0, 0], dtype=torch.uint8), 8).tolist()
    [2, 5, 6, 8, 11, 12, 15, 1000]
    """
    width = int(code[0])
    end = 1 + width * -(-count // 8)
    planes, exceptions = code[1:end], code[end:]
    lowest, *others = _bits_of_bytes().index_select(0, planes.int()).view(width, -1).unbind()
    for place, higher in enumerate(
        others[:7], 1
    ):  # eight distances at once, each in a byte of its own
        lowest.add_(higher, alpha=1 << place)
    distances = lowest.view(torch.uint8)[:count].long()
    for place, higher in enumerate(others[7:], 8):
        distances.add_(higher.view(torch.uint8)[:count], alpha=1 << place)
    if len(exceptions):
        which, rest = (
            exceptions.clone().view(torch.int32).long().chunk(2)
        )  # a clone: four bytes begin at a fourth one
        distances.index_add_(0, which, rest << width)
    return distances.cumsum_(0)


def _bytes(bits: Tensor) -> Tensor:
    """Return bits, each a byte, in bytes of eight."""
    eights = torch.cat([bits, bits.new_zeros(-len(bits) % 8)]).view(-1, 8)
    return (eights << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


@functools.cache
def _bits_of_bytes() -> Tensor:
    """Return the eight bits of every byte, each as a byte, the eight as one number that one look-up copies."""
    return (
        ((torch.arange(256)[:, None] >> torch.arange(8)) & 1)
        .to(torch.uint8)
        .view(torch.int64)
        .squeeze(1)
    )
