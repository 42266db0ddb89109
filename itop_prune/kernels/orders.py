"""In which order kernels take the weights of a matrix: by output and by input."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_REPAIR = "load the model again, and move weights with ITOP.write_mask alone"


class Direction(NamedTuple):
    """The weights of a matrix, grouped by output or by input; contiguous int32."""

    starts: NDArray[np.int32]
    """Where the weights of each begin, and where the last ones end."""
    others: NDArray[np.int32]
    """The input of each weight that is grouped by output; the output of one grouped by input."""
    slots: NDArray[np.int32]
    """The slot of each weight."""


class Order:
    """Both directions, each sorted, so that sums do not depend on which weight has which slot.

    Kernels take values in one of the two orders, and addresses, which are looked up once, here.
    """

    offsets: Any = None
    """The `Offsets` of the convolution that was computed last, if any."""
    call: Any = None
    """Its `Call`."""

    def __init__(self, by_output: Direction, by_input: Direction) -> None:
        self.by_output, self.by_input = by_output, by_input
        self.inputs, self.outputs = len(by_input.starts) - 1, len(by_output.starts) - 1
        self.active = len(by_output.others)
        self.in_place = bool((by_output.slots == np.arange(self.active)).all())
        """Whether slots follow the weights by output, as they do until weights move."""
        self.output_addresses = by_output.starts.ctypes.data, by_output.others.ctypes.data
        self.input_addresses = by_input.starts.ctypes.data, by_input.others.ctypes.data
        self.slots_address = by_output.slots.ctypes.data

    def values_by_output(self, values: Tensor) -> Tensor:
        """Put values, (1, slots), in the order of weights by output; more may follow them."""
        return values if self.in_place else _taken(values, self.by_output.slots)

    def values_by_input(self, values: Tensor) -> Tensor:
        """Put values, (1, slots), in the order of weights by input."""
        return _taken(values, self.by_input.slots)


def _taken(values: Tensor, slots: NDArray[np.int32]) -> Tensor:
    return values.view(-1).index_select(0, torch.from_numpy(slots))


def make_order(
    positions: NDArray[np.integer], outputs: int, inputs: int, ranks: Sequence[int] = ()
) -> Order:
    """Group the weights of a matrix; positions of -1 are left out.

    Args:
        positions: (slots,), in the flattened matrix.
        outputs: Rows of the matrix.
        inputs: Columns of the matrix.
        ranks: Of a convolution: the rank that each place of its kernel takes in place of its own
            number. Inputs of the matrix are counted by them.

    Raises:
        ValueError: If a position is outside of the matrix, or has two slots. Kernels would read
            and write what is not theirs.

    >>> order = make_order(np.array([5, -1, 0, 3]), outputs=2, inputs=3)
    >>> [array.tolist() for array in order.by_output]
    [[0, 1, 3], [0, 0, 2], [2, 3, 0]]
    >>> [array.tolist() for array in order.by_input]
    [[0, 2, 2, 3], [0, 1, 1], [2, 3, 0]]
    """
    size = outputs * inputs
    for bound in (positions.min(initial=-1), positions.max(initial=-1)):
        if not -1 <= bound < size:
            raise ValueError(
                f"position {bound} is outside of a weight of {size}; allowed are -1 to {size - 1}; "
                f"{_REPAIR}"
            )

    slots = np.flatnonzero(positions >= 0).astype(np.int32)
    output, input = np.divmod(positions[slots].astype(np.int64), inputs)
    if ranks:
        channel, place = np.divmod(input, len(ranks))
        input = channel * len(ranks) + np.asarray(ranks, np.int64)[place]
    by_output = _group(output, input, slots, outputs)
    ordered = positions[by_output.slots]
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(twice):
        raise ValueError(f"position {twice[0]} has two slots; allowed is one; {_REPAIR}")
    return Order(by_output, _group(input, output, slots, inputs))


def _group(
    keys: NDArray[np.integer], others: NDArray[np.integer], slots: NDArray[np.int32], groups: int
) -> Direction:
    # No two are equal, so any sort is stable, and one of numbers is faster than one of pairs.
    by_both = np.argsort(keys * (others.max(initial=0) + 1) + others)
    starts = np.concatenate([[0], np.bincount(keys, minlength=groups).cumsum()])
    return Direction(*(part.astype(np.int32) for part in (starts, others[by_both], slots[by_both])))
