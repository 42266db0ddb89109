"""The state of a run: written to a checkpoint, put back from one, and kept out of one while its losses are bad."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from itop_prune.sharding import local

from ..run_folder.folder import RunError
from .build import Run
from .checkpoint import CheckpointError, Checkpoints, load
from .sharded import load_optimizer_state, model_state, optimizer_state

Result = TypeVar("Result")


class OtherRankFailed(Exception):
    """The main process could not do what all wait for, and says why itself."""


def on_main(accelerator: Accelerator, act: Callable[[], Result]) -> Result | None:
    """Let the main process alone act, and return what it got; where it fails no rank goes on.

    Raises:
        CheckpointError, RunError, OSError: On the main process, whatever it met.
        OtherRankFailed: On the others.
    """
    result = failed = None
    if accelerator.is_main_process:
        try:
            result = act()
        except (CheckpointError, RunError, OSError) as error:
            failed = error
    if accelerator.reduce(torch.tensor(int(failed is not None), device=accelerator.device)):
        raise failed or OtherRankFailed
    return result


def save(
    run: Run,
    accelerator: Accelerator,
    checkpoints: Checkpoints,
    loss_sum: Tensor,
    images: int,
    best: bool = False,
) -> Path | None:
    """Write a checkpoint of all that `restore` puts back; return its folder on the main process."""
    run.progress.loss_sums = accelerator.gather(loss_sum.view(1)).tolist()
    is_main = accelerator.is_main_process
    models = {name: model_state(model, keep=is_main) for name, model in run.models.items()}
    optimizer = optimizer_state(run.optimizer, keep=is_main)

    def write() -> Path:
        state = {
            "progress": asdict(run.progress),
            "images_per_step": images,
            "optimizer": optimizer,
            "regrow": run.regrow.state_dict() if run.regrow else None,
            "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
        }
        return checkpoints.save(run.progress.step, models, state, best)

    return on_main(accelerator, write)


def restore(
    run: Run, accelerator: Accelerator, checkpoints: Checkpoints, loss_sum: Tensor, images: int
) -> list[str]:
    """Go back to the last whole checkpoint, or to the beginning if there is none; return what to tell about it."""
    found = on_main(
        accelerator, checkpoints.last_whole
    )  # one decides for all: a disk may show itself differently
    folder, notes = broadcast_object_list([found])[0]
    if folder is None:
        return notes
    state = load(folder, run.models)
    if state["images_per_step"] != images:
        raise RunError(
            f"{folder} trained on {state['images_per_step']} images a step, this would on {images}: data.batch_size x "
            "processes x accelerator.gradient_accumulation_steps; change them so that the product is the same"
        )
    load_optimizer_state(run.optimizer, state["optimizer"])
    if run.regrow:
        run.regrow.load_state_dict(state["regrow"])
    if accelerator.scaler and state["scaler"]:
        accelerator.scaler.load_state_dict(state["scaler"])
    for name, value in state["progress"].items():
        setattr(run.progress, name, value)
    sums = run.progress.loss_sums
    if len(sums) == accelerator.num_processes:
        loss_sum += sums[accelerator.process_index]
    elif accelerator.is_main_process:
        loss_sum += sum(sums)
    return [f"{note}: going on from {folder}, the one before" for note in notes]


class BadLosses:
    """Counts, on the device, steps in a row with a loss that is not finite; the ranks compare as rarely as possible."""

    def __init__(self, allowed: int | None, model: nn.Module, accelerator: Accelerator) -> None:
        self._allowed, self._model, self._accelerator = allowed, model, accelerator
        self._in_a_row = torch.zeros((), dtype=torch.int64, device=accelerator.device)
        self._in_this_step = torch.zeros((), dtype=torch.bool, device=accelerator.device)

    def see(self, loss: Tensor) -> None:
        """Take in the loss of a micro-batch."""
        if self._allowed:
            self._in_this_step |= ~loss.detach().isfinite()

    def end_step(self, step: int, checkpoints: Checkpoints) -> None:
        """Count the step.

        Raises: RunError: There were too many in a row on one of the ranks; elsewhere than on the
            main process OtherRankFailed.
        """
        if not self._allowed:
            return
        self._in_a_row = torch.where(self._in_this_step, self._in_a_row + 1, 0)
        self._in_this_step.zero_()
        if (
            step % self._allowed == 0
            and (longest := self._longest(self._in_a_row)) >= self._allowed
        ):

            def refuse() -> None:
                good = checkpoints.last_before(step - longest) or "none"
                raise RunError(
                    f"the loss was not finite for {longest} steps, at step {step}; last good checkpoint: {good}"
                )

            on_main(self._accelerator, refuse)

    def spoil(self) -> bool:
        """Return whether the last loss or a weight is bad on any rank: a checkpoint would push out a good one."""
        if not self._allowed:
            return False
        finite = torch.stack(
            [local(parameter).isfinite().all() for parameter in self._model.parameters()]
        ).all()
        return self._longest(self._in_a_row + ~finite) > 0

    def _longest(self, in_a_row: Tensor) -> int:
        return int(self._accelerator.gather(in_a_row.view(1)).max())
