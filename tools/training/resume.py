"""Save the whole state of a run to a checkpoint, and restore it so that the run goes on exactly."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from ..run_folder.folder import RunError, in_a_line
from .checkpoint import CheckpointError, Checkpoints, load_checkpoint
from .ranks import on_main
from .run import Progress, Run
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
        CheckpointError: There are checkpoints, and all are damaged, or the last whole one holds a
            state that no run of this recipe has saved.
        RunError: A step would see another number of images than before.
    """
    # The main process decides for all ranks: a shared disk may look different to each.
    found = on_main(accelerator, checkpoints.last_whole)
    folder, problems = broadcast_object_list([found])[0]
    if folder is None:
        return problems

    state = load_checkpoint(folder, run.models)
    with usable(folder):
        check_form(state, run)
    if state["images_per_step"] != images_per_step:
        raise RunError(
            f"{folder} trained on {state['images_per_step']} images a step, this run would train "
            f"on {images_per_step}: data.batch_size x processes x "
            "accelerator.gradient_accumulation_steps; change them so that the product is the same"
        )

    with usable(folder):
        check_steps(state, run)
    with usable(folder, "optimizer: "):
        load_optimizer_state(run.optimizer, state["optimizer"])
    with usable(folder, "regrow: "):
        if run.regrow:
            run.regrow.load_state_dict(state["regrow"])
    with usable(folder, "scaler: "):
        if accelerator.scaler and state["scaler"]:
            accelerator.scaler.load_state_dict(state["scaler"])
    for name, value in state["progress"].items():
        setattr(run.progress, name, value)
    if run.cost:
        run.cost.measure(run.unwrapped_model)

    # With as many ranks as before each gets its own sum back, otherwise the first gets all.
    sums = run.progress.loss_sums
    with usable(folder, "progress.loss_sums: "):
        if len(sums) == accelerator.num_processes:
            loss_sum += sums[accelerator.process_index]
        elif accelerator.is_main_process:
            loss_sum += sum(sums)
    return [f"{problem}: going on from {folder}, the one before" for problem in problems]


@contextmanager
def usable(folder: Path, key: str = "") -> Iterator[None]:
    """Name the file and the key of a state that can't be used.

    Raises:
        CheckpointError: Instead of any other error.
    """
    try:
        yield
    except Exception as error:  # of any kind, as what is wrong happens to be used
        raise CheckpointError(
            f"{folder / 'state.pt'} can't be used: {key}{in_a_line(error)}; remove {folder} "
            "to use the one before"
        ) from None


def check_form(state: Any, run: Run) -> None:
    """Refuse a state without the keys and types that a run saves.

    Raises:
        ValueError: The message names the key.
    """
    counts = {"step": 0, "updates": 0, "skipped": 0, "due": False}
    form = {
        "progress": asdict(Progress()),
        "images_per_step": 0,
        "optimizer": {},
        "regrow": counts if run.regrow else None,
    }
    check_types(state, form, "the state")


def check_steps(state: dict[str, Any], run: Run) -> None:
    """Refuse a state of an epoch or a step that the run does not have.

    Raises:
        ValueError: The message names the key.
    """
    epoch, step = state["progress"]["epoch"], state["progress"]["step"]
    if not 0 <= epoch <= run.epochs:
        raise ValueError(f"progress.epoch is {epoch}; allowed is 0 to {run.epochs}")

    first = epoch * run.steps_per_epoch
    last = min(first + run.steps_per_epoch, run.total_steps)
    if not first <= step <= last:
        raise ValueError(
            f"progress.step is {step}; allowed after {epoch} epochs is {first} to {last}"
        )
    if run.regrow and not 0 <= state["regrow"]["step"] <= step:
        raise ValueError(f"regrow.step is {state['regrow']['step']}; allowed is 0 to {step}")


def check_types(value: Any, like: Any, name: str, prefix: str = "") -> None:
    """Refuse a value of another type, or a mapping with such a value or without a key.

    Raises:
        ValueError: The message names the value.
    """
    if type(value) is not type(like):
        raise ValueError(f"{name} is missing or no {type(like).__name__}")

    if isinstance(like, dict):
        for key, inner in like.items():
            check_types(value.get(key), inner, f"{prefix}{key}", f"{prefix}{key}.")
