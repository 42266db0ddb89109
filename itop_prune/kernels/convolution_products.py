"""Convolutions that compute with their active weights: tensors in, tensors out.

How numbers are packed is each call's own affair. A kernel reads images as they come, contiguous or
with channels last. It packs them, computes, and unpacks the result into the memory format that
torch would give it. So what lies between two layers are torch's own tensors. Batch norm, residual
sums and a user's own modules need not know of kernels. Two copies a layer are the price.
"""

import functools
from array import array
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from itop_prune.kernels import runtime
from itop_prune.kernels.convolution_plan import (
    LARGEST_TILE,
    LINE,
    Plan,
    pixel_bytes,
    tile_bytes,
)
from itop_prune.kernels.known_orders import known_order
from itop_prune.kernels.runtime import kind_of, stored, threads_for

if TYPE_CHECKING:
    from itop_prune.kernels.convolution_offsets import Offsets
    from itop_prune.kernels.orders import Order


class Call(NamedTuple):
    """What a convolution of images of one shape takes beside tensors; looked up once."""

    plan: Plan
    shape: torch.Size
    """Of the images."""
    dtype: torch.dtype
    most: int
    """Threads of torch."""
    threads: int
    kind: Any
    offsets: "Offsets"
    blocks: int
    strides: tuple[tuple[int, ...], tuple[int, ...]]
    """Of a result that is contiguous, and of one with channels last."""


def order_of(values: Tensor, positions: Tensor, plan: Plan) -> "Order | None":
    """Find the order of a layer's weights; None if the layer computes with its dense weight.

    Args:
        values: (1, slots).
        positions: (slots,).
        plan: Of this convolution.

    Raises:
        ValueError: If positions are outside of the weight, or one has two slots.
    """
    return known_order(positions, values.numel(), plan.shape, plan.ranks)


def forward(
    x: Tensor,
    values: Tensor,
    plan: Plan,
    order: "Order",
    bias: Tensor | None,
    channels_last: bool,
) -> Tensor:
    """Compute the output of a convolution.

    Args:
        x: (images, channels, height, width).
        values: (1, slots), of the type of x.
        plan: Of this convolution.
        order: Of the layer's positions.
        bias: (outputs,), of the type of x.
        channels_last: Of the output; else it is contiguous.

    Returns:
        (images, outputs, rows, columns).
    """
    x, x_last = _stored(x)
    values = order.values_by_output(stored(values))
    bias = None if bias is None else stored(bias)
    call, images = _call(x, plan, order), len(x)
    result = x.new_empty_strided(
        (images, plan.shape[0], plan.rows, plan.columns), call.strides[channels_last]
    )
    runtime.run(
        _kernels(plan.tiled).forward,
        call.threads,
        call.kind,
        x.data_ptr(),
        order.output_addresses[0],
        call.offsets.addresses[0],
        values.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        result.data_ptr(),
        _address(plan.numbers),
        images,
        x_last,
        channels_last,
        call.blocks,
    )
    return result


def backward(
    gradient: Tensor,
    x: Tensor,
    values: Tensor,
    plan: Plan,
    order: "Order",
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of input, values and bias.

    Args:
        gradient: (images, outputs, rows, columns).
        x: (images, channels, height, width), of the same type.
        values: (1, slots), of the same type.
        plan: Of this convolution.
        order: Of the layer's positions.
        needs: Which of the three to compute; the others are empty.
    """
    gradient, last = _stored(gradient)
    x, x_last = _stored(x)
    values = stored(values)
    for_x = torch.empty_like(x) if needs[0] else x.new_empty(0)
    for_values = values.new_zeros(values.shape if needs[1] else 0)
    # Image by image: torch splits one large sum by threads.
    for_bias = gradient.sum((2, 3)).sum(0) if needs[2] else x.new_empty(0)
    if needs[0] or needs[1]:
        call = _call(x, plan, order)
        by_input = order.values_by_input(values) if needs[0] else values
        runtime.run(
            _kernels(plan.tiled).backward,
            call.threads,
            call.kind,
            gradient.data_ptr(),
            x.data_ptr(),
            order.output_addresses[0],
            call.offsets.addresses[0],
            order.slots_address,
            order.input_addresses[0],
            call.offsets.addresses[1],
            by_input.data_ptr(),
            for_x.data_ptr(),  # 0 if it is empty
            for_values.data_ptr(),
            _address(plan.phases),
            _address(plan.numbers),
            len(x),
            x_last,
            last,
            order.active,
            call.blocks,
        )
    return for_x, for_values, for_bias


def _stored(images: Tensor) -> tuple[Tensor, bool]:
    """Make images whose numbers lie in memory one after the other; tell if channels are last."""
    images = images.resolve_neg()
    if images.is_contiguous():
        return images, False
    if images.is_contiguous(memory_format=torch.channels_last):
        return images, True
    return images.contiguous(), False


def _call(x: Tensor, plan: Plan, order: "Order") -> Call:
    known: Call | None = order.call
    now = plan, x.shape, x.dtype, torch.get_num_threads()
    if known is not None and known[:4] == now:
        return known

    # Here, since it needs NumPy.
    from itop_prune.kernels.convolution_offsets import offsets_of

    threads = threads_for(len(x) * order.active * plan.rows * plan.columns)
    pixel = pixel_bytes(plan, x.element_size()) // x.element_size()
    outputs, rows, columns = plan.shape[0], plan.rows, plan.columns
    size = outputs * rows * columns
    order.call = found = Call(
        *now,
        threads=threads,
        kind=_kind(x, plan),
        offsets=offsets_of(order, plan, pixel),
        blocks=_blocks(x, threads, plan),
        strides=(
            (size, rows * columns, columns, 1),
            (size, 1, columns * outputs, outputs),
        ),
    )
    return found


def _address(numbers: array) -> int:
    return numbers.buffer_info()[0]


def _kind(x: Tensor, plan: Plan) -> Any:
    """Choose the size of vectors: up to four pixels of a tile, or up to all of an image's band."""
    if plan.tiled:
        pixels = next(pixels for pixels in (4, 2, 1) if pixels <= plan.narrowest)
        return kind_of(x.dtype, pixels * LINE)
    length = ((plan.band - 1) * plan.packed[1] + plan.columns) * x.element_size()
    return kind_of(x.dtype, runtime.width_for(length))


def _blocks(x: Tensor, threads: int, plan: Plan) -> int:
    """Choose in how many parts of the channels a tile is computed, for more threads than tiles.

    Each part packs all of the tile, so together their bands take no more than the largest may.
    """
    size = x.element_size()
    tiles = -(-len(x) * size // LINE) if plan.tiled else len(x) * -(-plan.rows // plan.band)
    return min(-(-threads // tiles), max(1, LARGEST_TILE // tile_bytes(plan, size)))


@functools.cache
def _kernels(tiled: bool) -> Any:
    """Import the kernels; they are compiled at their first call, once in an environment."""
    from itop_prune.kernels import convolution, convolution_rows

    return convolution if tiled else convolution_rows
