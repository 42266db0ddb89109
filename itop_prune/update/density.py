"""The density during training: as the masks are, or on the way to a final sparsity."""

from collections.abc import Mapping

from itop_prune.layers.handle import ITOP, active_weights
from itop_prune.messages import describe
from itop_prune.methods import distributions, schedules
from itop_prune.methods.distributions import Distribution
from itop_prune.methods.schedules import Schedule, factor
from itop_prune.methods.validation import is_number
from itop_prune.update.counts import counts_between, scale_counts


class DensityTargets:
    """How many weights should be active in each layer after an update."""

    def __init__(
        self,
        masks: Mapping[str, ITOP],
        path: str | Schedule | Mapping[str, float],
        final_sparsity: float | None,
        method: str | Distribution,
        sum_only: bool,
    ) -> None:
        """Store the counts at the beginning and at the end.

        Args:
            masks: Of the run.
            path: A key of `SCHEDULES`, {"power": p} or a function of progress in [0, 1]; "constant"
                without a final sparsity.
            final_sparsity: Share of zeros at the end; None: the sparsity stays.
            method: How the final active weights are shared out.
            sum_only: Whether only the sum over the layers counts. The layers then keep their
                proportions.

        Raises:
            ValueError: The final sparsity is out of range or can't be shared out, a path comes
                without it or the reverse, a name is unknown, the path leaves [0, 1], or a layer
                can't move.
        """
        if final_sparsity is not None and (
            not is_number(final_sparsity) or not 0.0 <= final_sparsity < 1.0
        ):
            raise ValueError(
                f"final_sparsity is {final_sparsity!r}; allowed is a number in [0, 1), or None"
            )
        self._path, self._sum_only = schedules.find(path, "density"), sum_only
        if (final_sparsity is None) != (self._path is schedules.constant):
            raise ValueError(
                f"density is {describe(self._path)}, final_sparsity {final_sparsity}; they go "
                "together: such as density='cubic', final_sparsity=0.9, or neither"
            )

        self.moves = final_sparsity is not None
        self.first: dict[str, int] = {}
        """Active weights by layer at the beginning; {} if the density stays."""
        self._last: dict[str, int] = {}
        self.smallest = sum(active_weights(masks).values())
        """The smallest sum over the layers on the way."""
        if final_sparsity is not None:
            self._plan_end(masks, float(final_sparsity), method)

    def _plan_end(
        self, masks: Mapping[str, ITOP], final_sparsity: float, method: str | Distribution
    ) -> None:
        frozen = [name for name, itop in masks.items() if not itop.parameter.requires_grad]
        if frozen:
            raise ValueError(
                f"{', '.join(frozen)} can't move (requires_grad is False), and final_sparsity "
                f"{final_sparsity} counts every mask that is passed; leave what is frozen out of "
                "masks, or let it train"
            )

        self._weights = {name: itop.size for name, itop in masks.items()}
        self.begin(masks)
        shapes = {name: itop.kernel_shape for name, itop in masks.items()}
        if self._sum_only:
            method = distributions.uniform
        self._last = distributions.active_counts(shapes, 1.0 - final_sparsity, method)
        self.smallest = min(self.smallest, sum(self._last.values()))

    @property
    def falls(self) -> bool:
        """Whether fewer weights are active at the end than at the beginning."""
        return sum(self._last.values()) < sum(self.first.values())

    def begin(self, masks: Mapping[str, ITOP]) -> None:
        """Start from the present counts unless the way has begun.

        A loaded state may come from a run whose density stayed.
        """
        if self.moves and not self.first:
            self.first = active_weights(masks)

    def targets(self, active: Mapping[str, int], progress: float) -> Mapping[str, int]:
        """Compute how many weights of each layer should be active.

        Args:
            active: How many are active, by name, in the layers that take part.
            progress: In [0, 1]. At 1 the end is reached whatever the path says.
        """
        if not self.moves:
            return active

        first = {name: self.first[name] for name in active}
        last = {name: self._last[name] for name in active}
        weights = {name: self._weights[name] for name in active}
        left = factor(self._path, progress) if progress < 1.0 else 0.0
        found = counts_between(first, last, weights, left)
        if self._sum_only:
            return scale_counts(active, sum(found.values()), weights)
        return found
