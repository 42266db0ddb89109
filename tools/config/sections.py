"""Check the sections of a recipe against the calls whose keyword arguments they are.

`section_calls` lists the call of every section, and the arguments that the runner passes itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import timm
import timm.data
import timm.loss
import timm.optim
import timm.scheduler
import timm.utils
from accelerate import Accelerator

from itop_prune.initial_masks import apply
from itop_prune.scheduler import MaskScheduler

from ..data.datasets import augmentation_of, open_data
from .arguments import Call, Section, argument_problems, type_problem
from .trials import reads_zeros, trial_problems


@dataclass(frozen=True)
class CheckpointSettings:
    """The section `checkpoint`."""

    every: int = 1
    """Epochs between two checkpoints."""
    keep: int = 2
    """Checkpoints to keep, the best one not counted."""


MODEL_TYPES = {"num_classes": int, "in_chans": int, "drop_rate": float, "drop_path_rate": float}
"""Types of what all of timm's models call alike and no signature tells; null is their default."""


def section_calls(data: Section) -> dict[str, tuple[Call, tuple[str, ...]]]:
    """List the call of every section, with the arguments that the runner passes itself.

    Args:
        data: The section `data`, on which the call of `augment` depends.
    """
    return {
        "model": (timm.create_model, ()),
        "data": (open_data, ("device", "seed", "augment")),
        "augment": (
            augmentation_of(data),
            ("input_size", "is_training", "use_prefetcher", "separate"),
        ),
        "optimizer": (timm.optim.create_optimizer_v2, ("model_or_params",)),
        "lr_schedule": (
            timm.scheduler.create_scheduler_v2,
            ("optimizer", "num_epochs", "updates_per_epoch"),
        ),
        "masks": (apply, ("model",)),
        "regrow": (
            MaskScheduler,
            ("masks", "optimizer", "total_steps", "scaler", "one_backward"),
        ),
        "loss": (timm.loss.LabelSmoothingCrossEntropy, ()),
        "mixup": (timm.data.Mixup, ("num_classes",)),
        "ema": (timm.utils.ModelEmaV3, ("model",)),
        "accelerator": (Accelerator, ()),
        "checkpoint": (CheckpointSettings, ()),
    }


def section_problems(values: Mapping[str, Any]) -> list[str]:
    """Find everything in the sections that does not fit.

    Signatures come first. Then small calls are made with the arguments that passed.
    """
    calls = section_calls(values.get("data") or {})
    problems: list[str] = []
    sound: dict[str, Section] = {}
    for name, (call, given) in calls.items():
        section = values.get(name)
        if isinstance(section, dict):
            wrong = argument_problems(section, call, given)
            if name == "model":
                wrong |= _wrong_types(section)
            if name == "masks" and "sparsity" not in section and not reads_zeros(section):
                wrong["sparsity"] = "missing; it is needed"
            problems += [f"{name}.{key}: {problem}" for key, problem in wrong.items()]
            sound[name] = {key: value for key, value in section.items() if key not in wrong}
    return problems + trial_problems(sound, calls["augment"][0])


def _wrong_types(model: Section) -> dict[str, str]:
    given = {key: model[key] for key in MODEL_TYPES if model.get(key) is not None}
    problems = {key: type_problem(value, MODEL_TYPES[key]) for key, value in given.items()}
    return {key: problem for key, problem in problems.items() if problem}
