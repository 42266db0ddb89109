"""The orders of weights that kernels take, remembered until the positions change."""

import math
from typing import TYPE_CHECKING

from torch import Tensor

from itop_prune.kernels import runtime
from itop_prune.kernels.memo import Memo

if TYPE_CHECKING:
    from itop_prune.kernels.orders import Order

_orders: "Memo[tuple[Order | None]]" = Memo()


def known_order(
    positions: Tensor, slots: int, shape: tuple[int, ...], ranks: tuple[int, ...] = ()
) -> "Order | None":
    """Find the order of a layer's weights; None if the layer computes with its dense weight.

    Args:
        positions: (slots,).
        slots: Number of values.
        shape: Of the weight.
        ranks: As `make_order` takes them.

    Raises:
        ValueError: If positions are outside of the weight, or one has two slots.
    """
    key = slots, shape, ranks
    known = _orders.get(positions, key)
    if known is not None:
        return known[0]
    if positions.shape != (slots,) or not positions.is_cpu:
        return None
    return _orders.put(positions, key, (_make(positions, shape, ranks),))[0]


def _make(positions: Tensor, shape: tuple[int, ...], ranks: tuple[int, ...]) -> "Order | None":
    active = int((positions >= 0).sum())
    if not runtime.uses_kernels(shape, active) or not runtime.has_numba():
        return None
    from itop_prune.kernels.orders import make_order

    outputs, *rest = shape
    return make_order(positions.numpy(), outputs, math.prod(rest), ranks)
