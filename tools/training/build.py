"""From a recipe to what trains, in the one right order: model, masks, average, optimizer, ranks, mask scheduler."""

import atexit
import itertools
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, cast

import timm
import timm.data
import timm.loss
import timm.optim
import timm.scheduler
import timm.utils
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

import itop_prune
from itop_prune.methods import saliency

from ..config.recipe import Recipe
from ..data.datasets import Data, open_data
from ..data.source import seed_everything
from ..models import registration as models  # noqa: F401  (registers the papers' models with timm)
from ..run_folder.folder import RunError, end_gloo
from .cost import Cost
from .sharded import check
from .trackers import asked_for

SALIENCY_BATCHES = 10
"""That SNIP and GraSP look at: with the recipes' batches of 100 that are 1,000 images, as many as the authors' ten of
each class for CIFAR-100 (GraSP) and more than their one batch of 100 (SNIP)."""


@dataclass
class Progress:
    """Where a run stands; with weights, optimizer and masks it makes a checkpoint."""

    epoch: int = 0
    """Epochs finished."""
    step: int = 0
    """Optimizer steps done."""
    loss_sums: list[float] = field(default_factory=list)
    """Of the images of this epoch so far, by rank."""
    seconds: float = 0.0
    """Of training, in the epochs finished."""
    epoch_seconds: float = 0.0
    """The same of this epoch so far."""
    best: float = -1.0
    """Highest val_top1 so far."""
    train_flops: float = 0.0
    """Of all steps so far, in those of a dense one."""


@dataclass
class Run:
    """All that trains together."""

    model: nn.Module
    """As Accelerate prepared it."""
    bare: nn.Module
    """The model within: what is saved and evaluated."""
    optimizer: AcceleratedOptimizer
    lr_schedule: Any
    """timm's, or None."""
    regrow: itop_prune.MaskScheduler | None
    ema: timm.utils.ModelEmaV3 | None
    mixup: timm.data.Mixup | None
    loss: nn.Module
    cost: Cost | None
    """None where the model can't be run on one image, or there are no data."""
    epochs: int
    steps_per_epoch: int
    progress: Progress = field(default_factory=Progress)

    @property
    def models(self) -> dict[str, nn.Module]:
        """What a checkpoint holds as safetensors."""
        return {"model": self.bare, "ema": self.ema.module} if self.ema else {"model": self.bare}

    @property
    def averaged(self) -> nn.Module:
        """What is evaluated: the average if there is one."""
        return self.ema.module if self.ema else self.bare


def make_accelerator(recipe: Recipe) -> Accelerator:
    """Make the recipe's Accelerator; without `cpu` it would leave ranks on a CPU to train each by itself."""
    asked_for(recipe)
    settings = {"cpu": not torch.accelerator.is_available(), **(recipe.accelerator or {})}
    settings.pop(
        "log_with", None
    )  # trackers want the run folder, which is there when training begins
    try:
        accelerator = Accelerator(**settings)
    except ValueError as error:
        raise RunError(f"accelerator: {error}") from None
    if (
        find_spec("lomo_optim") is None
    ):  # Accelerate asks for it twice a step: where it isn't, answer without the disk
        sys.modules["lomo_optim"] = None  # type: ignore[assignment]
    atexit.register(end_gloo)
    check(recipe, accelerator)
    return accelerator


def open_for(recipe: Recipe, accelerator: Accelerator) -> Data:
    """Open the recipe's data; one process of a machine first, since it may download."""
    with accelerator.local_main_process_first():
        return open_data(
            **recipe.data, device=accelerator.device, seed=recipe.seed, augment=recipe.augment
        )


def steps_per_epoch(data: Data, accelerator: Accelerator) -> int:
    """Return how many whole optimizer steps an epoch has."""
    steps = (
        data.batches_per_epoch(accelerator.num_processes) // accelerator.gradient_accumulation_steps
    )
    if not steps:
        raise RunError(
            f"{len(data.train)} training images do not make one step; lower data.batch_size"
        )
    return steps


def build_model(recipe: Recipe, data: Data | None, device: torch.device) -> nn.Module:
    """Build the dense model, with the weights of `init` if any, and check that it takes the data."""
    seed_everything(recipe.seed, "weights")
    try:
        model = timm.create_model(**recipe.model)
        if recipe.init:
            timm.models.load_checkpoint(model, recipe.init, weights_only=True)
    except Exception as error:  # a model's own, or a hub's, or a checkpoint's of another model
        raise RunError(f"the model can't be built: {error}") from None
    model.to(
        device, memory_format=torch.channels_last if recipe.channels_last else torch.preserve_format
    )
    if data:
        check_fit(model, data, device)
    return model


