"""What happens at an update: how many weights each layer prunes and grows, and which. The model is not touched here."""

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from itop_prune import budget, criteria, patterns, redistribution, topology
from itop_prune.counting import active_in, fetched
from itop_prune.criteria import Criterion
from itop_prune.gradients import DenseGradients
from itop_prune.mask import ITOP
from itop_prune.menu import Asked, choose, describe, needed
from itop_prune.redistribution import Redistribution
from itop_prune.sharding import whole
from itop_prune.values import check_scores, is_number


@dataclass(frozen=True)
class Rules:
    """Who is pruned, who grows, and where: checked arguments of `MaskScheduler`, with what the functions ask for."""

    prune: Asked
    grow: Asked
    redistribute: Asked | None
    across_layers: bool
    floor: float

    @classmethod
    def of(
        cls, prune: str | Criterion, grow: str | Criterion, redistribute: str | Redistribution, scope: str, floor: float
    ) -> "Rules":
        """Look the names up.

        Raises:
            ValueError: One is unknown, a function asks for what is not offered, or the floor is out of range.
        """
        if scope not in ("layer", "global"):
            raise ValueError(f"scope is {scope!r}; allowed are 'layer' and 'global'")
        if not is_number(floor) or not 0.0 <= floor < 1.0 or (floor and scope == "layer"):
            raise ValueError(f"floor is {floor!r}; allowed is a number in [0, 1), with scope='global'")
        chosen = None
        if redistribute != "none":
            menu = {"none": redistribution.nonzeros, **redistribution.REDISTRIBUTIONS}  # for an error to list "none"
            function = choose(redistribute, menu, "redistribute")
            chosen = Asked(function, needed(function, dict.fromkeys(redistribution.OFFERED), "redistribution"))
        return cls(criteria.find(prune, "prune"), criteria.find(grow, "grow"), chosen, scope == "global", floor)

    @property
    def needs(self) -> set[str]:
        """What is asked for by any of them."""
        return {need for asked in (self.prune, self.grow, self.redistribute) if asked for need in asked.needs}

    @property
    def shares_layers(self) -> bool:
        """Whether only the sum over layers is given, and not how many are active in each."""
        return self.across_layers or self.redistribute is not None


@dataclass(frozen=True)
class Layer:
    """One layer at an update, and what criteria may ask about it."""

    name: str
    itop: ITOP
    explored: Tensor
    dense: DenseGradients
    words: tuple[object, ...]
    """What seeds its generators: the run's seed and the number of the update."""

    def scores(self, criterion: Asked, mask: Tensor, *words: object) -> Tensor:
        """Return what a criterion says about every position.

        Raises:
            ValueError: It is not one number per position on the mask's device.
        """
        offered = {
            "weight": lambda: whole(self.itop.weight).float(),
            "mask": lambda: mask,
            "grad": lambda: self.dense.gradient(self.name),
            "momentum": lambda: self.dense.momentum(self.name),
            "explored": lambda: self.explored,
            "generator": lambda: self.generator(*words),
        }
        given: dict[str, Any] = {need: offered[need]() for need in criterion.needs}
        versions = {need: tensor._version for need, tensor in given.items() if isinstance(tensor, Tensor)}
        try:
            scores = criterion.function(**given)
        except Exception as error:
            raise RuntimeError(f"{describe(criterion.function)} failed for {self.name}: {error}") from error
        if written := [need for need, version in versions.items() if given[need]._version != version]:
            raise RuntimeError(
                f"{describe(criterion.function)} wrote into {', '.join(written)} of {self.name}; a criterion may only "
                "read: copy the tensor first (and go back to a checkpoint, for it is changed)"
            )
        check_scores(scores, mask, criterion.function, f" for {self.name}")
        return scores

    def generator(self, *words: object) -> torch.Generator:
        """Return the generator of this update for this layer, a different one for other words."""
        return topology.seeded(self.itop.mask.device, *self.words, self.name, *words)

    def statistic(self, name: str) -> Tensor:
        """Return the mean size of the active weights or of their momentum; 0 where none is active."""
        sizes = whole(self.itop.weight).float() if name == "magnitude" else self.dense.momentum(self.name)
        return (sizes * self.itop.mask).abs().sum() / active_in(self.itop.mask).clamp(min=1)


