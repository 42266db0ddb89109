"""How many weights each layer prunes and grows at an update. Whole numbers by layer, no tensors.

`targets` says how many shall be active afterwards, `to_prune` how many leave, `to_grow` how many
enter. Sums are exact.
"""

import math
from collections.abc import Mapping

from itop_prune.methods.distributions import apportion, scaled

Counts = Mapping[str, int]
NOTHING: Counts = {}


def targets(first: Counts, last: Counts, weights: Counts, factor: float) -> dict[str, int]:
    """Return the counts on the way from the first to the last: all of the first at factor 1, all of the last at 0.

    >>> targets({"a": 9, "b": 10}, {"a": 1, "b": 4}, {"a": 10, "b": 10}, factor=0.5)
    {'a': 5, 'b': 7}
    """
    shares = {name: last[name] + (first[name] - last[name]) * factor for name in first}
    return apportion(shares, round(sum(shares.values())), dict.fromkeys(shares, 1), weights)


def in_total(active: Counts, total: int, weights: Counts) -> dict[str, int]:
    """Return counts in the proportion of those that are active now, with another sum.

    >>> in_total({"a": 6, "b": 2}, 4, {"a": 10, "b": 10})
    {'a': 3, 'b': 1}
    """
    shares = scaled({name: active[name] / weights[name] for name in active}, weights, total)
    by_layer = {name: share * weights[name] for name, share in shares.items()}
    return apportion(by_layer, total, dict.fromkeys(active, 1), weights)


def to_prune(
    active: Counts, target: Counts, weights: Counts, rate: float, spare_dense: bool = True
) -> dict[str, int]:
    """Return how many leave: what is above the target, and `ceil(rate * active)` of the others to be exchanged.

    A layer that shall be dense exchanges nothing, unless it is not spared: what it loses may grow
    elsewhere then.

    >>> to_prune({"a": 10, "b": 10, "c": 4}, {"a": 10, "b": 6, "c": 4}, {"a": 20, "b": 20, "c": 4}, rate=0.25)
    {'a': 3, 'b': 6, 'c': 0}
    """
    return {
        name: max(0, active[name] - target[name])
        + (
            rounded_up(rate, min(active[name], target[name]))
            if target[name] < weights[name] or not spare_dense
            else 0
        )
        for name in active
    }


def rounded_up(share: float, count: int) -> int:
    """Return `ceil(share * count)` of what is meant: 0.07 of 100 are 7, though the product is 7.000000000000001."""
    return math.ceil(share * count - 1e-9)


def to_grow(
    kept: Counts, total: int, weights: Counts, raw: Mapping[str, float], least: Counts = NOTHING
) -> dict[str, int]:
    """Return how many enter each layer: `total` in proportion to `raw`, none above the room that a layer has.

    A layer that kept nothing gets at least one.

    Args:
        kept: Active weights after pruning.
        total: From the number of layers that kept nothing to the room of all.
        weights: All weights of a layer.
        raw: Numbers from 0; layers with 0 get what the others have no room for, by their own room.
        least: How many shall be active in a layer at least, within its room and the total.

    >>> to_grow({"a": 4, "b": 4}, 8, {"a": 10, "b": 6}, raw={"a": 1.0, "b": 3.0})
    {'a': 6, 'b': 2}
    """
    room = {name: weights[name] - kept[name] for name in kept if weights[name] > kept[name]}
    shares = scaled({name: raw[name] / room[name] for name in room}, room, total)
    needed = {name: max(int(not kept[name]), least.get(name, 0) - kept[name]) for name in room}
    counts = apportion({name: shares[name] * room[name] for name in room}, total, needed, room)
    return {name: counts.get(name, 0) for name in kept}
