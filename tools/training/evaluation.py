"""How well a model does: on a split while it trains, and saved weights on the test set."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

import itop_prune
from itop_prune.files.state_dicts import read_state

from ..config.recipe import Recipe, read
from ..data.datasets import Data, augmentation_of, open_data
from ..data.source import Source
from ..run_folder.folder import RunError, StopRequest
from .build import build_model


def read_for_weights(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe for weights that lie elsewhere: the model is built without any.

    Raises:
        RecipeError: As of `itop_prune_tools.config.recipe.read`.
    """
    recipe = read(path, [*overrides, "init=null"], data=open_data, augment=augmentation_of)
    return replace(recipe, model={**recipe.model, "pretrained": False, "checkpoint_path": ""})


@torch.no_grad()
def evaluate(
    model: nn.Module,
    accelerator: Accelerator,
    data: Data,
    source: Source,
    split: str,
    stop: StopRequest,
) -> dict[str, float] | None:
    """Return loss and top-1 accuracy in percent over a split, every image once over all ranks; None where stopped."""
    rank, ranks = accelerator.process_index, accelerator.num_processes
    if ranks > 1:  # batch statistics are the first rank's, as in every forward of DDP
        for buffer in model.buffers():
            if buffer.is_floating_point():
                torch.distributed.broadcast(buffer, 0)
    sums = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
    training, stopped = model.training, False
    model.eval()
    batches = data.evaluation(source, rank=rank, ranks=ranks)
    of_the_first_rank = math.ceil(math.ceil(len(source) / ranks) / data.eval_batch_size)
    for _ in range(
        of_the_first_rank
    ):  # which has most: ranks with fewer do as many forwards, and ask as often
        if stopped := stop.wanted():
            break
        batch = next(batches, None)
        x = batch[0] if batch else torch.zeros(1, *data.shape, device=accelerator.device)
        with accelerator.autocast():
            logits = model(
                x
            ).float()  # without a batch too: the ranks gather sharded weights together
        if batch:
            y = batch[1]
            loss = nn.functional.cross_entropy(logits, y, reduction="sum")
            sums += torch.stack(
                [loss, (logits.argmax(1) == y).sum(), torch.tensor(len(y), device=y.device)]
            )
    model.train(training)
    if stopped:
        return None
    loss_sum, correct, images = accelerator.reduce(sums).tolist()
    return {f"{split}_loss": loss_sum / images, f"{split}_top1": 100.0 * correct / images}


def load_weights(recipe: Recipe, model: nn.Module, path: Path) -> None:
    """Put saved weights into the model of a recipe, and masks where it has them.

    Args:
        recipe: What the model was built by.
        model: Dense; changed in place.
        path: A file, a checkpoint, or the folder of a run.

    Raises:
        RunError: They are missing, damaged, or of another model.
    """
    if recipe.ema and (path / "ema.safetensors").exists():
        path = path / "ema.safetensors"  # of a checkpoint's two models the one that a run tests
    try:
        if recipe.masks:
            itop_prune.load(model, path)
        else:
            model.load_state_dict(read_state(path))
    except (OSError, ValueError, RuntimeError) as error:
        raise RunError(f"{path} can't be read: {error}") from None


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
