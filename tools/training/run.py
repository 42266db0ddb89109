"""A run: the objects that train together, and where they stand."""

from dataclasses import dataclass, field
from typing import Any

import timm.data
import timm.utils
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

import itop_prune

from .cost import Cost


@dataclass
class Progress:
    """Where a run stands; a checkpoint holds it beside weights, optimizer and masks."""

    epoch: int = 0
    """Finished epochs."""
    step: int = 0
    """Finished optimizer steps."""
    loss_sums: list[float] = field(default_factory=list)
    """Sum of the losses of this epoch's images so far, by rank."""
    seconds: float = 0.0
    """Training time of the finished epochs."""
    epoch_seconds: float = 0.0
    """Training time of this epoch so far."""
    best: float = -1.0
    """Highest val_top1 so far."""
    train_flops: float = 0.0
    """FLOPs of all steps so far, in units of a dense step."""


@dataclass
class Run:
    """The objects that train together."""

    model: nn.Module
    """The model as Accelerate prepared it."""
    unwrapped_model: nn.Module
    """The model without wrappers: saved and evaluated."""
    optimizer: AcceleratedOptimizer
    lr_schedule: Any
    """timm's scheduler; None for a constant learning rate."""
    regrow: itop_prune.MaskScheduler | None
    ema: timm.utils.ModelEmaV3 | None
    mixup: timm.data.Mixup | None
    loss: nn.Module
    cost: Cost | None
    """None without data, or if the model refuses a single image."""
    epochs: int
    steps_per_epoch: int
    progress: Progress = field(default_factory=Progress)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.epochs * self.steps_per_epoch

    @property
    def models(self) -> dict[str, nn.Module]:
        """The models that a checkpoint holds, by file name."""
        models = {"model": self.unwrapped_model}
        if self.ema:
            models["ema"] = self.ema.module
        return models

    @property
    def averaged_model(self) -> nn.Module:
        """The model to evaluate: the moving average if the recipe has one."""
        return self.ema.module if self.ema else self.unwrapped_model
