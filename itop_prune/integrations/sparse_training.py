"""What the callbacks share: their arguments, the masks, the MaskScheduler, the numbers to log."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from itop_prune.initial_masks import apply
from itop_prune.layers.handle import ITOP, active_weights, find_masks
from itop_prune.messages import listed, nearest
from itop_prune.scheduler import MaskScheduler

OF_APPLY = dict(inspect.signature(apply).parameters)
OF_SCHEDULER = dict(inspect.signature(MaskScheduler).parameters)

FROM_TRAINER = ("model", "masks", "optimizer", "total_steps", "scaler", "one_backward")
"""The arguments that a callback takes from its trainer."""

EXAMPLE = 'SparseTrainingCallback(sparsity=0.8, exclude="lm_head", every=1000, grow="gradient")'


class SparseTraining:
    """The part of a callback that knows no trainer.

    Args:
        arguments: Keyword arguments of `itop_prune.apply` and of MaskScheduler together; `seed`
            goes to both. If the model has masks already, give those of MaskScheduler alone. Model,
            optimizer, `total_steps`, `scaler` and `one_backward` come from the trainer.

    Raises:
        TypeError: An argument is unknown, comes from the trainer, or is missing.
    """

    masks: dict[str, ITOP]
    """The masks of the model; empty until the trainer has the model."""
    scheduler: MaskScheduler | None
    """Moves the masks; None until training begins."""
    metrics: dict[str, float]
    """`sparsity` and `R_s`, as they are logged; empty until training begins."""

    def __init__(self, **arguments: Any) -> None:
        self._for_apply, self._for_scheduler = split(arguments)
        self.masks, self.scheduler, self.metrics = {}, None, {}

    def place_masks(self, model: nn.Module) -> None:
        """Make the model sparse, or find the masks that it has; call it before the optimizer.

        Raises:
            ValueError: The model has masks and there are arguments of `apply`, or neither is there.
        """
        found = find_masks(model)
        if found and found == self.masks:  # training starts a second time
            return
        if found and self._for_apply:
            raise ValueError(
                f"the model has masks already, and the callback was given "
                f"{listed(list(self._for_apply))} to make others; leave out the arguments of "
                "itop_prune.apply to train with the masks that are there"
            )
        if not found and not self._for_apply:
            raise ValueError(
                "the model has no masks, and the callback no arguments to make them; give both "
                f"kinds, as in {EXAMPLE}, or call itop_prune.apply on the model before"
            )
        self.masks = found or apply(model, **self._for_apply)

    def start(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        total_steps: int,
        *,
        one_backward: bool,
        scaler: GradScaler | None = None,
        saved: Mapping[str, Any] | None = None,
    ) -> None:
        """Build the MaskScheduler, with its state from a checkpoint if training resumes.

        Raises:
            ValueError: The model has no masks, the saved state is of another run, or an argument of
                MaskScheduler is out of range.
        """
        self.masks = find_masks(model)
        if not self.masks:
            raise ValueError(
                "the model that is trained has no masks: it was made anew after the trainer was "
                "built, or the callback was added later; call itop_prune.apply where the model is "
                "made, and leave its arguments out of the callback"
            )
        scheduler = MaskScheduler(
            self.masks,
            optimizer,
            total_steps=total_steps,
            scaler=scaler,
            one_backward=one_backward,
            **self._for_scheduler,
        )
        if saved is not None:
            scheduler.load_state_dict(saved)
            self._check_explored(scheduler)
        self.scheduler = scheduler
        self._measure()

    def step(self) -> None:
        """Count an optimizer step, which was not skipped; gradients must still be there."""
        if self.scheduler is not None and self.scheduler.step():
            self._measure()

    def _measure(self) -> None:
        active = sum(active_weights(self.masks).values())
        total = sum(itop.size for itop in self.masks.values())
        explored = 0.0 if self.scheduler is None else self.scheduler.exploration_rate()
        self.metrics = {"sparsity": 1.0 - active / total, "R_s": explored}

    def _check_explored(self, scheduler: MaskScheduler) -> None:
        """Refuse the state of another run: what is active now was active when it was saved."""
        for name, itop in self.masks.items():
            if not scheduler.explored.holds(name, itop.active_positions()):
                raise ValueError(
                    f"the masks of {name} and the saved state of the MaskScheduler are of two "
                    "runs; resume from a checkpoint that holds both"
                )


def split(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split keyword arguments into those of `apply` and those of MaskScheduler.

    Raises:
        TypeError: One is unknown, comes from the trainer, or is missing.

    >>> split({"sparsity": 0.8, "every": 4, "grow": "gradient"})
    ({'sparsity': 0.8}, {'every': 4, 'grow': 'gradient'})
    """
    known = (OF_APPLY.keys() | OF_SCHEDULER.keys()) - set(FROM_TRAINER)
    for name in arguments:
        if name in FROM_TRAINER:
            raise TypeError(f"{name} comes from the trainer; leave it out of the callback")
        if name not in known:
            raise TypeError(
                f"unknown argument {name!r}{nearest(name, known)}; allowed are those of "
                f"itop_prune.apply and MaskScheduler together, as in {EXAMPLE}"
            )

    for_apply = {name: value for name, value in arguments.items() if name in OF_APPLY}
    for_scheduler = {name: value for name, value in arguments.items() if name in OF_SCHEDULER}
    if for_apply.keys() <= OF_SCHEDULER.keys():  # a seed alone makes no masks
        for_apply = {}

    needed = {**OF_SCHEDULER, **(OF_APPLY if for_apply else {})}
    for name, parameter in needed.items():
        required = parameter.default is parameter.empty and name not in FROM_TRAINER
        if required and name not in arguments:
            raise TypeError(f"the argument {name} is missing; give it, as in {EXAMPLE}")
    return for_apply, for_scheduler
