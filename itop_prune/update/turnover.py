"""How many weights each layer prunes and grows at an update: alone, over all layers together, or redistributed."""

from collections.abc import Mapping
from numbers import Real
from typing import Any

from itop_prune import topology
from itop_prune.counting import fetched
from itop_prune.methods.lookup import Asked, describe
from itop_prune.update import budget
from itop_prune.update.new_masks import Layer, Rules


def counts(
    rules: Rules,
    layers: Mapping[str, Layer],
    active: budget.Counts,
    target: budget.Counts,
    rate: float,
    moves: bool,
) -> tuple[dict[str, int], dict[str, int]]:
    """Return how many weights each layer prunes, and how many grow in it.

    Args: rules: Of the run. layers: Those that take part, by name. active: How many weights are
        active in each. target: How many shall be active in each afterwards; with `shares_layers`
        only their sum counts. rate: The share of active weights to be exchanged. moves: Whether the
        density is on its way to another one.
    """
    weights = {name: layer.itop.mask.numel() for name, layer in layers.items()}
    proportions: Mapping[str, float]
    if rules.across_layers:
        leaving, proportions = _leaving_across_layers(
            rules, layers, active, target, weights, rate, moves
        )
    else:
        leaving = proportions = budget.to_prune(
            active, target, weights, rate, rules.redistribute is None
        )
    kept = {name: active[name] - leaving[name] for name in layers}
    if not rules.shares_layers:
        return leaving, {name: target[name] - kept[name] for name in layers}
    if rules.redistribute:
        known = {"weights": weights, "active": active, "pruned": leaving}
        proportions = _statistics(rules.redistribute, layers, **known)
    least = {name: min(active[name], least_of(rules, weights[name])) for name in layers}
    return leaving, budget.to_grow(
        kept, sum(target.values()) - sum(kept.values()), weights, proportions, least
    )


def check_floor(rules: Rules, weights: budget.Counts, smallest: int) -> None:
    """Refuse a floor that keeps more weights than there shall be.

    Args:
        rules: Of the run.
        weights: All weights of each layer.
        smallest: The least active weights of all layers together, at any time.
    """
    kept = sum(least_of(rules, count) for count in weights.values())
    if rules.across_layers and kept > smallest:
        raise ValueError(
            f"floor is {rules.floor}: it keeps {kept:,} of {sum(weights.values()):,} weights in any case, and there "
            f"shall be {smallest:,}; lower it, or the sparsity"
        )


def least_of(rules: Rules, weights: int) -> int:
    """Return how many weights of a layer stay active in any case: at least one, at least its floor."""
    return max(1, budget.rounded_up(rules.floor, weights))


def _leaving_across_layers(
    rules: Rules,
    layers: Mapping[str, Layer],
    active: budget.Counts,
    target: budget.Counts,
    weights: budget.Counts,
    rate: float,
    moves: bool,
) -> tuple[dict[str, int], dict[str, int]]:
    """Return how many weights each layer prunes where the worst of all layers leave, and how many it exchanges.

    While the density moves the worst of all are only what it cuts; then each layer exchanges its
    share of what it has left (GraNet's order: Liu et al., 2021, arXiv 2106.10404).
    """
    spare_dense = rules.redistribute is None
    if not moves:
        total = sum(budget.to_prune(active, target, weights, rate, spare_dense).values())
        leaving = _worst_of_all(rules, layers, active, total)
        return leaving, leaving
    cut = _worst_of_all(rules, layers, active, max(0, sum(active.values()) - sum(target.values())))
    left = {name: active[name] - cut[name] for name in layers}
    exchanged = budget.to_prune(left, left, weights, rate, spare_dense)
    return {name: cut[name] + exchanged[name] for name in layers}, exchanged


def _worst_of_all(
    rules: Rules, layers: Mapping[str, Layer], active: budget.Counts, total: int
) -> dict[str, int]:
    """Return how many of the lowest scores of all layers together lie in each, as far as its floor lets them go."""
    most, scores = {}, {}
    for name, layer in layers.items():
        mask = layer.itop.mask
        most[name] = max(0, active[name] - least_of(rules, mask.numel()))
        scores[name] = -topology.as_numbers(layer.scores(rules.prune, mask, "prune")[mask])
    total = min(total, sum(most.values()))
    try:
        shares = topology.shares_of_best(scores, total, most)
    except ValueError as error:
        raise ValueError(f"{describe(rules.prune.function)}: {error}") from None
    return budget.apportion(shares, total, dict.fromkeys(most, 0), most)


def _statistics(
    redistribute: Asked, layers: Mapping[str, Layer], **offered: Any
) -> Mapping[str, float]:
    """Return what the redistribution says about each layer.

    Raises:
        ValueError: It is not one number from 0 per layer.
    """
    for need in redistribute.needs:
        if need not in offered:
            offered[need] = fetched({name: layer.statistic(need) for name, layer in layers.items()})
    raw = redistribute.function(**{need: offered[need] for need in redistribute.needs})
    if not isinstance(raw, Mapping) or (
        wrong := {n: raw.get(n) for n in layers if not _is_size(raw.get(n))}
    ):
        raise ValueError(
            f"{describe(redistribute.function)} gave {wrong if isinstance(raw, Mapping) else raw!r}; it must give a "
            "number from 0 for every layer"
        )
    return raw


def _is_size(value: object) -> bool:
    return isinstance(value, Real) and 0.0 <= float(value) < float("inf")
