"""The density while training: as the masks are, or on the way to a final sparsity."""

from collections.abc import Mapping

from itop_prune import budget, distributions
from itop_prune.criteria import describe
from itop_prune.distributions import Distribution
from itop_prune.mask import ITOP
from itop_prune.menu import choose
from itop_prune.schedules import SCHEDULES, Schedule


class Density:
    """How many weights shall be active after an update."""

    def __init__(
        self,
        masks: Mapping[str, ITOP],
        path: str | Schedule,
        final_sparsity: float | None,
        method: str | Distribution,
    ) -> None:
        """Remember where the counts begin and end.

        Args:
            masks: Of the run.
            path: A key of `SCHEDULES` or a function of progress in [0, 1]; "constant" without a final sparsity.
            final_sparsity: Share of zeros in the end; None: as it is.
            method: How the last active weights are shared out.

        Raises:
            ValueError: A path without an end or the reverse, an unknown name, or an end that can't be shared out.
        """
        self._path = choose(path, SCHEDULES, "density")
        if (final_sparsity is None) != (path == "constant"):
            raise ValueError(
                f"density is {describe(self._path)}, final_sparsity {final_sparsity}; they go together: such as "
                "density='cubic', final_sparsity=0.9, or neither"
            )
        self.moves = final_sparsity is not None
        self.first: dict[str, int] = {}
        """Active weights by layer when it began; {} where the density is as it is."""
        self._last: dict[str, int] = {}
        if final_sparsity is not None:
            self._weights = {name: itop.mask.numel() for name, itop in masks.items()}
            shapes = {name: tuple(itop.mask.shape) for name, itop in masks.items()}
            self.first = {name: itop.active for name, itop in masks.items()}
            self._last = distributions.active_counts(shapes, 1.0 - final_sparsity, method)

    def targets(self, active: Mapping[str, int], progress: float, in_total: bool) -> Mapping[str, int]:
        """Return how many weights of each layer shall be active.

        Args:
            active: How many are, of the layers that take part.
            progress: 1 at the last update.
            in_total: Whether only the sum over the layers counts; they keep their proportion then.
        """
        if not self.moves:
            return active
        weights, first, last = (
            {name: counts[name] for name in active} for counts in (self._weights, self.first, self._last)
        )
        found = budget.targets(first, last, weights, self._path(progress))
        return budget.in_total(active, sum(found.values()), weights) if in_total else found
