"""Make the calls of a recipe's sections on something small, and collect what they refuse.

The model is made on the meta device, where it costs nothing, the rest for one small layer.
"""

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import timm
import timm.data
import timm.loss
import timm.optim
import timm.scheduler
import timm.utils
import torch
from accelerate.utils import PrecisionType
from PIL import Image

from itop_prune.initial_masks import apply, count_active
from itop_prune.layers.handle import ITOP
from itop_prune.messages import nearest
from itop_prune.methods.saliency import SALIENCY
from itop_prune.patterns import Pattern, parse
from itop_prune.scheduler import MaskScheduler

from .arguments import Call, Section, refusal, refused_argument

SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant", "none")
"""The learning rate schedules of timm that can be resumed; it keeps no list of them itself."""


def trial_problems(sections: Mapping[str, Section], augment: Call) -> list[str]:
    """Make the calls with arguments that fit their signatures, and collect their errors.

    Args:
        sections: The sections to try, by name.
        augment: The call of the section `augment`.
    """
    problems: list[str] = []

    def attempt(
        name: str,
        call: Call,
        needed: Section | None = None,
        reached: Callable[[], list[Call]] = list,
    ) -> Any:
        """Make one call; if it fails, find the arguments that it refuses."""
        if name not in sections:
            return None
        try:
            return call(**{**(needed or {}), **sections[name]})
        except Exception as error:  # a factory may raise anything at a wrong argument
            found = _refused(name, sections[name], call, needed, reached) if needed else []
            # Together they may be wrong in another way; only a ValueError says in which.
            if not found or isinstance(error, ValueError):
                found.insert(0, f"{name}: {refusal(error, sections[name])}")
            problems.extend(dict.fromkeys(found))
            return None

    model = None
    model_name = sections.get("model", {}).get("model_name")
    if model_name is not None:
        reached = functools.partial(_calls_of_model, model_name)
        model = attempt("model", _make_model, {"model_name": model_name}, reached)

    layer = torch.nn.Linear(64, 64)
    opt = sections.get("optimizer", {}).get("opt", "sgd")
    make_optimizer = functools.partial(_make_optimizer, list(layer.parameters()))
    attempt("optimizer", make_optimizer, {"opt": opt}, functools.partial(_calls_of_optimizer, opt))
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
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
    needed = None if reads_zeros(sections.get("masks", {})) else {"sparsity": 1.0 - n / m}
    counts = attempt("masks", try_masks, needed)

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
        attempt("regrow", scheduler, {"every": 1})
    return problems


def _refused(
    name: str,
    section: Section,
    call: Call,
    needed: Section,
    reached: Callable[[], list[Call]],
) -> list[str]:
    """Describe each argument that a call refuses, so that one mistake does not hide another.

    Args:
        name: Of the section.
        section: Its arguments, which the call refused together.
        call: Their call.
        needed: Arguments without which no call succeeds.
        reached: Lists the calls that the call's open keywords are passed on to.

    Returns:
        Nothing if only some of them together are refused, or if the name of the model or the
        optimizer already is.
    """
    is_named = all(section.get(key) == value for key, value in needed.items())
    if is_named and _error_of(call, needed) is not None:
        return []

    errors = {key: _error_of(call, {**needed, key: value}) for key, value in section.items()}
    sound = {key: section[key] for key, error in errors.items() if error is None}

    problems: list[str] = []
    for key, error in errors.items():
        if error is None:
            continue

        # Some arguments need others: timm's out_indices needs features_only, density and
        # final_sparsity need each other.
        arguments = {key: section[key]}
        partners = [{other: section[other]} for other in errors if other not in {key, *sound}]
        beside = [{**needed, **sound, **partner, **arguments} for partner in ({}, *partners)]
        if any(_error_of(call, given) is None for given in beside):
            continue

        problem = ""
        if not isinstance(error, ValueError):
            problem = refused_argument(key, section[key], error, reached())
        described = f".{key}: {problem}" if problem else f": {refusal(error, arguments)}"
        problems.append(f"{name}{described}")
    return problems


def _error_of(call: Call, arguments: Section) -> Exception | None:
    """Make a call and return what it raises."""
    try:
        call(**arguments)
    except Exception as error:
        return error
    return None


def _make_model(model_name: str, **arguments: Any) -> torch.nn.Module:
    if ":" not in model_name and not timm.is_model(model_name):
        raise ValueError(f"timm knows no {model_name!r}{nearest(model_name, timm.list_models())}")
    arguments |= {"pretrained": False, "checkpoint_path": ""}
    with torch.device("meta"):
        return timm.create_model(model_name, **arguments)


def _calls_of_model(model_name: str) -> list[Call]:
    """List the calls that take the arguments of a model."""
    model = _make_model(model_name)
    calls: list[Call] = [timm.create_model, type(model)]
    return [*calls, timm.model_entrypoint(model_name)] if timm.is_model(model_name) else calls


def _make_optimizer(
    parameters: list[torch.nn.Parameter], opt: str = "sgd", **arguments: Any
) -> None:
    known = timm.optim.list_optimizers()
    if opt.lower() not in known:
        raise ValueError(f"timm knows no opt {opt!r}{nearest(opt.lower(), known)}")
    timm.optim.create_optimizer_v2(parameters, opt, **arguments)


def _calls_of_optimizer(opt: str) -> list[Call]:
    """List the calls that take the arguments of an optimizer."""
    cls = timm.optim.get_optimizer_class(opt, bind_defaults=False)
    return [timm.optim.create_optimizer_v2, cls]


def _try_schedule(optimizer: torch.optim.Optimizer, **arguments: Any) -> None:
    """Make the schedule and use it, since timm reads some arguments only then."""
    sched = arguments.get("sched")
    if sched == "plateau":
        raise ValueError("sched plateau depends on the past and could not be resumed; take another")

    try:
        schedule, _ = timm.scheduler.create_scheduler_v2(
            optimizer, **arguments, updates_per_epoch=1
        )
    except ValueError as error:
        if "Unknown scheduler" not in str(error):
            raise
        known = f"known are {', '.join(SCHEDULES)}{nearest(sched, SCHEDULES)}"
        raise ValueError(f"timm knows no sched {sched!r}; {known}") from None
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
    own = ("scores", "init", "seed", "storage", "device")
    drawing = {key: arguments.pop(key) for key in own if key in arguments}
    if reads_zeros(drawing):
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
        meta = drawing.get("device") is not None
        if meta:  # arguments are also tried alone
            drawing.setdefault("storage", "sparse")
        apply(torch.nn.Linear(8, 8, device="meta" if meta else None), 0.5, **drawing)

    if not by_name:
        arguments.pop("include", None)
        arguments.pop("exclude", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run itself warns of left-out layers
        return count_active(model, **arguments)


def reads_zeros(masks: Section) -> bool:
    """Tell whether the masks are the zeros of the weights, and so need no sparsity."""
    return masks.get("scores") == "nonzero"
