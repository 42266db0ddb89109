"""What criteria may ask of the dense gradient: that of the last steps before an update, and its moving average."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from itop_prune import distributed as ranks
from itop_prune.layers.handle import ITOP
from itop_prune.methods.validation import is_count

DECAY = 0.9
"""Of the moving average: what stays of it at each step."""


class DenseGradients:
    """The dense gradients of masked weights, listened for on the steps on which somebody will ask.

    What is kept from step to step is the mean over ranks, taken at each of them, so that it is
    equal everywhere and survives a resume: 4 bytes per weight for a sum over several steps, 4 more
    for the moving average. On a step that listens the gradient itself takes 4 as well, until the
    step is over.
    """

    def __init__(
        self, masks: Mapping[str, ITOP], needs: Collection[str], steps: int, every: int
    ) -> None:
        if not is_count(steps) or steps > every:
            raise ValueError(
                f"gradient_steps is {steps!r}; allowed are whole numbers from 1 to every, {every}: the steps before an "
                "update"
            )
        self.wanted = "grad" in needs or "momentum" in needs
        self._masks, self._steps, self._averages_wanted = masks, steps, "momentum" in needs
        self._sums_wanted = "grad" in needs and steps > 1
        self.listens = self._near = False
        self._heard: dict[str, Tensor | None] = {}
        self._elsewhere: dict[str, Tensor] = {}
        """The mean of what other ranks heard, where this one heard nothing; where it did, it is in what was heard."""
        self._sums: dict[str, Tensor] = {}
        self._averages: dict[str, Tensor] = {}

    def plan_next(self, steps_left: int | None) -> bool:
        """Take note of how far the next update is; return whether the gradient of the next step is needed.

        Args: steps_left: To the next update, 1 if it comes after the next step; None if there is
            none.
        """
        self._near = steps_left is not None and steps_left <= self._steps
        return self.wanted and steps_left is not None and (self._averages_wanted or self._near)

    def listen(self, names: Collection[str]) -> None:
        """Listen in the next step to the weights of these names, and to no others; let go of what was heard before."""
        self.listens = bool(names)
        self._heard, self._elsewhere = {}, {}
        for name, itop in self._masks.items() if self.wanted else ():
            itop.listen() if name in names else itop.take_gradient()

    def collect(self, names: Collection[str]) -> dict[str, Tensor | None]:
        """Return what this rank heard in the step by name, and add it to what is kept; what is not finite is not."""
        self._heard = {name: self._masks[name].take_gradient() for name in names}
        if self.listens and (
            self._averages_wanted or self._sums_wanted
        ):  # alike on all ranks, heard or not
            for name, heard in self._heard.items():
                self._add(name, heard)
        return self._heard

    @torch.no_grad()
    def _add(self, name: str, heard: Tensor | None) -> None:
        mean = ranks.mean(heard, self._masks[name].mask)
        if heard is None:
            self._elsewhere[name] = mean
        finite, nothing = mean.isfinite().all(), torch.zeros_like(mean)
        if self._sums_wanted and self._near:
            before = self._sums.get(name, nothing).to(mean.device)
            self._sums[name] = torch.where(finite, before + mean, before)
        if self._averages_wanted:
            before = self._averages.get(name, nothing).to(mean.device)
            self._averages[name] = torch.where(
                finite, DECAY * before + (1.0 - DECAY) * mean, before
            )

    def gradient(self, name: str) -> Tensor:
        """Return the dense gradient for an update, mean over ranks: of its step, or the sum over the last steps."""
        if name not in self._sums:
            heard = self._heard.pop(name)
            heard = self._elsewhere.pop(name, None) if heard is None else heard
            self._sums[name] = ranks.mean(heard, self._masks[name].mask)
        return self._sums[name]

    def forget(self, name: str) -> None:
        """Give back the gradient of a layer whose update is made."""
        self._sums.pop(name, None)
        self._heard.pop(name, None)
        self._elsewhere.pop(name, None)

    def forget_all(self) -> None:
        """Begin the next sums at 0, also of layers that took no part in the update."""
        self._sums.clear()

    def momentum(self, name: str) -> Tensor:
        """Return the moving average of the dense gradient."""
        return self._averages[name]

    def state_dict(self) -> dict[str, Any]:
        """Return what is kept from step to step."""
        kept = {"sums": self._sums, "averages": self._averages}
        return {
            key: {name: tensor.clone() for name, tensor in tensors.items()}
            for key, tensors in kept.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self._sums, self._averages = (
            {
                name: tensor.to(self._masks[name].mask.device, copy=True)
                for name, tensor in state[key].items()
                if wanted
            }
            for key, wanted in (("sums", self._sums_wanted), ("averages", self._averages_wanted))
        )
