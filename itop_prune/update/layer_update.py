"""One layer at an update: the tensors that criteria ask for, their scores, and the new mask."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from itop_prune import patterns, sparse_topology, topology
from itop_prune.layers.handle import ITOP
from itop_prune.layers.sparse_handle import SparseITOP
from itop_prune.methods import criteria
from itop_prune.methods.lookup import CheckedFunction
from itop_prune.methods.validation import check_scores
from itop_prune.sharding import whole
from itop_prune.topology import ActiveScores
from itop_prune.update.gradients import DenseGradients
from itop_prune.update.rules import Rules

NAN = "{} gave NaN for {}; scores must be numbers"
SPARSEST = 0.005
"""With a smaller share of active weights positions are as fast as masks, or faster."""
LARGE = 1 << 31
"""Masks of so many weights or more are not made where positions are enough."""


class LayerUpdate(NamedTuple):
    """One layer that takes part in an update. It reads the layer and changes nothing."""

    name: str
    itop: ITOP
    explored: Mapping[str, Tensor]
    gradients: DenseGradients
    stream: tuple[object, ...]
    """Seeds the generators: the run's seed and the number of the update."""

    def needs_no_mask(self, rules: Rules) -> bool:
        """Tell whether positions are enough for an update, and better than a mask."""
        sparse = self.itop.parameter.numel() <= SPARSEST * self.itop.size
        return (
            (sparse or self.itop.size >= LARGE)
            and rules.positions_suffice
            and self.itop.pattern is None
            and self.itop.active_values() is not None
        )

    def exchange(self, n_prune: int, n_grow: int) -> tuple[Tensor, Tensor]:
        """Compute what `new_mask` does from positions alone: which slots stay, and what enters.

        Raises:
            ValueError: As of `new_mask`.
        """
        itop = cast(SparseITOP, self.itop)
        positions, scores = itop.positions, criteria.magnitude(itop.parameter.detach()[0].float())
        size, ties = self.itop.size, self.generator("ties")
        try:
            return sparse_topology.prune_and_regrow(positions, scores, size, n_prune, n_grow, ties)
        except topology.NaNScores:
            raise ValueError(NAN.format("magnitude", self.name)) from None

    def new_mask(self, rules: Rules, mask: Tensor, n_prune: int, n_grow: int) -> Tensor:
        """Compute the layer's mask after the update from that before, by `prune_and_regrow`.

        With an N:M pattern each group regrows what it lost, and `n_grow` is not used.

        Raises:
            ValueError: Scores are NaN; the message names criterion and layer.
        """
        pattern = self.itop.pattern
        ties = self.generator("ties")

        def scored(kept: Tensor) -> Tensor:
            return self.scores(rules.grow, kept)

        # Random growth draws positions. It needs no score of every one.
        grow_scores = None if rules.grow.function is criteria.random else scored

        try:
            if pattern is None:
                return topology.prune_and_regrow(
                    mask, self.prune_scores(rules.prune, mask), grow_scores, n_prune, n_grow, ties
                )

            kept = topology.prune(mask, self.prune_scores(rules.prune, mask), n_prune, ties)
            dim = self.itop.input_dim
            return patterns.grow_in_groups(kept, scored(kept), *pattern, ties, dim)
        except topology.NaNScores as error:
            criterion = rules.prune if error.role == "prune" else rules.grow
            raise ValueError(NAN.format(criterion.name, self.name)) from None

    def prune_scores(
        self, criterion: CheckedFunction, mask: Tensor | None = None
    ) -> Tensor | ActiveScores:
        """Score positions for pruning; `mask` is the present one, if the caller has it.

        Sparse storage has the values of active weights at hand, and magnitude needs no more.
        """
        if criterion.function is criteria.magnitude:
            active = self.itop.active_values()
            if active is not None:
                positions, values = active
                return ActiveScores(positions, criteria.magnitude(values.float()))
        return self.scores(criterion, self.itop.mask if mask is None else mask, "prune")

    def scores(self, criterion: CheckedFunction, mask: Tensor, *stream: object) -> Tensor:
        """Score every position by a criterion.

        Args:
            criterion: Of the run.
            mask: What the criterion gets as the mask.
            stream: Tells its random draws from those of other criteria.

        Raises:
            RuntimeError: The criterion failed, or wrote into a tensor that it may only read.
            ValueError: It did not give one number per position on the mask's device.
        """
        offered: dict[str, Callable[[], Any]] = {
            "weight": lambda: whole(self.itop.weight).float(),
            "mask": lambda: mask,
            "grad": lambda: self.gradients.gradient(self.name),
            "momentum": lambda: self.gradients.momentum(self.name),
            "explored": lambda: self.explored[self.name],
            "generator": lambda: self.generator(*stream),
        }
        given = {need: offered[need]() for need in criterion.needs}
        versions = {
            need: value._version for need, value in given.items() if isinstance(value, Tensor)
        }

        try:
            scores = criterion.function(**given)
        except Exception as error:
            raise RuntimeError(f"{criterion.name} failed for {self.name}: {error}") from error

        written = [need for need, version in versions.items() if given[need]._version != version]
        if written:
            raise RuntimeError(
                f"{criterion.name} wrote into {', '.join(written)} of {self.name}; a criterion may "
                "only read: copy the tensor first (and go back to a checkpoint, for it is changed)"
            )
        check_scores(scores, mask, criterion.function, f" for {self.name}")
        return scores

    def generator(self, *stream: object) -> torch.Generator:
        """Make a generator of this layer and update.

        The strings of `stream` tell random streams apart. Changing one changes the results for
        every seed.
        """
        return topology.seeded(self.itop.parameter.device, *self.stream, self.name, *stream)

    def mean_magnitude(self, of: str) -> float:
        """Compute the mean abs of the active weights ("magnitude"), or of their "momentum"."""
        if of == "magnitude":
            sizes = whole(self.itop.weight).float()
        else:
            sizes = self.gradients.momentum(self.name)
        total = (sizes * self.itop.mask).abs().sum()
        return float(total / max(1, self.itop.active))
