"""The geometry of a convolution, planned once for images of one size."""

import functools
import math
from array import array
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

LINE = 64
"""Bytes of a packed pixel: one number for each image of a tile."""
LARGEST_TILE = 1 << 28
"""Bytes of a packed band of a tile. Images that need more are taken one by one."""
TILE_BAND, IMAGE_BAND = 1 << 20, 1 << 18
"""Bytes that a packed band should have, of a tile and of an image, to stay in the second cache."""
ALIGNED = 16
"""Numbers of which the planes of an image's band are multiples, so vectors share fewer lines."""


class Plan(NamedTuple):
    """The geometry of a convolution on images of one size, as the kernels take it.

    Padding is part of the packed images. With a stride s they are split into s * s phases, by
    the remainders of row and column. A place (dy, dx) of the kernel reads one of them, shifted.

    Bands of rows are packed, one after the other. With many images a band is of a whole tile of
    them (`convolution.py`), with few images it is of one (`convolution_rows.py`).
    """

    tiled: bool
    """Whether a packed pixel has a number for each image of a tile; else it is one number."""
    shape: tuple[int, int, int, int]
    """Of the weight: outputs, channels, height and width of the kernel."""
    height: int
    width: int
    """Of an image."""
    rows: int
    columns: int
    """Of a result."""
    stride: int
    top: int
    left: int
    """Padding."""
    band: int
    """Rows of a result, or of a phase, that are computed of a packed band."""
    packed: tuple[int, int]
    """Rows and columns of a phase's band."""
    packed_gradient: tuple[int, int]
    """Rows and columns of a packed gradient's band."""
    plane: int
    """Pixels from one packed phase to the next."""
    gradient_plane: int
    """Pixels from one packed output of the gradient to the next."""
    reach: tuple[int, int]
    """Rows above and columns before the gradient's own in a packed gradient."""
    narrowest: int
    """Columns of the narrowest results: the output, and the phases of the input's gradient."""
    ranks: tuple[int, ...]
    """The rank of each place of the kernel: places that read the same phase follow each other."""
    shifts: tuple[int, ...]
    """By rank: the pixel of a packed channel that is read for the first output pixel of a band."""
    mirrored: tuple[int, ...]
    """By rank: likewise of the packed gradient, for the first pixel of the band of a phase."""
    phases: array
    """The ranks at which each phase begins, and where the last one ends."""
    numbers: array
    """`Geometry`: what of this the kernels read."""


@functools.lru_cache(maxsize=4096)
def make_plan(
    shape: tuple[int, int, int, int],
    size: tuple[int, int],
    stride: int,
    padding: tuple[int, int],
    dilation: tuple[int, int],
    tiled: bool = True,
    pixels: int = TILE_BAND // LINE,
) -> Plan | None:
    """Plan a convolution of one group; None if the kernel is larger than the padded image.

    Args:
        shape: Of the weight.
        size: Height and width of an image.
        stride: In both directions.
        padding: Rows above and below, columns before and after.
        dilation: In both directions.
        tiled: Whether images are packed in tiles, else one by one.
        pixels: How many pixels a packed band should have.
    """
    kernel = shape[2:]
    padded = [n + 2 * p for n, p in zip(size, padding, strict=True)]
    spans = [(k - 1) * d for k, d in zip(kernel, dilation, strict=True)]
    results = [(n - span - 1) // stride + 1 for n, span in zip(padded, spans, strict=True)]
    if min(results) < 1:
        return None

    # For each axis: how far the kernel reaches in a phase, and the last row of an image's phases.
    reach = [span // stride for span in spans]
    lasts = [(n - 1 + p) // stride for n, p in zip(size, padding, strict=True)]
    rows, columns = (max(n, last + 1) for n, last in zip(results, lasts, strict=True))
    widths = -(-padded[1] // stride), columns + reach[1]  # of what is packed
    row = max(shape[1] * stride**2 * widths[0], shape[0] * widths[1])
    bands = -(-rows // max(1, pixels // row - reach[0]))
    band = -(-rows // bands)
    packed, packed_gradient = ((band + reach[0], width) for width in widths)
    aligned = 1 if tiled else ALIGNED
    plane, gradient_plane = (
        -(-math.prod(sides) // aligned) * aligned for sides in (packed, packed_gradient)
    )

    places = [
        (y * dilation[0], x * dilation[1]) for y in range(kernel[0]) for x in range(kernel[1])
    ]
    phase_of = [y % stride * stride + x % stride for y, x in places]
    by_rank = sorted(range(len(places)), key=lambda place: (phase_of[place], place))
    shifts, mirrored = [], []
    for place in by_rank:
        y, x = (distance // stride for distance in places[place])
        shifts.append(phase_of[place] * plane + y * packed[1] + x)
        mirrored.append((reach[0] - y) * widths[1] + reach[1] - x)

    numbers = (shape[1], *size, shape[0], *results, len(places), stride, *padding)
    of_phases = [len(range((n - padding[1]) % stride, size[1], stride)) for n in range(stride)]
    return Plan(
        tiled=tiled,
        shape=shape,
        height=size[0],
        width=size[1],
        rows=results[0],
        columns=results[1],
        stride=stride,
        top=padding[0],
        left=padding[1],
        band=band,
        packed=packed,
        packed_gradient=packed_gradient,
        plane=plane,
        gradient_plane=gradient_plane,
        reach=(reach[0], reach[1]),
        narrowest=min([results[1], *(count for count in of_phases if count)]),
        ranks=tuple(by_rank.index(place) for place in range(len(places))),
        shifts=tuple(shifts),
        mirrored=tuple(mirrored),
        phases=array("i", (sum(n < phase for n in phase_of) for phase in range(stride**2 + 1))),
        numbers=array(
            "i", (*numbers, *packed, *packed_gradient, plane, gradient_plane, *reach, band)
        ),
    )


def plan_of(
    x: Tensor,
    shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Plan | None:
    """Plan a convolution of these images; None if kernels can't compute it.

    A tile holds 16 images in float32. Those of a batch that fills less than half of one are taken
    one by one.
    """
    if len(shape) != 4 or groups != 1 or x.ndim != 4 or x.shape[1] != shape[1]:
        return None
    if stride[0] != stride[1] or not len(x) or min(padding) < 0:
        return None

    size = x.element_size()
    geometry = (tuple(shape), tuple(x.shape[2:]), stride[0], tuple(padding), tuple(dilation))
    if 2 * size * len(x) >= LINE:
        plan = make_plan(*geometry)
        if plan is None or tile_bytes(plan, size) <= LARGEST_TILE:
            return plan
    return make_plan(*geometry, tiled=False, pixels=IMAGE_BAND // size)


def tile_bytes(plan: Plan, size: int) -> int:
    """Compute the bytes of a band, of images or of the gradient, whichever is larger."""
    outputs, channels, _, _ = plan.shape
    images = channels * plan.stride**2 * math.prod(plan.packed)
    return pixel_bytes(plan, size) * max(images, outputs * math.prod(plan.packed_gradient))


def pixel_bytes(plan: Plan, size: int) -> int:
    """Compute the bytes of a packed pixel, of numbers of so many bytes."""
    return LINE if plan.tiled else size
