"""How many weights leave and enter each layer at an update. Whole numbers by layer; sums are exact.

`plan_changes` makes the table of an update. The functions below it are plain arithmetic, except for
two: `_lowest_of_all` reads scores, and `_redistribute` reads weights or momentum.
"""

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

from torch import Tensor

from itop_prune import topology
from itop_prune.methods.distributions import apportion, scaled
from itop_prune.methods.lookup import CheckedFunction
from itop_prune.update.layer_update import LayerUpdate
from itop_prune.update.rules import Rules

Counts = Mapping[str, int]
NOTHING: Counts = {}


def plan_changes(
    rules: Rules,
    layers: Mapping[str, LayerUpdate],
    active: Counts,
    target: Counts,
    rate: float,
    density_moves: bool,
) -> dict[str, tuple[int, int]]:
    """Plan an update: {name: (n_prune, n_grow)}, before any tensor moves.

    Args:
        rules: Of the run.
        layers: The layers that take part, by name.
        active: How many weights are active in each.
        target: How many weights should be active in each afterwards. If the rules share weights
            between layers only the sum counts.
        rate: The share of active weights to exchange.
        density_moves: Whether the density is on its way to the final one.
    """
    weights = {name: layer.itop.size for name, layer in layers.items()}
    if rules.across_layers:
        n_prune, exchanged = _prune_across_layers(
            rules, layers, active, target, weights, rate, density_moves
        )
    else:
        n_prune = prune_counts(active, target, weights, rate, rules.spare_dense)
        exchanged = n_prune
    kept = {name: active[name] - n_prune[name] for name in layers}

    if not rules.shares_layers:
        return {name: (n_prune[name], target[name] - kept[name]) for name in layers}

    proportions: Mapping[str, float] = exchanged
    if rules.redistribute:
        known = {"weights": weights, "active": active, "pruned": n_prune}
        proportions = _redistribute(rules.redistribute, layers, known)
    total = sum(target.values()) - sum(kept.values())
    least = {name: min(active[name], minimum(rules, weights[name])) for name in layers}
    n_grow = grow_counts(kept, total, weights, proportions, least)
    return {name: (n_prune[name], n_grow[name]) for name in layers}


def prune_counts(
    active: Counts, target: Counts, weights: Counts, rate: float, spare_dense: bool = True
) -> dict[str, int]:
    """Count what leaves each layer: the excess over the target, and the exchange of the rest.

    A layer that should be dense exchanges nothing, unless `spare_dense` is False: its weights may
    then grow in other layers.

    >>> active, target = {"a": 10, "b": 10, "c": 4}, {"a": 10, "b": 6, "c": 4}
    >>> prune_counts(active, target, {"a": 20, "b": 20, "c": 4}, rate=0.25)
    {'a': 3, 'b': 6, 'c': 0}
    """
    counts = {}
    for name in active:
        counts[name] = max(0, active[name] - target[name])
        if target[name] < weights[name] or not spare_dense:
            counts[name] += ceil_count(rate, min(active[name], target[name]))
    return counts


def grow_counts(
    kept: Counts,
    total: int,
    weights: Counts,
    proportions: Mapping[str, float],
    least: Counts = NOTHING,
) -> dict[str, int]:
    """Share out what enters: `total` in proportion, and no layer gets more than its room.

    A layer that kept nothing gets at least one.

    Args:
        kept: Active weights after pruning.
        total: From the number of layers that kept nothing to the room of all.
        weights: All weights of a layer.
        proportions: Numbers from 0. Layers with 0 get what the others have no room for.
        least: How many weights should be active in a layer at least, within its room and the total.

    >>> grow_counts({"a": 4, "b": 4}, 8, {"a": 10, "b": 6}, {"a": 1.0, "b": 3.0})
    {'a': 6, 'b': 2}
    """
    room = {name: weights[name] - kept[name] for name in kept if weights[name] > kept[name]}
    shares = scaled({name: proportions[name] / room[name] for name in room}, room, total)
    wanted = {name: shares[name] * room[name] for name in room}

    lower = {}
    for name in room:
        empty = int(not kept[name])
        lower[name] = max(empty, least.get(name, 0) - kept[name])
    counts = apportion(wanted, total, lower, room)
    return {name: counts.get(name, 0) for name in kept}


def counts_between(first: Counts, last: Counts, weights: Counts, factor: float) -> dict[str, int]:
    """Compute the counts on the way from the first (factor 1) to the last (factor 0).

    >>> counts_between({"a": 9, "b": 10}, {"a": 1, "b": 4}, {"a": 10, "b": 10}, factor=0.5)
    {'a': 5, 'b': 7}
    """
    shares = {name: last[name] + (first[name] - last[name]) * factor for name in first}
    return apportion(shares, round(sum(shares.values())), dict.fromkeys(shares, 1), weights)


