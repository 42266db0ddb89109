"""Linear layers that compute with their active weights: tensors in, tensors out."""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from itop_prune.kernels import runtime
from itop_prune.kernels.known_orders import known_order
from itop_prune.kernels.runtime import kind_of, stored, threads_for

if TYPE_CHECKING:
    from itop_prune.kernels.orders import Order

ONE_ROW = 64
"""A product of one row takes so many times as long for a weight, since no row shares its reads."""


def forward(x: Tensor, values: Tensor, order: "Order", bias: Tensor | None) -> Tensor:
    """Compute the output of a layer.

    Args:
        x: (rows, inputs).
        values: (1, slots), of the type of x.
        order: Of the layer's positions.
        bias: (outputs,), of the type of x.

    Returns:
        (rows, outputs).
    """
    rows, outputs = x.shape[0], order.outputs
    x, values = stored(x), order.values_by_output(stored(values))
    bias = None if bias is None else stored(bias)
    result = x.new_empty(rows, outputs)
    pointers = (
        x.data_ptr(),
        *order.output_addresses,
        values.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        result.data_ptr(),
    )
    if rows == 1:
        threads, kind = threads_for(ONE_ROW * order.active), kind_of(x.dtype, runtime.WIDTHS[-1])
        runtime.run(_kernels().vector_forward, threads, kind, *pointers, outputs)
    elif rows:
        threads = threads_for(rows * order.active)
        kind, blocks = _parts(x, threads, threads)
        runtime.run(
            _kernels().forward, threads, kind, *pointers, rows, order.inputs, outputs, blocks
        )
    return result


def backward(
    gradient: Tensor, x: Tensor, values: Tensor, order: "Order", needs: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of input, values and bias.

    Args:
        gradient: (rows, outputs).
        x: (rows, inputs), of the same type.
        values: (1, slots), of the same type.
        order: Of the layer's positions.
        needs: Which of the three to compute; the others are empty.
    """
    rows, outputs = gradient.shape
    gradient, x, values = stored(gradient), stored(x), stored(values)
    by_input = order.values_by_input(values) if needs[0] else values
    for_x = x.new_empty(x.shape if needs[0] else 0)
    for_values = values.new_zeros(values.shape if needs[1] else 0)
    for_bias = x.new_zeros(outputs if needs[2] else 0)
    if rows:
        threads = threads_for(rows * order.active)
        kind, blocks = _parts(x, threads)
        runtime.run(
            _kernels().backward,
            threads,
            kind,
            gradient.data_ptr(),
            x.data_ptr(),
            *order.output_addresses,
            order.slots_address,
            *order.input_addresses,
            by_input.data_ptr(),
            for_x.data_ptr(),  # 0 if it is empty
            for_values.data_ptr(),
            for_bias.data_ptr(),
            rows,
            order.inputs,
            outputs,
            order.active,
            blocks,
        )
    return for_x, for_values, for_bias


def _parts(x: Tensor, threads: int, sharing: int = 1) -> tuple[Any, int]:
    """Choose the rows of a tile, and in how many parts it is computed.

    Only an output may take tiles that depend on how many threads share them: the sums of the
    values' gradient do too.
    """
    size = x.shape[0] * x.element_size()
    width = runtime.width_for(size, sharing)
    return kind_of(x.dtype, width), -(-threads // -(-size // width))


@functools.cache
def _kernels() -> Any:
    """Import the kernels; they are compiled at their first call, once in an environment."""
    from itop_prune.kernels import linear

    return linear


def order_of(
    x: Tensor,
    values: Tensor,
    positions: Tensor,
    shape: Sequence[int],
    bias: Tensor | None = None,
) -> "Order | None":
    """Find the order of a layer's weights; None if its dense weight computes this input.

    Inputs and biases that do not fit are left to the dense weight, for torch's own errors.

    Args:
        x: (rows, inputs).
        values: (1, slots).
        positions: (slots,).
        shape: (outputs, inputs).
        bias: (outputs,).

    Raises:
        ValueError: If positions are outside of the weight, or one has two slots.
    """
    fits = x.shape[1:] == (shape[1],) and (bias is None or bias.shape == (shape[0],))
    if not fits or not runtime.can_compute(*((x, values) if bias is None else (x, values, bias))):
        return None

    return known_order(positions, values.numel(), tuple(shape))
