"""What the kernels of convolutions are told, as named tuples: sizes, layouts, parts and weights."""

# mypy: disable-error-code=no-untyped-def

from typing import Any, NamedTuple

from numba import njit

from itop_prune.kernels.linear import FAST
from itop_prune.kernels.vectors import at, integers


class Geometry(NamedTuple):
    """A convolution on images of one size; `Plan.numbers` has these in this order."""

    channels: int
    height: int
    width: int
    """Of an image."""
    outputs: int
    rows: int
    columns: int
    """Of a result."""
    places: int
    """Of the convolution's kernel."""
    s: int
    """Stride."""
    top: int
    left: int
    """Rows and columns of padding."""
    hq: int
    wq: int
    """Rows and columns of a phase's packed band."""
    hg: int
    wg: int
    """Rows and columns of a gradient's packed band."""
    plane: int
    """Pixels from one packed phase to the next."""
    around: int
    """Pixels from one packed output of the gradient to the next."""
    qy: int
    qx: int
    """Rows above and columns before the gradient's own."""
    band: int
    """Rows of a result, or of a phase, that a packed band gives."""


class Images(NamedTuple):
    """How images lie in memory."""

    channels: int
    height: int
    width: int
    last: bool
    """Whether channels are the last dimension, else the second."""


class Packing(NamedTuple):
    """How images are packed: padded, and split into s * s phases."""

    s: int
    top: int
    left: int
    rows: int
    columns: int
    """Of what is packed of a phase."""


class Part(NamedTuple):
    """Results that are computed together, from row y on.

    Row y and column x of them are row y * s + top and column x * s + left of the whole.
    """

    first: int
    """Channel."""
    channels: int
    y: int
    """The first row."""
    rows: int
    columns: int
    s: int
    top: int
    left: int


class Lines(NamedTuple):
    """Rows of packed planes, from which as many rows of results are computed."""

    first: int
    rows: int
    step: int
    """Numbers from one to the next."""
    length: int
    """Numbers of results that each gives."""


class Weights(NamedTuple):
    """The active weights of each feature: of each output, or of each input at each place."""

    starts: Any
    places: int
    low: int
    high: int
    """Those of feature f lie from starts[f * places + low] to starts[f * places + high]."""
    offsets: Any
    """Where each weight reads, from the first number of a row."""
    values: Any


@njit(**FAST)
def geometry_at(address):
    """Read a `Geometry`."""
    g = integers(address)
    return Geometry(
        int(at(g, 0)),
        int(at(g, 1)),
        int(at(g, 2)),
        int(at(g, 3)),
        int(at(g, 4)),
        int(at(g, 5)),
        int(at(g, 6)),
        int(at(g, 7)),
        int(at(g, 8)),
        int(at(g, 9)),
        int(at(g, 10)),
        int(at(g, 11)),
        int(at(g, 12)),
        int(at(g, 13)),
        int(at(g, 14)),
        int(at(g, 15)),
        int(at(g, 16)),
        int(at(g, 17)),
        int(at(g, 18)),
    )


@njit(**FAST)
def size_of(images):
    """How many numbers an image has."""
    return images.channels * images.height * images.width
