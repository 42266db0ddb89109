"""The orders of weights that kernels take, remembered until the positions change."""

import math
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from itop_prune.kernels import runtime

if TYPE_CHECKING:
    from itop_prune.kernels.orders import Order


class _Key(NamedTuple):
    slots: int
    shape: tuple[int, ...]
    ranks: tuple[int, ...]


class _Known(NamedTuple):
    positions: Any
    """A weak reference to them."""
    version: int
    key: "_Key"
    order: "Order | None"
    """None: the layer computes with its dense weight."""


_known: dict[int, _Known] = {}


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
    key = _Key(slots, shape, ranks)
    known = _known.get(id(positions))
    same = known is not None and known.positions() is positions and known.key == key
    if known and same and known.version == positions._version:
        return known.order
    return _remember(positions, key)


def _remember(positions: Tensor, key: _Key) -> "Order | None":
    """Make the order of positions that are new or have changed; it is forgotten with them."""
    if positions.shape != (key.slots,) or not positions.is_cpu:
        return None

    order = None
    active = int((positions >= 0).sum())
    if runtime.uses_kernels(key.shape, active) and runtime.has_numba():
        from itop_prune.kernels.orders import make_order

        outputs, *rest = key.shape
        order = make_order(positions.numpy(), outputs, math.prod(rest), key.ranks)

    if not positions.is_inference():  # changes of such tensors can't be seen
        place = id(positions)
        reference = weakref.ref(positions, lambda _: _known.pop(place, None))
        _known[place] = _Known(reference, positions._version, key, order)
    return order
