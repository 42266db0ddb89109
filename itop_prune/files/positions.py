"""The positions of active weights as bytes: gaps, long gaps or bits, whichever are shortest.

The weights are counted row by row. Of eight weights let 2, 3 and 6 be active.

- "gaps" has a byte for each active weight: how many inactive ones stand before it, here 2 0 2.
  The byte 255 stands for 255 inactive weights and no active one; the next byte goes on from there.
- "long gaps" has the same numbers, each in as many bytes as it needs: seven bits in a byte, the
  lowest first, and 128 added to every byte but the last. A gap of 300 is 172 2.
- "bits" has a bit for each weight, 1 if it is active, the first weight in the lowest bit: here
  4 + 8 + 64 = 76. Bits beyond the last weight are 0.
"""

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Positions = NDArray[np.integer]
SKIP = 255
"""The byte that stands for so many inactive weights and no active one."""
DIGITS = 9
"""At most so many bytes of a long gap: 63 bits."""


def encode(positions: Positions, size: int) -> tuple[str, Bytes]:
    """Write the positions of active weights, in rising order, as bytes.

    Returns:
        The name of the shortest encoding, and the bytes.

    >>> encode(np.array([2, 3, 6]), 8)
    ('bits', array([76], dtype=uint8))
    """
    gaps: Positions = np.diff(positions, prepend=np.int64(-1)).astype(np.int64) - 1
    lengths = {
        "bits": -(-size // 8),
        "gaps": int((gaps // SKIP + 1).sum()),
        "long gaps": int(_digits(gaps).sum()),
    }
    shortest = min(lengths, key=lambda name: lengths[name])
    if shortest == "bits":
        return shortest, encode_bits(positions, size)
    return shortest, encode_gaps(gaps) if shortest == "gaps" else encode_long_gaps(gaps)


def decode(encoding: str, code: Bytes, size: int) -> Positions:
    """Read the positions of active weights among `size`, in rising order.

    Raises:
        ValueError: There is no such encoding, or it writes no mask of `size` weights like this.

    >>> decode("bits", np.array([76], np.uint8), 8)
    array([2, 3, 6])
    """
    if encoding not in DECODERS:
        raise ValueError(f"{encoding!r} is no encoding; known are {', '.join(DECODERS)}")
    if code.dtype != np.uint8 or code.ndim != 1:
        raise ValueError(f"positions are {code.dtype} of shape {code.shape}, not bytes in a row")

    return DECODERS[encoding](code, size)


def encode_gaps(gaps: Positions) -> Bytes:
    """Write how many inactive weights stand before each active one.

    >>> encode_gaps(np.array([2, 0, 300]))
    array([  2,   0, 255,  45], dtype=uint8)
    """
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


def _digits(gaps: Positions) -> Positions:
    """Count the bytes that each gap takes with seven bits in a byte."""
    counts = np.ones_like(gaps)
    for place in range(1, DIGITS):
        counts += gaps >= 1 << 7 * place
    return counts


def encode_long_gaps(gaps: Positions) -> Bytes:
    """Write the same with seven bits of a gap in a byte.

    >>> encode_long_gaps(np.array([2, 0, 300]))
    array([  2,   0, 172,   2], dtype=uint8)
    """
    digits = _digits(gaps)
    starts = np.cumsum(digits) - digits
    code = np.zeros(digits.sum(), np.uint8)
    for place in range(digits.max(initial=0)):
        has = digits > place
        more = np.where(digits[has] > place + 1, 128, 0)
        code[starts[has] + place] = (gaps[has] >> 7 * place & 127) + more
    return code


def decode_long_gaps(code: Bytes, size: int) -> Positions:
    """Read positions from long gaps.

    >>> decode_long_gaps(np.array([2, 0, 172, 2], np.uint8), 305).tolist()
    [2, 3, 304]
    """
    ends = code < 128
    if len(code) and not ends[-1]:
        raise ValueError("the last gap has no end")
    starts = np.flatnonzero(np.concatenate([[True], ends[:-1]])[: len(code)])
    place = np.arange(len(code)) - np.repeat(starts, np.diff(starts, append=len(code)))
    if place.max(initial=0) >= DIGITS:
        raise ValueError(f"a gap takes more than {DIGITS} bytes")

    parts = (code & 127).astype(np.int64) << 7 * place
    gaps = np.add.reduceat(parts, starts) if len(starts) else parts
    if gaps.max(initial=0) >= size:
        raise ValueError(f"a gap covers {gaps.max()} weights of {size}")
    positions = np.cumsum(gaps + 1) - 1
    # A gap is below the size. So the first sum that is too large is seen, also if later ones wrap.
    if positions.max(initial=-1) >= size or positions.min(initial=0) < 0:
        raise ValueError(f"the gaps cover more than the {size} weights")
    return positions.astype(np.int32 if size < 2**31 else np.int64)


def encode_bits(positions: Positions, size: int) -> Bytes:
    """Write a bit for each weight, eight in a byte.

    >>> encode_bits(np.array([2, 3, 6, 8]), 9)
    array([76,  1], dtype=uint8)
    """
    mask = np.zeros(size, np.bool_)
    mask[positions] = True
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


DECODERS = {"gaps": decode_gaps, "long gaps": decode_long_gaps, "bits": decode_bits}