def scale_counts(active: Counts, total: int, weights: Counts) -> dict[str, int]:
    """Scale counts to another sum, in the proportions that they have.

    >>> scale_counts({"a": 6, "b": 2}, 4, {"a": 10, "b": 10})
    {'a': 3, 'b': 1}
    """
    densities = {name: active[name] / weights[name] for name in active}
    shares = scaled(densities, weights, total)
    wanted = {name: share * weights[name] for name, share in shares.items()}
    return apportion(wanted, total, dict.fromkeys(active, 1), weights)


def ceil_count(share: float, count: int) -> int:
    """Compute `ceil(share * count)` without rounding errors: 0.07 of 100 is 7.

    >>> ceil_count(0.07, 100), 0.07 * 100
    (7, 7.000000000000001)
    """
    return math.ceil(share * count - 1e-9)


def minimum(rules: Rules, weights: int) -> int:
    """Count the weights of a layer that stay active in any case: one, or its floor."""
    return max(1, ceil_count(rules.floor, weights))


def check_floor(rules: Rules, weights: Counts, smallest: int) -> None:
    """Refuse a floor that keeps more weights than the run may have active.

    Args:
        rules: Of the run.
        weights: All weights of each layer.
        smallest: The smallest number of active weights of all layers together, at any time.
    """
    kept = sum(minimum(rules, count) for count in weights.values())
    if rules.across_layers and kept > smallest:
        raise ValueError(
            f"floor is {rules.floor}: it keeps {kept:,} of {sum(weights.values()):,} weights in "
            f"any case, and at some time {smallest:,} are active; lower it, or the sparsity"
        )


def _prune_across_layers(
    rules: Rules,
    layers: Mapping[str, LayerUpdate],
    active: Counts,
    target: Counts,
    weights: Counts,
    rate: float,
    density_moves: bool,
) -> tuple[dict[str, int], dict[str, int]]:
    """Count what leaves each layer with the scope "global", and what each layer exchanges.

    While the density moves, only its cut is made over all layers. Each layer then exchanges its
    share of what it has left (GraNet: Liu et al., 2021, arXiv 2106.10404).
    """
    if not density_moves:
        total = sum(prune_counts(active, target, weights, rate, rules.spare_dense).values())
        n_prune = _lowest_of_all(rules, layers, active, total)
        return n_prune, n_prune

    excess = max(0, sum(active.values()) - sum(target.values()))
    cut = _lowest_of_all(rules, layers, active, excess)
    left = {name: active[name] - cut[name] for name in layers}
    exchanged = prune_counts(left, left, weights, rate, rules.spare_dense)
    return {name: cut[name] + exchanged[name] for name in layers}, exchanged


def _lowest_of_all(
    rules: Rules, layers: Mapping[str, LayerUpdate], active: Counts, total: int
) -> dict[str, int]:
    """Count how many of the lowest scores of all layers together lie in each, down to its floor."""
    most, scores = {}, {}
    for name, layer in layers.items():
        most[name] = max(0, active[name] - minimum(rules, layer.itop.size))
        found = layer.prune_scores(rules.prune)
        if isinstance(found, Tensor):
            active_scores = found[layer.itop.mask]
        else:
            active_scores = found.scores[found.scored]
        scores[name] = -topology.as_float(active_scores)

    total = min(total, sum(most.values()))
    try:
        shares = topology.shares_of_best(scores, total, most)
    except ValueError as error:
        raise ValueError(f"{rules.prune.name}: {error}") from None
    return apportion(shares, total, dict.fromkeys(most, 0), most)


def _redistribute(
    redistribute: CheckedFunction,
    layers: Mapping[str, LayerUpdate],
    known: Mapping[str, Counts],
) -> Mapping[str, float]:
    """Ask the redistribution for its number of each layer.

    Raises:
        ValueError: It did not give one number from 0 per layer.
    """
    given: dict[str, Any] = {}
    for need in redistribute.needs:
        if need in known:
            given[need] = known[need]
        else:
            given[need] = {name: layer.mean_magnitude(need) for name, layer in layers.items()}
    raw = redistribute.function(**given)

    wrong: object = raw
    if isinstance(raw, Mapping):
        wrong = {name: raw.get(name) for name in layers if not _is_proportion(raw.get(name))}
        if not wrong:
            return raw
    raise ValueError(
        f"{redistribute.name} gave {wrong!r}; it must give a number from 0 for every layer"
    )


def _is_proportion(value: object) -> bool:
    return isinstance(value, Real) and 0.0 <= float(value) < math.inf
