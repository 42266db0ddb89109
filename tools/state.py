"""The state of a run: written to a checkpoint, put back from one, and refused where its losses are not finite."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from build import Run
from checkpoint import CheckpointError, Checkpoints, load
from runs import RunError
from sharded import load_optimizer_state, model_state, optimizer_state
from torch import Tensor


def save(
    run: Run, accelerator: Accelerator, checkpoints: Checkpoints, loss_sum: Tensor, images: int, best: bool = False
) -> Path | None:
    """Write a checkpoint of all that `restore` puts back; return its folder on the main process."""
    run.progress.loss_sums = accelerator.gather(loss_sum.view(1)).tolist()
    saved = failed = None
    is_main = accelerator.is_main_process
    models = {name: model_state(model, keep=is_main) for name, model in run.models.items()}
    optimizer = optimizer_state(run.optimizer, keep=is_main)
    if is_main:
        state = {
            "progress": asdict(run.progress),
            "images_per_step": images,
            "optimizer": optimizer,
            "regrow": run.regrow.state_dict() if run.regrow else None,
            "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
        }
        try:
            saved = checkpoints.save(run.progress.step, models, state, best)
        except CheckpointError as error:
            failed = error
    if accelerator.reduce(torch.tensor(int(failed is not None), device=accelerator.device)):
        raise failed or CheckpointError("the main process could not write a checkpoint")
    return saved


def restore(run: Run, accelerator: Accelerator, checkpoints: Checkpoints, loss_sum: Tensor, images: int) -> list[str]:
    """Go back to the last whole checkpoint, or to the beginning if there is none; return what to tell about it."""
    found: list[Any] = [None, []]
    if accelerator.is_main_process:  # one decides for all: a disk may show itself differently to another
        try:
            found = list(checkpoints.last_whole())
        except CheckpointError as error:
            found = [error, []]
    folder, notes = broadcast_object_list(found)
    if isinstance(folder, CheckpointError):
        raise folder
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


def stop_if_bad(streak: Tensor, allowed: int, step: int, checkpoints: Checkpoints, accelerator: Accelerator) -> None:
    """Stop after too many losses in a row that are not finite, on any rank; looked at as rarely as that allows."""
    if step % allowed == 0 and (longest := int(accelerator.gather(streak.view(1)).max())) >= allowed:
        good = checkpoints.last_before(step - longest) or "none"
        raise RunError(f"the loss was not finite for {longest} steps, at step {step}; last good checkpoint: {good}")
