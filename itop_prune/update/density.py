"""The density while training: as the masks are, or on the way to a final sparsity."""

from collections.abc import Mapping

from itop_prune.layers.handle import ITOP, active_weights
from itop_prune.methods import distributions
from itop_prune.methods.criteria import describe
from itop_prune.methods.distributions import Distribution
from itop_prune.methods.schedules import Schedule, constant, factor, find
from itop_prune.methods.validation import is_number
from itop_prune.update import budget


class Density:
    """How many weights shall be active after an update."""

    def __init__(
        self,
        masks: Mapping[str, ITOP],
        path: str | Schedule,
        final_sparsity: float | None,
        method: str | Distribution,
        in_total: bool,
    ) -> None:
        """Remember where the counts begin and end.

        Args: masks: Of the run. path: A key of `SCHEDULES` or a function of progress in [0, 1];
            "constant" without a final sparsity. final_sparsity: Share of zeros in the end; None: as
            it is. method: How the last active weights are shared out. in_total: Whether only the
            sum over the layers counts; they keep their proportion then.

        Raises: ValueError: An end out of range, a path without an end or the reverse, an unknown
            name, an end that can't be shared out, a path that leaves [0, 1], or a layer that can't
            move.
        """
        if final_sparsity is not None and (
            not is_number(final_sparsity) or not 0.0 <= final_sparsity < 1.0
        ):
            raise ValueError(
                f"final_sparsity is {final_sparsity!r}; allowed is a number in [0, 1), or None"
            )
        self._path, self._in_total = find(path, "density"), in_total
        if (final_sparsity is None) != (self._path is constant):
            raise ValueError(
                f"density is {describe(self._path)}, final_sparsity {final_sparsity}; they go together: such as "
                "density='cubic', final_sparsity=0.9, or neither"
            )
        self.moves = final_sparsity is not None
        self.first: dict[str, int] = {}
        """Active weights by layer when it began; {} where the density is as it is."""
        self._last: dict[str, int] = {}
        self.least = sum(active_weights(masks).values())
        """The smallest sum over the layers on the way."""
        if final_sparsity is not None:
            if frozen := [name for name, itop in masks.items() if not itop.parameter.requires_grad]:
                raise ValueError(
                    f"{', '.join(frozen)} can't move (requires_grad is False), and final_sparsity {final_sparsity} "
                    "counts every mask that is passed; leave what is frozen out of masks, or let it train"
                )
            self._weights = {name: itop.mask.numel() for name, itop in masks.items()}
            shapes = {name: itop.kernel_shape for name, itop in masks.items()}
            self.begin(masks)
            self._last = distributions.active_counts(
                shapes, 1.0 - float(final_sparsity), distributions.uniform if in_total else method
            )
            self.least = min(self.least, sum(self._last.values()))

    def begin(self, masks: Mapping[str, ITOP]) -> None:
        """Start from what is active now, unless it has started; a state may be of a run where the density stood."""
        if self.moves and not self.first:
            self.first = active_weights(masks)

    def targets(self, active: Mapping[str, int], progress: float) -> Mapping[str, int]:
        """Return how many weights of each layer shall be active.

        Args:
            active: How many are, of the layers that take part.
            progress: 1 at the last update, where the end is reached whatever the path says.
        """
        if not self.moves:
            return active
        weights, first, last = (
            {name: counts[name] for name in active}
            for counts in (self._weights, self.first, self._last)
        )
        found = budget.targets(
            first, last, weights, factor(self._path, progress) if progress < 1.0 else 0.0
        )
        return budget.in_total(active, sum(found.values()), weights) if self._in_total else found
