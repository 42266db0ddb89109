"""The positions of active weights as bytes: gaps or bits, whichever is shorter.

The weights are counted row by row. Of eight weights let 2, 3 and 6 be active.

- "gaps" has a byte for each active weight: how many inactive ones stand before it, here 2 0 2.
  The byte 255 stands for 255 inactive weights and no active one; the next byte goes on from there.
- "bits" has a bit for each weight, 1 if it is active, the first weight in the lowest bit: here
  4 + 8 + 64 = 76. Bits beyond the last weight are 0.
"""

import torch
from torch import Tensor

SKIP = 255
"""The byte that stands for so many inactive weights and no active one."""
BITS = (1, 2, 4, 8, 16, 32, 64, 128)
"""The bits of a byte, the lowest first."""


def encode(mask: Tensor) -> tuple[str, Tensor]:
    """Write a mask as bytes; give the shorter encoding's name and its bytes.

    >>> encode(torch.tensor([0, 0, 1, 1, 0, 0, 1, 0]))
    ('bits', tensor([76], dtype=torch.uint8))
    """
    gaps, bits = encode_gaps(mask), encode_bits(mask)
    return ("gaps", gaps) if len(gaps) < len(bits) else ("bits", bits)


def decode(encoding: str, code: Tensor, size: int) -> Tensor:
    """Read the positions of active weights among `size`, in rising order.

    Raises:
        ValueError: There is no such encoding, or the bytes are none of it for so many weights.

    >>> decode("bits", torch.tensor([76], dtype=torch.uint8), 8)
    tensor([2, 3, 6])
    """
    if encoding not in DECODERS:
        raise ValueError(f"{encoding!r} is no encoding; known are {' and '.join(DECODERS)}")
    if code.dtype is not torch.uint8 or code.ndim != 1:
        raise ValueError(f"positions are {code.dtype} of shape {tuple(code.shape)}, not bytes")

    return DECODERS[encoding](code, size)


def encode_gaps(mask: Tensor) -> Tensor:
    """Write how many inactive weights stand before each active one.

    >>> encode_gaps(torch.tensor([0, 0, 1, 1, 0, 0, 1, 0]))
    tensor([2, 0, 2], dtype=torch.uint8)
    """
    positions = mask.flatten().nonzero().squeeze(1)
    gaps = positions.diff(prepend=positions.new_tensor([-1])) - 1

    # Each gap takes its bytes of 255 and then one byte for the rest, which ends it.
    lengths = gaps // SKIP + 1
    code = gaps.new_full((int(lengths.sum()),), SKIP, dtype=torch.uint8)
    code[lengths.cumsum(0) - 1] = (gaps % SKIP).to(torch.uint8)
    return code


def decode_gaps(code: Tensor, size: int) -> Tensor:
    """Read positions from gaps.

    >>> decode_gaps(torch.tensor([2, 0, 2], dtype=torch.uint8), 8)
    tensor([2, 3, 6])
    """
    ends = code < SKIP
    after = (code + ends).cumsum(0)  # how many weights each byte and those before it cover
    covered = int(after[-1]) if len(after) else 0
    if covered > size:
        raise ValueError(f"the gaps cover {covered} weights of {size}")

    return (after if ends.all() else after[ends]) - 1


def encode_bits(mask: Tensor) -> Tensor:
    """Write a bit for each weight, eight in a byte.

    >>> encode_bits(torch.tensor([0, 0, 1, 1, 0, 0, 1, 0, 1]))
    tensor([76,  1], dtype=torch.uint8)
    """
    active = mask.flatten().bool()
    padded = torch.cat([active, active.new_zeros(-len(active) % 8)])
    bits = torch.tensor(BITS, dtype=torch.uint8, device=mask.device)
    return (padded.view(-1, 8) * bits).sum(1, dtype=torch.uint8)


def decode_bits(code: Tensor, size: int) -> Tensor:
    """Read positions from bits.

    >>> decode_bits(torch.tensor([76, 1], dtype=torch.uint8), 9)
    tensor([2, 3, 6, 8])
    """
    if len(code) != (size + 7) // 8:
        raise ValueError(f"{len(code)} bytes of bits are not those of {size} weights")

    # A table of all bytes is read several times as fast as the bits are taken out one by one.
    every_byte = torch.arange(256, dtype=torch.uint8, device=code.device)
    bits = torch.tensor(BITS, dtype=torch.uint8, device=code.device)
    table = (every_byte[:, None] & bits) != 0
    active = table.index_select(0, code.int()).flatten()
    if active[size:].any():
        raise ValueError(f"a bit beyond the last of {size} weights is 1")

    return active.nonzero().squeeze(1)


DECODERS = {"gaps": decode_gaps, "bits": decode_bits}
