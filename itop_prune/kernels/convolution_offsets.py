"""Where the active weights of a convolution read what is packed for its plan.

They are computed once, and again for images of another size.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from itop_prune.kernels.convolution_plan import Plan
from itop_prune.kernels.orders import Order


class Offsets(NamedTuple):
    """For each weight the distance from the first number of a row, in int32."""

    plan: Plan
    pixel: int
    """Numbers of a packed pixel."""
    by_output: NDArray[np.int32]
    """Of the packed images, in the order of weights by output."""
    by_input: NDArray[np.int32]
    """Of the packed gradient, in the order of weights by input."""
    addresses: tuple[int, int]
    """Of both."""


def offsets_of(order: Order, plan: Plan, pixel: int) -> Offsets:
    """Compute the offsets of a layer's weights, or find them if they were the last ones.

    Args:
        order: Of the weights, with the ranks of the plan.
        plan: Of the convolution.
        pixel: Numbers of a packed pixel, one for each image of a tile.

    >>> from itop_prune.kernels.convolution_plan import make_plan
    >>> from itop_prune.kernels.orders import make_order
    >>> plan = make_plan((2, 1, 1, 2), (1, 3), 1, (0, 0), (1, 1))  # w0 x0 + w1 x1, w0 x1 + w1 x2
    >>> order = make_order(np.array([0, 1, 3]), outputs=2, inputs=2, ranks=plan.ranks)
    >>> offsets = offsets_of(order, plan, pixel=16)
    >>> offsets.by_output.tolist(), offsets.by_input.tolist()
    ([0, 16, 16], [16, 0, 64])
    """
    known: Offsets | None = order.offsets
    if known is not None and known.plan is plan and known.pixel == pixel:
        return known

    shifts, mirrored = (np.asarray(part, np.int64) for part in (plan.shifts, plan.mirrored))
    channel, rank = np.divmod(order.by_output.others.astype(np.int64), len(shifts))
    by_output = channel * (plan.stride**2 * plan.plane) + shifts[rank]
    shift = np.tile(mirrored, plan.shape[1]).repeat(np.diff(order.by_input.starts))
    by_input = order.by_input.others * np.int64(plan.gradient_plane) + shift

    both = [(pixel * part).astype(np.int32) for part in (by_output, by_input)]
    addresses = both[0].ctypes.data, both[1].ctypes.data
    order.offsets = found = Offsets(plan, pixel, both[0], both[1], addresses)
    return found
