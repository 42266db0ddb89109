"""Build the run of a recipe, in this order: model, masks, average, optimizer, mask scheduler."""

import atexit
import contextlib
import itertools
import sys
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import timm
import timm.data
import timm.loss
import timm.optim
import timm.scheduler
import timm.utils
import torch
from accelerate import Accelerator
from torch import Tensor, nn

import itop_prune
from itop_prune.files.state_dicts import check_archive
from itop_prune.methods import saliency

from ..config.arguments import refusal
from ..config.recipe import Recipe
from ..data.datasets import Data, open_data
from ..data.seeding import seed_everything
from ..models import registration as models  # noqa: F401  (registers the papers' models with timm)
from ..run_folder.folder import RunError, in_a_line
from .checkpoint import check_weights
from .cost import Cost
from .ranks import end_gloo
from .run import Run
from .sharded import check_sharding
from .trackers import tracker_names

SALIENCY_BATCHES = 10
"""Batches for the scores of SNIP and GraSP: 1,000 images at the recipes' batch size of 100.

The authors of GraSP take ten images of each class of CIFAR-100, those of SNIP one batch of 100.
"""


@contextlib.contextmanager
def arguments_of(recipe: Recipe, section: str) -> Iterator[None]:
    """Report whatever timm, torch or Accelerate raises at the arguments of a section.

    Raises:
        RunError: It names the section, and follows from the library's error.
    """
    try:
        yield
    except Exception as error:
        arguments = getattr(recipe, section) or {}
        raise RunError(f"{section}: {refusal(error, arguments)}") from error


def make_accelerator(recipe: Recipe) -> Accelerator:
    """Make the recipe's Accelerator.

    Raises:
        RunError: A setting does not work here.
    """
    tracker_names(recipe)
    # Without `cpu` the ranks on a CPU would each train alone.
    settings = {"cpu": not torch.accelerator.is_available(), **(recipe.accelerator or {})}
    # Trackers need the run folder, which exists only when training begins.
    settings.pop("log_with", None)
    with arguments_of(recipe, "accelerator"):
        accelerator = Accelerator(**settings)

    # Accelerate looks for this package twice a step: spare it the search on the disk.
    if find_spec("lomo_optim") is None:
        sys.modules["lomo_optim"] = None  # type: ignore[assignment]

    atexit.register(end_gloo)
    check_sharding(recipe, accelerator)
    return accelerator


def open_for(recipe: Recipe, accelerator: Accelerator) -> Data:
    """Open the recipe's data; first on one process of each machine, since it may download."""
    with accelerator.local_main_process_first():
        return open_data(
            **recipe.data, device=accelerator.device, seed=recipe.seed, augment=recipe.augment
        )


def steps_per_epoch(data: Data, accelerator: Accelerator) -> int:
    """Count the whole optimizer steps of an epoch.

    Raises:
        RunError: There is none.
    """
    batches = data.batches_per_epoch(accelerator.num_processes)
    steps = batches // accelerator.gradient_accumulation_steps
    if not steps:
        raise RunError(
            f"{len(data.train)} training images do not make one step; lower data.batch_size"
        )
    return steps


def build(recipe: Recipe, accelerator: Accelerator, data: Data | None, steps_per_epoch: int) -> Run:
    """Build everything on the accelerator's device; a dry run may lack the data."""
    model = unwrapped_model = build_model(recipe, data, accelerator.device)
    masks = place_masks(recipe, accelerator, model, data) if recipe.masks else {}
    if data and is_never_dense(recipe):
        check_fit(model, data, accelerator.device)
    cost = count_cost(model, data, accelerator.device)
    with arguments_of(recipe, "ema"):
        ema = timm.utils.ModelEmaV3(model, **recipe.ema) if recipe.ema else None

    with arguments_of(recipe, "optimizer"):
        plain_optimizer = timm.optim.create_optimizer_v2(model, **recipe.optimizer)
    model, optimizer = accelerator.prepare(model, plain_optimizer)

    epochs = recipe.epochs * recipe.multiplier
    total_steps = epochs * steps_per_epoch
    regrow = build_mask_scheduler(recipe, accelerator, masks, optimizer, total_steps)
    mixup = None
    if recipe.mixup:
        mixup = timm.data.Mixup(num_classes=unwrapped_model.num_classes, **recipe.mixup)

    return Run(
        model=cast(nn.Module, torch.compile(model)) if recipe.compile else model,
        unwrapped_model=unwrapped_model,
        optimizer=optimizer,
        lr_schedule=build_lr_schedule(recipe, plain_optimizer, steps_per_epoch),
        regrow=regrow,
        ema=ema,
        mixup=mixup,
        loss=build_loss(recipe),
        cost=cost,
        epochs=epochs,
        steps_per_epoch=steps_per_epoch,
    )


