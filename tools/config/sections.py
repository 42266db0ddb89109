"""Check the sections of a recipe against the calls whose keyword arguments they are.

`section_calls` lists the call of every section, and the arguments that the runner passes itself.
"""

import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import timm
import timm.data
import timm.loss
import timm.optim
import timm.scheduler
import timm.utils
import torch
from accelerate import Accelerator
from accelerate.utils import PrecisionType
from PIL import Image

from itop_prune.initial_masks import apply, count_active
from itop_prune.layers.handle import ITOP
from itop_prune.messages import nearest
from itop_prune.methods.saliency import SALIENCY
from itop_prune.patterns import Pattern, parse
from itop_prune.scheduler import MaskScheduler

from ..data.datasets import augmentation_of, open_data
from .arguments import argument_problems, refusal

Section = dict[str, Any]
Call = Callable[..., Any]


@dataclass(frozen=True)
class CheckpointSettings:
    """The section `checkpoint`."""

    every: int = 1
    """Epochs between two checkpoints."""
    keep: int = 2
    """Checkpoints to keep, the best one not counted."""


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
        "regrow": (MaskScheduler, ("masks", "optimizer", "total_steps", "scaler")),
        "loss": (timm.loss.LabelSmoothingCrossEntropy, ()),
        "mixup": (timm.data.Mixup, ("num_classes",)),
        "ema": (timm.utils.ModelEmaV3, ("model",)),
        "accelerator": (Accelerator, ()),
        "checkpoint": (CheckpointSettings, ()),
    }


def section_problems(values: Mapping[str, Any]) -> list[str]:
    """Find everything in the sections that does not fit.

    Signatures come first. Then small calls are made with the arguments that passed. The model is
    made on the meta device, where it costs nothing, the rest for one small layer.
    """
    calls = section_calls(values.get("data") or {})
    problems: list[str] = []
    sound: dict[str, Section] = {}
    for name, (call, given) in calls.items():
        section = values.get(name)
        if isinstance(section, dict):
            wrong = argument_problems(section, call, given)
            if name == "masks" and "sparsity" not in section and not _reads_zeros(section):
                wrong["sparsity"] = "missing; it is needed"
            problems += [f"{name}.{key}: {problem}" for key, problem in wrong.items()]
            sound[name] = {key: value for key, value in section.items() if key not in wrong}
    return problems + _trial_problems(sound, calls["augment"][0])


