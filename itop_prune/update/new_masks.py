"""What happens to a layer at an update: which weights leave and which enter. The model is not touched here."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from itop_prune import topology
from itop_prune.counting import active_in, fetched
from itop_prune.layers.handle import ITOP
from itop_prune.layers.sharding import whole
from itop_prune.methods import criteria, patterns, redistribution
from itop_prune.methods.criteria import Criterion
from itop_prune.methods.lookup import Asked, choose, describe, needed
from itop_prune.methods.redistribution import Redistribution
from itop_prune.methods.validation import check_scores, is_number
from itop_prune.update import budget
from itop_prune.update.gradients import DenseGradients

TOGETHER = 1 << 20
"""Weights of small layers that an update takes at once, where that is more than the largest layer has."""


class Rules(NamedTuple):
    """Who is pruned, who grows, and where: checked arguments of `MaskScheduler`, with what the functions ask for."""

    prune: Asked
    grow: Asked
    redistribute: Asked | None
    across_layers: bool
    floor: float

    @classmethod
    def of(
        cls,
        prune: str | Criterion,
        grow: str | Criterion,
        redistribute: str | Redistribution,
        scope: str,
        floor: float,
    ) -> "Rules":
        """Look the names up.

        Raises: ValueError: One is unknown, a function asks for what is not offered, or the floor is
            out of range.
        """
        if scope not in ("layer", "global"):
            raise ValueError(f"scope is {scope!r}; allowed are 'layer' and 'global'")
        if not is_number(floor) or not 0.0 <= floor < 1.0 or (floor and scope == "layer"):
            raise ValueError(
                f"floor is {floor!r}; allowed is a number in [0, 1), with scope='global'"
            )
        chosen = None
        if redistribute != "none":
            menu = {
                "none": redistribution.nonzeros,
                **redistribution.REDISTRIBUTIONS,
            }  # for an error to list "none"
            function = choose(redistribute, menu, "redistribute")
            chosen = Asked(
                function, needed(function, dict.fromkeys(redistribution.OFFERED), "redistribution")
            )
        return cls(
            criteria.find(prune, "prune"),
            criteria.find(grow, "grow"),
            chosen,
            scope == "global",
            floor,
        )

    @property
    def needs(self) -> set[str]:
        """What is asked for by any of them."""
        return {
            need
            for asked in (self.prune, self.grow, self.redistribute)
            if asked
            for need in asked.needs
        }

    @property
    def shares_layers(self) -> bool:
        """Whether only the sum over layers is given, and not how many are active in each."""
        return self.across_layers or self.redistribute is not None


class Layer(NamedTuple):
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
        versions = {
            need: tensor._version for need, tensor in given.items() if isinstance(tensor, Tensor)
        }
        try:
            scores = criterion.function(**given)
        except Exception as error:
            raise RuntimeError(
                f"{describe(criterion.function)} failed for {self.name}: {error}"
            ) from error
        if written := [
            need for need, version in versions.items() if given[need]._version != version
        ]:
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
        sizes = (
            whole(self.itop.weight).float()
            if name == "magnitude"
            else self.dense.momentum(self.name)
        )
        return (sizes * self.itop.mask).abs().sum() / active_in(self.itop.mask).clamp(min=1)


def alike(
    layers: Mapping[str, Layer], leaving: budget.Counts, entering: budget.Counts
) -> list[list[Layer]]:
    """Return the layers that move, in groups that `exchange` takes at once: of one device, size and counts.

    To launch an operation on a GPU often takes longer than the operation. So a group has as many
    layers as there is room for: all weights of the largest layer, or `TOGETHER`. On a CPU each goes
    alone, and so does one with a pattern.
    """
    sizes = {name: layer.itop.mask.numel() for name, layer in layers.items()}
    room = max([TOGETHER, *sizes.values()])
    groups: dict[tuple[object, ...], list[list[Layer]]] = {}
    for name, layer in layers.items():
        if leaving[name] or entering[name]:
            device = layer.itop.mask.device
            alone = device.type in topology.ANSWERS_AT_ONCE or layer.itop.pattern is not None
            kind = (device, sizes[name], leaving[name], entering[name], name if alone else None)
            of_kind = groups.setdefault(kind, [])
            if not of_kind or (len(of_kind[-1]) + 1) * sizes[name] > room:
                of_kind.append([])
            of_kind[-1].append(layer)
    return [group for of_kind in groups.values() for group in of_kind]


def exchange(
    rules: Rules, layers: Sequence[Layer], leaving: int, entering: int
) -> list[tuple[Tensor, Tensor]]:
    """Return the new mask of each layer, and how many active weights pruning left in it.

    It is `topology.prune_and_regrow`, with the scores to grow computed in between, from what was
    kept; a pattern N:M fills its groups. All scores to prune come before the first to grow. The
    host does not wait: `check_counts` looks later whether the counts are right.

    Args:
        rules: Of the run.
        layers: Some that are `alike`.
        leaving: How many leave each of them.
        entering: How many enter it.

    Raises:
        ValueError: Scores are NaN, on a device that tells at once.
    """
    masks, scoring = [layer.itop.mask for layer in layers], rules.prune
    try:  # the words name streams of random numbers: with others a seed gives another run
        ties = [layer.generator("prune", "ties") for layer in layers]
        scores = (
            layer.scores(rules.prune, mask, "prune")
            for layer, mask in zip(layers, masks, strict=True)
        )
        kept = list(
            map(
                torch.bitwise_xor,
                masks,
                topology.select_each(scores, masks, leaving, ties, smallest=True),
            )
        )
        scoring, ties = rules.grow, [layer.generator("ties") for layer in layers]
        scores = (layer.scores(rules.grow, mask) for layer, mask in zip(layers, kept, strict=True))
        pattern = layers[0].itop.pattern
        if pattern is None:
            inactive = [~mask for mask in kept]
            new = list(
                map(torch.bitwise_xor, kept, topology.select_each(scores, inactive, entering, ties))
            )
        else:
            new = [patterns.grow_in_groups(kept[0], next(scores), *pattern, ties[0])]
        return [(mask, active_in(left)) for mask, left in zip(new, kept, strict=True)]
    except topology.NaNScores:
        raise ValueError(_gave_nan(scoring, layers[0].name)) from None


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
