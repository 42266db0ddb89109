"""The positions of active weights as bytes: gaps or bits, whichever is shorter.

The weights are counted row by row. Of eight weights let 2, 3 and 6 be active.

- "gaps" has a byte for each active weight: how many inactive ones stand before it, here 2 0 2.
  The byte 255 stands for 255 inactive weights and no active one; the next byte goes on from there.
- "bits" has a bit for each weight, 1 if it is active, the first weight in the lowest bit: here
  4 + 8 + 64 = 76. Bits beyond the last weight are 0.
"""

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Positions = NDArray[np.integer]
SKIP = 255
"""The byte that stands for so many inactive weights and no active one."""


def encode(mask: NDArray[np.bool_]) -> tuple[str, Bytes]:
    """Write a flat mask as bytes; give the shorter encoding's name and its bytes.

    >>> encode(np.array([0, 0, 1, 1, 0, 0, 1, 0], bool))
    ('bits', array([76], dtype=uint8))
    """
    gaps, bits = encode_gaps(mask), encode_bits(mask)
    return ("gaps", gaps) if len(gaps) < len(bits) else ("bits", bits)


def decode(encoding: str, code: Bytes, size: int) -> Positions:
    """Read the positions of active weights among `size`, in rising order.

    Raises:
        ValueError: There is no such encoding, or it writes no mask of `size` weights like this.

    >>> decode("bits", np.array([76], np.uint8), 8)
    array([2, 3, 6])
    """
    if encoding not in DECODERS:
        raise ValueError(f"{encoding!r} is no encoding; known are {' and '.join(DECODERS)}")
    if code.dtype != np.uint8 or code.ndim != 1:
        raise ValueError(f"positions are {code.dtype} of shape {code.shape}, not bytes in a row")

    return DECODERS[encoding](code, size)


def encode_gaps(mask: NDArray[np.bool_]) -> Bytes:
    """Write how many inactive weights stand before each active one.

    >>> encode_gaps(np.array([0, 0, 1, 1, 0, 0, 1, 0], bool))
    array([2, 0, 2], dtype=uint8)
    """
    gaps = np.diff(np.flatnonzero(mask), prepend=-1) - 1

    # Each gap takes its bytes of 255 and then one byte for the rest, which ends it.
    lengths = gaps // SKIP + 1
    code = np.full(lengths.sum(), SKIP, np.uint8)
    code[np.cumsum(lengths) - 1] = gaps % SKIP
    return code


def decode_gaps(code: Bytes, size: int) -> Positions:
    """Read positions from gaps.

    >>> decode_gaps(np.array([2, 0, 2], np.uint8), 8).tolist()
    [2, 3, 6]
    """
    ends = code < SKIP
    total = int(code.sum(dtype=np.int64)) + np.count_nonzero(ends)
    if total > size:
        raise ValueError(f"the gaps cover {total} weights of {size}")

    number = np.int32 if size < 2**31 else np.int64  # half the memory, where that is enough
    covered = np.cumsum(code + ends, dtype=number)  # weights up to each byte
    positions = covered if ends.all() else covered[ends]
    positions -= 1
    return positions


def encode_bits(mask: NDArray[np.bool_]) -> Bytes:
    """Write a bit for each weight, eight in a byte.

    >>> encode_bits(np.array([0, 0, 1, 1, 0, 0, 1, 0, 1], bool))
    array([76,  1], dtype=uint8)
    """
    return np.packbits(mask, bitorder="little")


def decode_bits(code: Bytes, size: int) -> Positions:
    """Read positions from bits.

    >>> decode_bits(np.array([76, 1], np.uint8), 9)
    array([2, 3, 6, 8])
    """
    if len(code) != (size + 7) // 8:
        raise ValueError(f"{len(code)} bytes of bits are not those of {size} weights")

    active = np.unpackbits(code, bitorder="little").view(np.bool_)
    if active[size:].any():
        raise ValueError(f"a bit beyond the last of {size} weights is 1")

    return np.flatnonzero(active)


DECODERS = {"gaps": decode_gaps, "bits": decode_bits}