def counts(
    rules: Rules, layers: Mapping[str, Layer], active: budget.Counts, target: budget.Counts, rate: float, moves: bool
) -> tuple[dict[str, int], dict[str, int]]:
    """Return how many weights each layer prunes, and how many grow in it.

    Args:
        rules: Of the run.
        layers: Those that take part, by name.
        active: How many weights are active in each.
        target: How many shall be active afterwards; where layers share, in all of them together.
        rate: The share of active weights to be exchanged.
        moves: Whether the density is on its way to another one.
    """
    weights = {name: layer.itop.mask.numel() for name, layer in layers.items()}
    spare_dense = rules.redistribute is None
    if rules.across_layers and moves:  # GraNet: cut the surplus, the worst of all layers; then each its share
        cut = _worst_of_all(rules, layers, active, max(0, sum(active.values()) - sum(target.values())))
        left = {name: active[name] - cut[name] for name in layers}
        exchanged = budget.to_prune(left, left, weights, rate, spare_dense)
        leaving = {name: cut[name] + exchanged[name] for name in layers}
    else:
        leaving = exchanged = budget.to_prune(active, target, weights, rate, spare_dense)
        if rules.across_layers:  # as many, but the worst of all layers
            leaving = exchanged = _worst_of_all(rules, layers, active, sum(leaving.values()))
    kept = {name: active[name] - leaving[name] for name in layers}
    if not rules.shares_layers:
        return leaving, {name: target[name] - kept[name] for name in layers}
    proportions: Mapping[str, float] = exchanged
    if rules.redistribute:
        known = {"weights": weights, "active": active, "pruned": leaving}
        proportions = _statistics(rules.redistribute, layers, **known)
    least = {name: min(active[name], least_of(rules, weights[name])) for name in layers}
    return leaving, budget.to_grow(kept, sum(target.values()) - sum(kept.values()), weights, proportions, least)


def exchange(rules: Rules, layer: Layer, leaving: int, entering: int) -> tuple[Tensor, Tensor]:
    """Return the new mask of a layer, and how many active weights pruning left in it.

    It is `topology.prune_and_regrow`, in two steps, for the scores to grow may depend on what was kept. The host waits
    for neither; `check_counts` looks later whether they are as many as they must be.

    Raises:
        ValueError: Scores are NaN, on a device that tells at once.
    """
    mask, scoring = layer.itop.mask, rules.prune
    try:  # the words name streams of random numbers: with others a seed gives another run
        ties = layer.generator("prune", "ties")
        kept = mask ^ topology.select(layer.scores(rules.prune, mask, "prune"), mask, leaving, ties, smallest=True)
        scoring, ties = rules.grow, layer.generator("ties")
        if layer.itop.pattern is None:
            new = kept ^ topology.select(layer.scores(rules.grow, kept), ~kept, entering, ties)
        else:
            new = patterns.grow_in_groups(kept, layer.scores(rules.grow, kept), *layer.itop.pattern, ties)
        return new, active_in(kept)
    except topology.NaNScores:
        raise ValueError(_gave_nan(scoring, layer.name)) from None


def check_counts(
    rules: Rules,
    masks: Mapping[str, Tensor],
    kept: Mapping[str, Tensor],
    active: budget.Counts,
    leaving: budget.Counts,
    entering: budget.Counts,
) -> None:
    """Ask once, after all layers have moved, whether as many weights left and entered each mask as had to.

    Args:
        rules: Of the run.
        masks: The new ones, by name.
        kept: How many active weights pruning left in each, on its device.
        active: How many were active before.
        leaving: How many had to leave.
        entering: How many had to enter.

    Raises:
        ValueError: They did not: their scores were NaN, of which none is chosen.
    """
    counts = {(name, "kept"): count for name, count in kept.items()}
    seen = fetched(counts | {(name, "now"): active_in(mask) for name, mask in masks.items()})
    for name in masks:
        left = active[name] - leaving[name]
        if seen[name, "kept"] != left:
            raise ValueError(_gave_nan(rules.prune, name))
        if seen[name, "now"] != left + entering[name]:
            raise ValueError(_gave_nan(rules.grow, name))


def _gave_nan(criterion: Asked, name: str) -> str:
    return f"{describe(criterion.function)} gave NaN for {name}; scores must be numbers"


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


def _worst_of_all(rules: Rules, layers: Mapping[str, Layer], active: budget.Counts, total: int) -> dict[str, int]:
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


def _statistics(redistribute: Asked, layers: Mapping[str, Layer], **offered: Any) -> Mapping[str, float]:
    """Return what the redistribution says about each layer.

    Raises:
        ValueError: It is not one number from 0 per layer.
    """
    for need in redistribute.needs:
        if need not in offered:
            offered[need] = fetched({name: layer.statistic(need) for name, layer in layers.items()})
    raw = redistribute.function(**{need: offered[need] for need in redistribute.needs})
    if not isinstance(raw, Mapping) or (wrong := {n: raw.get(n) for n in layers if not _is_size(raw.get(n))}):
        raise ValueError(
            f"{describe(redistribute.function)} gave {wrong if isinstance(raw, Mapping) else raw!r}; it must give a "
            "number from 0 for every layer"
        )
    return raw


def _is_size(value: object) -> bool:
    return isinstance(value, Real) and 0.0 <= float(value) < float("inf")
