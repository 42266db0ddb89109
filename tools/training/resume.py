"""Save the whole state of a run to a checkpoint, and restore it so that the run goes on exactly."""

from dataclasses import asdict
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from ..run_folder.folder import RunError
from .checkpoint import Checkpoints, load_checkpoint
from .ranks import on_main
from .run import Run
from .sharded import load_optimizer_state, model_state, optimizer_state


def save(
    run: Run,
    accelerator: Accelerator,
    checkpoints: Checkpoints,
    loss_sum: Tensor,
    images_per_step: int,
    best: bool = False,
) -> Path | None:
    """Write a checkpoint of all that `restore` needs.

    All ranks must call. Returns its folder on the main process, None on the others.
    """
    # The ranks gather sums and sharded tensors together; the main process keeps them.
    run.progress.loss_sums = accelerator.gather(loss_sum.view(1)).tolist()
    is_main = accelerator.is_main_process
    models = {name: model_state(model, keep=is_main) for name, model in run.models.items()}
    optimizer = optimizer_state(run.optimizer, keep=is_main)

    def write() -> Path:
        state = {
            "progress": asdict(run.progress),
            "images_per_step": images_per_step,
            "optimizer": optimizer,
            "regrow": run.regrow.state_dict() if run.regrow else None,
            "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
        }
        return checkpoints.save(run.progress.step, models, state, best)

    return on_main(accelerator, write)


def restore(
    run: Run,
    accelerator: Accelerator,
    checkpoints: Checkpoints,
    loss_sum: Tensor,
    images_per_step: int,
) -> list[str]:
    """Go back to the last whole checkpoint, or to the beginning if there is none.

    Returns:
        Messages about damaged checkpoints that were passed over.

    Raises:
        CheckpointError: There are checkpoints, and all are damaged.
        RunError: A step would see another number of images than before.
    """
    # The main process decides for all ranks: a shared disk may look different to each.
    found = on_main(accelerator, checkpoints.last_whole)
    folder, problems = broadcast_object_list([found])[0]
    if folder is None:
        return problems

    state = load_checkpoint(folder, run.models)
    if state["images_per_step"] != images_per_step:
        raise RunError(
            f"{folder} trained on {state['images_per_step']} images a step, this run would train "
            f"on {images_per_step}: data.batch_size x processes x "
            "accelerator.gradient_accumulation_steps; change them so that the product is the same"
        )

    load_optimizer_state(run.optimizer, state["optimizer"])
    if run.regrow:
        run.regrow.load_state_dict(state["regrow"])
    if accelerator.scaler and state["scaler"]:
        accelerator.scaler.load_state_dict(state["scaler"])
    for name, value in state["progress"].items():
        setattr(run.progress, name, value)
    if run.cost:
        run.cost.measure(run.unwrapped_model)

    # With as many ranks as before each gets its own sum back, otherwise the first gets all.
    sums = run.progress.loss_sums
    if len(sums) == accelerator.num_processes:
        loss_sum += sums[accelerator.process_index]
    elif accelerator.is_main_process:
        loss_sum += sum(sums)
    return [f"{problem}: going on from {folder}, the one before" for problem in problems]