def build(recipe: Recipe, accelerator: Accelerator, data: Data | None, steps_per_epoch: int) -> Run:
    """Build everything, on the accelerator's device; a dry run may do without the data."""
    model = bare = build_model(recipe, data, accelerator.device)
    masks = place_masks(recipe, accelerator, model, data) if recipe.masks else {}
    cost = count_cost(model, data, accelerator.device)
    ema = timm.utils.ModelEmaV3(model, **recipe.ema) if recipe.ema else None
    plain_optimizer = timm.optim.create_optimizer_v2(model, **recipe.optimizer)
    model, optimizer = accelerator.prepare(model, plain_optimizer)
    epochs = recipe.epochs * recipe.multiplier
    regrow = None
    if recipe.regrow:
        settings = {"seed": recipe.seed, "check_ranks": True, **recipe.regrow}
        try:
            regrow = itop_prune.MaskScheduler(
                masks, optimizer, total_steps=epochs * steps_per_epoch, **settings
            )
        except ValueError as error:
            raise RunError(f"regrow: {error}") from None
    return Run(
        model=cast(nn.Module, torch.compile(model)) if recipe.compile else model,
        bare=bare,
        optimizer=optimizer,
        lr_schedule=build_lr_schedule(recipe, plain_optimizer, steps_per_epoch),
        regrow=regrow,
        ema=ema,
        mixup=timm.data.Mixup(num_classes=bare.num_classes, **recipe.mixup)
        if recipe.mixup
        else None,
        loss=build_loss(recipe),
        cost=cost,
        epochs=epochs,
        steps_per_epoch=steps_per_epoch,
    )


def place_masks(
    recipe: Recipe, accelerator: Accelerator, model: nn.Module, data: Data | None
) -> dict[str, itop_prune.ITOP]:
    """Make the model sparse; scores that look at the loss see the first batches, and are left out without data."""
    settings = {"seed": recipe.seed, **(recipe.masks or {})}
    wanted: dict[str, str] = {}
    for key in ("method", "scores"):
        name = settings.get(key)
        if isinstance(name, str) and name in saliency.SALIENCY:
            del settings[key]
            wanted[key] = name
    try:
        found = {
            name: score(name, accelerator, model, data, 1.0 - settings["sparsity"])
            for name in dict.fromkeys(
                wanted.values()
            )  # in one order on all ranks, which exchange gradients
            if data is not None
        }
        return itop_prune.apply(
            model, **settings | {key: found[name] for key, name in wanted.items() if found}
        )
    except ValueError as error:
        raise RunError(f"masks: {error}") from None


def count_cost(model: nn.Module, data: Data | None, device: torch.device) -> Cost | None:
    """Return what the model costs on an image, or None where that can't be had."""
    try:
        return Cost(model, data.shape, device) if data else None
    except ValueError:  # it wants a larger batch than one
        return None


def score(
    name: str, accelerator: Accelerator, model: nn.Module, data: Data, density: float
) -> dict[str, Tensor]:
    """Return scores before training, as the papers' authors take them."""
    if name == "synflow":
        return saliency.synflow(model, data.shape, density)
    ranks = {"rank": accelerator.process_index, "ranks": accelerator.num_processes}
    batches = itertools.islice(data.epoch(0, **ranks), SALIENCY_BATCHES)
    heat = 200.0 if name == "grasp" else 1.0
    return saliency.SALIENCY[name](
        model, batches, lambda x, y: nn.functional.cross_entropy(x / heat, y)
    )


def build_lr_schedule(
    recipe: Recipe, optimizer: torch.optim.Optimizer, steps_per_epoch: int
) -> Any:
    """Build timm's scheduler for the extended run, or return None for a constant learning rate.

    Milestones (and the interval of `step`) are stretched by the multiplier, warm-up is not. timm
    applies a milestone one index early (10 is index 9, counted from 0); recipes state the paper's,
    "after 10 epochs", so one is added.
    """
    if not recipe.lr_schedule:
        return None
    settings = dict(recipe.lr_schedule)
    if settings.get("sched") == "step" and settings.get("decay_epochs"):
        settings["decay_epochs"] *= recipe.multiplier
    if settings.get("sched") == "multistep" and "decay_milestones" in settings:
        index = 1.0 if settings.get("step_on_epochs", True) else 1.0 / steps_per_epoch
        settings["decay_milestones"] = [
            m * recipe.multiplier + index for m in settings["decay_milestones"]
        ]
    epochs = recipe.epochs * recipe.multiplier
    schedule, _ = timm.scheduler.create_scheduler_v2(
        optimizer, num_epochs=epochs, updates_per_epoch=steps_per_epoch, **settings
    )
    return schedule


def build_loss(recipe: Recipe) -> nn.Module:
    """Build the training loss: of soft labels with mixup, smoothed with `loss`, plain otherwise."""
    if recipe.mixup:
        return timm.loss.SoftTargetCrossEntropy()
    return (
        timm.loss.LabelSmoothingCrossEntropy(**recipe.loss)
        if recipe.loss
        else nn.CrossEntropyLoss()
    )


def check_fit(model: nn.Module, data: Data, device: torch.device) -> None:
    """Try one blank image, without a trace in the model.

    Raises:
        RunError: The model can't take the images or has another number of classes.
    """
    training = model.training
    try:
        with torch.no_grad():
            outputs = model.eval()(torch.zeros(1, *data.shape, device=device))
    except Exception as error:  # whatever a model raises at a wrong shape
        hint = "look at model.img_size, model.in_chans and data.image_size"
        raise RunError(
            f"the model does not take images of shape {data.shape}: {error}; {hint}"
        ) from None
    finally:
        model.train(training)
    if outputs.shape != (1, data.classes):
        raise RunError(
            f"the model gives {outputs.shape[-1]} classes, the data have {data.classes}; set model.num_classes"
        )
