"""Masked weights in little memory: the active values, and where they are near the entropy of that. Tensors only."""

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
        positions = decode(self.code).to(weight.device)
        weight.view(-1).zero_().scatter_(0, positions, self.values.to(weight))
        mask.view(-1).zero_().index_fill_(0, positions, True)


def encode(positions: Tensor) -> Tensor:
    """Return rising positions as bytes, near their entropy where they are scattered evenly.

    The code is a row of numbers of b bits. A number below 2**b - 1 tells how many positions are skipped before the
    next one that is meant; 2**b - 1 skips as many and means none. The first byte is b, the best there is; with b = 1
    the code is the mask itself, a bit a position. Then come the lowest bits of all numbers, their second bits, and so
    on: a byte holds those of eight numbers, the first in its lowest bit. The last eight are filled up with 2**b - 1.

    Before 1 4 5 10 11 14 16 there are 1 2 0 4 0 2 1 to skip. With b = 2 that is 1 2 0 3 1 0 2 1, as 3 and 1 skip 4; the
    low bits of these eight numbers are 1 0 0 1 1 0 0 1, and the high ones 0 1 0 1 0 0 1 0:

    >>> encode(torch.tensor([1, 4, 5, 10, 11, 14, 16])).tolist()
    [2, 153, 74]
    """
    skipped = positions.diff(prepend=positions.new_tensor([-1])) - 1
    most = (1 << _best_width(skipped)) - 1
    ends = (skipped // most + 1).cumsum(0) - 1
    count = int(ends[-1]) + 1 if len(ends) else 0
    numbers = torch.full((count + -count % 8,), most)
    numbers[ends] = skipped % most
    width = most.bit_length()
    bits = torch.cat([((numbers >> place) & 1).to(torch.uint8) for place in range(width)])
    eights = bits.view(-1, 8) << torch.arange(8, dtype=torch.uint8)
    return torch.cat([eights.new_tensor([width]), eights.sum(1, dtype=torch.uint8)])


def decode(code: Tensor) -> Tensor:
    """Return the positions that `encode` was given.

    >>> decode(torch.tensor([2, 153, 74], dtype=torch.uint8)).tolist()
    [1, 4, 5, 10, 11, 14, 16]
    """
    width = int(code[0])
    bits = _bits_of_bytes().index_select(0, code[1:].int()).view(torch.uint8).view(width, -1)
    lowest, *others = bits.unbind()
    numbers = lowest if width <= 8 else lowest.int()
    for place, higher in enumerate(others, 1):
        numbers.add_(higher, alpha=1 << place)
    means_one = numbers != (1 << width) - 1
    return numbers.add_(means_one).cumsum(0).sub_(1).masked_select(means_one)


def _best_width(skipped: Tensor) -> int:
    """Return the width that takes the fewest bits; a number that means none counts one more, for it takes time too."""

    def cost(width: int) -> int:
        means_none = int((skipped // ((1 << width) - 1)).sum())
        return width * len(skipped) + (width + 1) * means_none

    return min(range(1, 25), key=cost)


@functools.cache
def _bits_of_bytes() -> Tensor:
    """Return the eight bits of every byte, each as a byte, the eight as one number that one look-up copies."""
    return ((torch.arange(256)[:, None] >> torch.arange(8)) & 1).to(torch.uint8).view(torch.int64).squeeze(1)