def _trial_problems(sections: Mapping[str, Section], augment: Call) -> list[str]:
    """Make the calls, and collect their errors."""
    problems: list[str] = []

    def attempt(name: str, call: Call, **needed: Any) -> Any:
        """Make one call.

        If it fails, try each argument alone too, so that one mistake does not hide another.
        """
        if name not in sections:
            return None
        try:
            return call(**{**needed, **sections[name]})
        except Exception as error:  # a factory may raise anything at a wrong argument
            found = [refusal(error, sections[name])]

        for key, value in sections[name].items() if needed else ():
            try:
                call(**{**needed, key: value})
            except Exception as error:
                found.append(refusal(error, {key: value}))
        problems.extend(f"{name}: {problem}" for problem in dict.fromkeys(found))
        return None

    model = attempt("model", _make_model) if "model_name" in sections.get("model", {}) else None

    layer = torch.nn.Linear(64, 64)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    attempt("optimizer", functools.partial(_make_optimizer, list(layer.parameters())))
    attempt("lr_schedule", functools.partial(_try_schedule, optimizer))
    attempt("augment", _try_transforms if augment is timm.data.create_transform else augment)
    attempt("accelerator", _check_precision)
    attempt("mixup", timm.data.Mixup)
    attempt("loss", timm.loss.LabelSmoothingCrossEntropy)
    attempt("ema", functools.partial(_make_average, layer))

    # Without the model, name patterns have nothing to match.
    pattern = _pattern_of(sections.get("masks", {}))
    n, m = pattern or (32, 64)
    any_layer = torch.nn.Linear(m, 64, device="meta")
    try_masks = functools.partial(_try_masks, model or any_layer, model is not None)
    needed = {} if _reads_zeros(sections.get("masks", {})) else {"sparsity": 1.0 - n / m}
    counts = attempt("masks", try_masks, **needed)

    # A pattern that divides no layer of the model may be too long for a layer with values.
    if model is None or counts is None:
        pattern, n, m = None, 32, 64
    sparse = torch.nn.Linear(m, 64)
    mask = (torch.arange(m) < n).expand(64, m)
    masks = {"weight": ITOP.apply(sparse, "weight", mask, pattern)}
    optimizer = torch.optim.SGD(sparse.parameters(), lr=1.0)
    scheduler = functools.partial(MaskScheduler, masks, optimizer, total_steps=10**9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run itself warns of layers that would starve
        attempt("regrow", scheduler, every=1)
    return problems


def _make_model(model_name: str, **arguments: Any) -> torch.nn.Module:
    if ":" not in model_name and not timm.is_model(model_name):
        raise ValueError(f"timm knows no {model_name!r}{nearest(model_name, timm.list_models())}")
    arguments |= {"pretrained": False, "checkpoint_path": ""}
    with torch.device("meta"):
        return timm.create_model(model_name, **arguments)


def _make_optimizer(
    parameters: list[torch.nn.Parameter], opt: str = "sgd", **arguments: Any
) -> None:
    known = timm.optim.list_optimizers()
    if opt.lower() not in known:
        raise ValueError(f"timm knows no opt {opt!r}{nearest(opt.lower(), known)}")
    timm.optim.create_optimizer_v2(parameters, opt, **arguments)


def _try_schedule(optimizer: torch.optim.Optimizer, **arguments: Any) -> None:
    """Make the schedule and use it, since timm reads some arguments only then."""
    sched = arguments.get("sched")
    if sched == "plateau":
        raise ValueError("sched plateau depends on the past and could not be resumed; take another")

    schedule, _ = timm.scheduler.create_scheduler_v2(optimizer, **arguments, updates_per_epoch=1)
    if schedule is None and sched != "none":
        raise ValueError(f"timm knows no sched {sched!r}")
    if schedule is not None:
        schedule.step(1)
        schedule.step_update(1)


def _try_transforms(**arguments: Any) -> None:
    """Transform a blank image, for training and for evaluation."""
    for training in (True, False):
        transform = timm.data.create_transform(224, is_training=training, **arguments)
        image = transform(Image.new("RGB", (32, 32)))
        if not isinstance(image, torch.Tensor) or image.shape != (3, 224, 224):
            raise ValueError(
                "these options give no images of the height and width data.image_size; leave out "
                "naflex and patchify"
            )
        if not image.is_floating_point():
            raise ValueError("normalize is False, and the model takes fractions; leave it out")


def _make_average(model: torch.nn.Module, device: str | None = None, **arguments: Any) -> None:
    """Make an average; the name of its device is checked, but it may be on another machine."""
    if device is not None:
        torch.device(device)
    timm.utils.ModelEmaV3(model, **arguments)


def _check_precision(mixed_precision: object = None, **arguments: Any) -> None:
    """Refuse an unknown precision without making an Accelerator, whose state is global."""
    known = PrecisionType.list()
    if mixed_precision is None or mixed_precision in known:
        return
    advice = nearest(mixed_precision, known)
    if mixed_precision is False:
        advice = '; write "no" in quotes, YAML reads it as false'
    raise ValueError(
        f"unknown mixed_precision {mixed_precision!r}; known are {', '.join(map(repr, known))}"
        f"{advice}"
    )


def _pattern_of(masks: Section) -> Pattern | None:
    """Read N and M of the masks' pattern; None also if `apply` itself refuses it."""
    try:
        return parse(masks.get("pattern"))
    except ValueError:
        return None


def _reads_zeros(masks: Section) -> bool:
    """Tell whether the masks are the zeros of the weights, and so need no sparsity."""
    return masks.get("scores") == "nonzero"


def _try_masks(model: torch.nn.Module, by_name: bool, **arguments: Any) -> dict[str, int]:
    """Count active weights as `apply` would, on a model that may have no values."""
    method, pattern = arguments.get("method"), arguments.get("pattern")
    if method in tuple(SALIENCY) and pattern is not None:
        raise ValueError(
            f"method is {method!r}, and the pattern {pattern} gives every layer the same density; "
            "leave method out"
        )

    # Scores are left to the run, which has the data and the values of the weights.
    if arguments.get("scores") in tuple(SALIENCY):
        del arguments["scores"]
    if method in tuple(SALIENCY) or (method == "magnitude" and pattern is None):
        arguments["method"] = "uniform"

    # `count_active` does not know these, and any layer will do for them.
    own = ("scores", "init", "seed", "storage")
    drawing = {key: arguments.pop(key) for key in own if key in arguments}
    if _reads_zeros(drawing):
        budget = ("sparsity", "method", "densities")
        given = {key: arguments.pop(key) for key in budget if key in arguments}
        layer = torch.nn.Linear(8, 8)
        torch.nn.init.eye_(layer.weight)
        apply(layer, **drawing, **given)
        n, m = parse(pattern) or (1, 2)
        arguments["sparsity"] = 1.0 - n / m  # any will do for the names
    else:
        if method == "magnitude":
            drawing["method"] = method
        apply(torch.nn.Linear(8, 8), 0.5, **drawing)

    if not by_name:
        arguments.pop("include", None)
        arguments.pop("exclude", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run itself warns of left-out layers
        return count_active(model, **arguments)