def build_model(recipe: Recipe, data: Data | None, device: torch.device) -> nn.Module:
    """Build the dense model, load the weights of `init`, and check that it takes the data.

    A model that is never to be dense is built on the meta device.

    Raises:
        RunError: The model can't be built, or does not fit the data.
    """
    never_dense = is_never_dense(recipe)
    from_dense = (recipe.init, *map(recipe.model.get, ("pretrained", "checkpoint_path")))
    if never_dense and any(from_dense):
        raise RunError(
            "masks.device makes a model that never was dense, and init, model.pretrained and "
            "model.checkpoint_path read dense weights; leave them out, or masks.device"
        )
    seed_everything(recipe.seed, "weights")
    try:
        for file in filter(None, (recipe.init, recipe.model.get("checkpoint_path"))):
            check_weights(Path(file))
            check_archive(Path(file))
        with torch.device("meta") if never_dense else contextlib.nullcontext():
            model = timm.create_model(**recipe.model)
        if recipe.init:
            timm.models.load_checkpoint(model, recipe.init, weights_only=True)
    except Exception as error:  # from the model, a hub, or a checkpoint of another model
        raise RunError(f"the model can't be built: {in_a_line(error)}") from None

    if never_dense:
        return model
    layout = torch.channels_last if recipe.channels_last else torch.preserve_format
    model.to(device, memory_format=layout)
    if data:
        check_fit(model, data, device)
    return model


def is_never_dense(recipe: Recipe) -> bool:
    """Tell whether the masks are to be placed on the meta device."""
    return (recipe.masks or {}).get("device") is not None


def check_fit(model: nn.Module, data: Data, device: torch.device) -> None:
    """Try one blank image, and leave no trace in the model.

    Raises:
        RunError: The model can't take the images or has another number of classes.
    """
    training = model.training
    try:
        with torch.no_grad():
            outputs = model.eval()(torch.zeros(1, *data.shape, device=device))
    except Exception as error:  # a model may raise anything at a wrong shape
        raise RunError(
            f"the model does not take images of shape {data.shape}: {error}; "
            "look at model.img_size, model.in_chans and data.image_size"
        ) from None
    finally:
        model.train(training)

    if outputs.shape != (1, data.classes):
        raise RunError(
            f"the model gives {outputs.shape[-1]} classes, the data have {data.classes}; "
            "set model.num_classes"
        )


def place_masks(
    recipe: Recipe, accelerator: Accelerator, model: nn.Module, data: Data | None
) -> dict[str, itop_prune.ITOP]:
    """Make the model sparse.

    Scores that look at the loss see the first batches. Without data they are left out.

    Raises:
        RunError: The masks can't be placed as the recipe says.
    """
    settings = {"seed": recipe.seed, **(recipe.masks or {})}
    scored: dict[str, str] = {}
    for key in ("method", "scores"):
        name = settings.get(key)
        if isinstance(name, str) and name in saliency.SALIENCY:
            del settings[key]
            scored[key] = name
    if is_never_dense(recipe):
        seed_everything(recipe.seed, "weights")
        if scored:
            raise RunError(
                f"masks: {', '.join(scored.values())} looks at every weight, and with masks.device "
                "there is no dense weight; leave masks.device out, or draw masks at random"
            )

    try:
        if data is not None and scored:
            # Each once, in one order on all ranks, which exchange gradients.
            density = 1.0 - settings["sparsity"]
            scores = {
                name: score(name, accelerator, model, data, density)
                for name in dict.fromkeys(scored.values())
            }
            settings |= {key: scores[name] for key, name in scored.items()}
        return itop_prune.apply(model, **settings)
    except ValueError as error:
        raise RunError(f"masks: {error}") from None


