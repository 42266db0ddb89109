"""Evaluate a model: on a split while it trains, or saved weights on the test set."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

import itop_prune
from itop_prune.files.state_dicts import read_state
from itop_prune.messages import listed

from ..config.recipe import Recipe, read_recipe
from ..data.datasets import Data
from ..data.source import Source
from ..run_folder.folder import RunError
from .build import build_model, is_never_dense, place_masks
from .checkpoint import CheckpointError, Checkpoints, check_weights
from .stop import StopRequest


@torch.no_grad()
def evaluate(
    model: nn.Module,
    accelerator: Accelerator,
    data: Data,
    source: Source,
    split: str,
    stop: StopRequest,
) -> dict[str, float] | None:
    """Compute loss and top-1 accuracy in percent; each image counts once over all ranks.

    All ranks must call. Returns None if a signal stopped it.
    """
    rank, ranks = accelerator.process_index, accelerator.num_processes

    # Batch statistics are those of the first rank, as in every forward of DDP.
    if ranks > 1:
        for buffer in model.buffers():
            if buffer.is_floating_point():
                torch.distributed.broadcast(buffer, 0)

    sums = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
    training = model.training
    model.eval()

    # The first rank has most batches. The others do as many forwards, with blank images at the
    # end, since the ranks gather sharded weights together.
    batches = data.evaluation(source, rank=rank, ranks=ranks)
    most_batches = math.ceil(math.ceil(len(source) / ranks) / data.eval_batch_size)
    stopped = False
    for _ in range(most_batches):
        stopped = stop.wanted()
        if stopped:
            break

        batch = next(batches, None)
        x = batch[0] if batch else torch.zeros(1, *data.shape, device=accelerator.device)
        with accelerator.autocast():
            logits = model(x).float()

        if batch:
            y = batch[1]
            loss = nn.functional.cross_entropy(logits, y, reduction="sum")
            correct = (logits.argmax(1) == y).sum()
            sums += torch.stack([loss, correct, torch.tensor(len(y), device=y.device)])

    model.train(training)
    if stopped:
        return None

    loss_sum, correct_sum, images = accelerator.reduce(sums).tolist()
    return {f"{split}_loss": loss_sum / images, f"{split}_top1": 100.0 * correct_sum / images}


def read_recipe_for_weights(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe for saved weights: its model is built without weights of its own.

    Raises:
        RecipeError: As `read_recipe`.
    """
    recipe = read_recipe(path, [*overrides, "init=null"])
    return replace(recipe, model={**recipe.model, "pretrained": False, "checkpoint_path": ""})


def load_weights(recipe: Recipe, model: nn.Module, path: Path) -> None:
    """Load saved weights, and masks if the recipe has them, into a model.

    Args:
        recipe: The recipe that the model was built from.
        model: A dense model; changed in place.
        path: A file, a checkpoint, or the folder of a run.

    Raises:
        RunError: They are missing, damaged, or of another model.
    """
    check_holds_weights(path)

    # Of the two models of a checkpoint, a run tests the average.
    if recipe.ema and (path / "ema.safetensors").exists():
        path = path / "ema.safetensors"

    try:
        check_weights(path / "model.safetensors" if path.is_dir() else path)
        if is_never_dense(recipe):
            place_masks(recipe, Accelerator(cpu=True), model, None)
        if recipe.masks:
            itop_prune.load(model, path)
        else:
            model.load_state_dict(read_state(path))
    except (CheckpointError, OSError, ValueError, RuntimeError) as error:
        raise RunError(f"{path} can't be read: {error}") from None


def check_holds_weights(path: Path) -> None:
    """Refuse a folder of seeds, and a run without final weights.

    Raises:
        RunError: This one is; the message names what may be taken.
    """
    if (path / "model.safetensors").exists():
        return

    seeds = sorted(file.parent for file in path.glob("seed*/recipe.yaml"))
    if seeds:
        names = listed(list(map(str, seeds)))
        raise RunError(f"{path} is a folder of seeds, each with weights of its own; take {names}")
    if (path / "recipe.yaml").exists():
        last = Checkpoints(path / "checkpoints", keep=1).last()
        advice = f"take its last checkpoint, {last}, or go on" if last else "go on"
        raise RunError(f"{path} is a run that has not ended; {advice} with --resume")


def evaluate_only(recipe: Recipe, accelerator: Accelerator, data: Data, path: Path) -> int:
    """Print loss and accuracy of saved weights on the test set; return the exit status."""
    model = build_model(recipe, data, accelerator.device)
    load_weights(recipe, model, path)
    with StopRequest(accelerator.num_processes) as stop:
        result = evaluate(model, accelerator, data, data.test, "test", stop)
    if result is None:
        return 130

    accelerator.print("  ".join(f"{name} {value:.4f}" for name, value in result.items()))
    return 0
