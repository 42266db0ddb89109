"""The dense gradients that criteria ask for: of the last steps, and their moving average."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler

from itop_prune import distributed
from itop_prune.layers.handle import ITOP
from itop_prune.layers.largest_gradients import LargestGradients
from itop_prune.methods.validation import is_count

DECAY = 0.9
"""The share of the moving average that stays at each step."""


class DenseGradients:
    """The dense gradients of masked weights, collected on the steps that an update needs.

    What is kept from step to step is the mean over ranks, taken at each step. So it is equal on all
    ranks and survives a resume. It takes 4 bytes per weight for a sum over several steps, and 4
    more for the moving average. A step that collects takes 4 more until it is over. Where only the
    largest gradients of one backward matter, it takes 16 for each active weight instead.
    """

    def __init__(
        self,
        masks: Mapping[str, ITOP],
        needs: Collection[str],
        steps: int,
        every: int,
        scaler: GradScaler | None = None,
        largest_alone: bool = False,
    ) -> None:
        if not is_count(steps) or steps > every:
            raise ValueError(
                f"gradient_steps is {steps!r}; allowed are whole numbers from 1 to every, {every}: "
                "the steps before an update"
            )
        if scaler is not None and not isinstance(scaler, GradScaler):
            raise ValueError(
                f"scaler is {type(scaler).__name__}; allowed is a torch.amp.GradScaler, or None: "
                "pass the one that scales the loss"
            )
        self.needed = "grad" in needs or "momentum" in needs
        self._masks, self._steps, self._scaler = masks, steps, scaler
        self._largest_alone = largest_alone and steps == 1 and distributed.world_size() == 1
        self._needs_average = "momentum" in needs
        self._needs_sum = "grad" in needs and steps > 1

        self.collecting = False
        """Whether the next step collects."""
        self._update_is_near = False
        self._collected: dict[str, Tensor | LargestGradients | None] = {}  # by this rank
        self._from_other_ranks: dict[str, Tensor] = {}  # the mean where this rank collected nothing
        self._sums: dict[str, Tensor] = {}
        self._averages: dict[str, Tensor] = {}

    def plan_next_step(self, steps_left: int | None) -> bool:
        """Tell whether the next step has to collect.

        Args:
            steps_left: To the next update, 1 if it follows the next step; None if there is none.
        """
        self._update_is_near = steps_left is not None and steps_left <= self._steps
        if not self.needed or steps_left is None:
            return False
        return self._needs_average or self._update_is_near

    def collect_from(self, names: Collection[str]) -> None:
        """Let the next step collect from these layers only; drop what was collected."""
        self.collecting = bool(names)
        self._collected, self._from_other_ranks = {}, {}
        if not self.needed:
            return
        for name, itop in self._masks.items():
            if name in names:
                itop.collect_dense_gradient(self._scaler, self._largest_alone)
            else:
                itop.take_dense_gradient()

    def end_step(self, names: Collection[str]) -> None:
        """Take what this rank collected, and add it to the sums and averages if it is finite."""
        self._collected = {name: self._masks[name].take_dense_gradient() for name in names}
        if self.collecting and (self._needs_average or self._needs_sum):  # the same on all ranks
            for name, collected in self._collected.items():
                self._add(name, collected)

    @property
    def collected(self) -> dict[str, Tensor | None]:
        """The numbers that this rank collected in the last step, by name."""
        return {
            name: found.values if isinstance(found, LargestGradients) else found
            for name, found in self._collected.items()
        }

    @torch.no_grad()
    def _add(self, name: str, collected: Tensor | LargestGradients | None) -> None:
        mean = self._mean(name, collected)
        if collected is None:
            self._from_other_ranks[name] = mean

        finite, zeros = mean.isfinite().all(), torch.zeros_like(mean)
        if self._needs_sum and self._update_is_near:
            before = self._sums.get(name, zeros).to(mean.device)
            self._sums[name] = torch.where(finite, before + mean, before)
        if self._needs_average:
            before = self._averages.get(name, zeros).to(mean.device)
            after = DECAY * before + (1.0 - DECAY) * mean
            self._averages[name] = torch.where(finite, after, before)

    def _mean(self, name: str, collected: Tensor | LargestGradients | None) -> Tensor:
        """Average over the ranks; a rank that collected nothing takes part with zeros."""
        if collected is None:
            itop = self._masks[name]
            collected = torch.zeros(itop.shape, device=itop.parameter.device)
        elif isinstance(collected, LargestGradients):
            return collected.dense()  # of one rank
        return distributed.mean(collected)

    def gradient(self, name: str) -> Tensor:
        """Compute the gradient for an update: of its step, or the sum over the last steps."""
        if name not in self._sums:
            collected = self._collected.pop(name)
            if collected is None:
                collected = self._from_other_ranks.pop(name, None)
            self._sums[name] = self._mean(name, collected)
        return self._sums[name]

    def momentum(self, name: str) -> Tensor:
        """Look up the moving average of the dense gradient."""
        return self._averages[name]

    def forget(self, name: str) -> None:
        """Free the gradient of a layer whose update is done."""
        self._sums.pop(name, None)
        self._collected.pop(name, None)
        self._from_other_ranks.pop(name, None)

    def end_update(self) -> None:
        """Begin the next sums at 0, also in layers that took no part in the update."""
        self._sums.clear()

    def state_dict(self) -> dict[str, Any]:
        """Copy what is kept from step to step."""
        return {
            "sums": {name: tensor.clone() for name, tensor in self._sums.items()},
            "averages": {name: tensor.clone() for name, tensor in self._averages.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` copied."""
        self._sums = self._placed(state["sums"]) if self._needs_sum else {}
        self._averages = self._placed(state["averages"]) if self._needs_average else {}

    def _placed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy tensors to the devices of their masks."""
        return {
            name: tensor.to(self._masks[name].parameter.device, copy=True)
            for name, tensor in tensors.items()
        }