def score(
    name: str, accelerator: Accelerator, model: nn.Module, data: Data, density: float
) -> dict[str, Tensor]:
    """Compute scores before training, as the papers' authors do."""
    if name == "synflow":
        return saliency.synflow(model, data.shape, density)

    temperature = 200.0 if name == "grasp" else 1.0
    batches = data.epoch(0, rank=accelerator.process_index, ranks=accelerator.num_processes)
    return saliency.SALIENCY[name](
        model,
        itertools.islice(batches, SALIENCY_BATCHES),
        lambda x, y: nn.functional.cross_entropy(x / temperature, y),
    )


def count_cost(model: nn.Module, data: Data | None, device: torch.device) -> Cost | None:
    """Count the FLOPs of the model on an image, or return None if that is not possible."""
    try:
        return Cost(model, data.shape, device) if data else None
    except ValueError:  # the model refuses a single image
        return None


def build_mask_scheduler(
    recipe: Recipe,
    accelerator: Accelerator,
    masks: dict[str, itop_prune.ITOP],
    optimizer: Any,
    total_steps: int,
) -> itop_prune.MaskScheduler | None:
    """Build the mask scheduler, or return None for static masks and dense models.

    Raises:
        RunError: The masks, or the steps of the run, do not take the settings.
    """
    if not recipe.regrow:
        return None

    settings = {
        "seed": recipe.seed,
        "check_ranks": True,
        "one_backward": accelerator.gradient_accumulation_steps == 1,
        **recipe.regrow,
    }
    try:
        with warnings.catch_warnings():
            # `explain_no_update` says it in the words of the recipe.
            warnings.filterwarnings("ignore", message=".*the masks never move")
            return itop_prune.MaskScheduler(masks, optimizer, total_steps=total_steps, **settings)
    except ValueError as error:
        raise RunError(f"regrow: {error}") from None


def build_lr_schedule(
    recipe: Recipe, optimizer: torch.optim.Optimizer, steps_per_epoch: int
) -> Any:
    """Build timm's scheduler for the extended run, or return None for a constant learning rate.

    Milestones and the interval of `step` are stretched by the multiplier, warm-up is not.
    """
    if not recipe.lr_schedule:
        return None

    settings = dict(recipe.lr_schedule)
    if settings.get("sched") == "step" and settings.get("decay_epochs"):
        settings["decay_epochs"] *= recipe.multiplier

    epochs = recipe.epochs * recipe.multiplier
    with arguments_of(recipe, "lr_schedule"):
        # timm applies a milestone of 10 at index 9, counted from 0. Recipes say "after 10 epochs",
        # as papers do, so one epoch is added.
        if settings.get("sched") == "multistep" and "decay_milestones" in settings:
            index = 1.0 if settings.get("step_on_epochs", True) else 1.0 / steps_per_epoch
            settings["decay_milestones"] = [
                milestone * recipe.multiplier + index for milestone in settings["decay_milestones"]
            ]

        schedule, _ = timm.scheduler.create_scheduler_v2(
            optimizer, num_epochs=epochs, updates_per_epoch=steps_per_epoch, **settings
        )
    return schedule


def build_loss(recipe: Recipe) -> nn.Module:
    """Build the training loss: for soft labels with mixup, smoothed with `loss`, else plain."""
    if recipe.mixup:
        return timm.loss.SoftTargetCrossEntropy()
    if recipe.loss:
        return timm.loss.LabelSmoothingCrossEntropy(**recipe.loss)
    return nn.CrossEntropyLoss()
