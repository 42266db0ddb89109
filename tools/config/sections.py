"""What the sections of a recipe are the keyword arguments of, and whether those calls take them.

`section_problems` has them all: for every section the call, and what the runner passes itself,
which no recipe may.
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
from accelerate import Accelerator
from accelerate.utils import PrecisionType

from itop_prune.initial_masks import apply, count_active
from itop_prune.messages import nearest
from itop_prune.methods.saliency import SALIENCY
from itop_prune.patterns import Pattern, parse
from itop_prune.scheduler import MaskScheduler

from .arguments import argument_problems

Section = dict[str, Any]


def section_problems(
    values: Mapping[str, Any],
    data: Callable[..., Any],
    augment: Callable[[Section], Callable[..., Any]],
) -> list[str]:
    """Return what of all sections does not fit: first against the signatures, then by making the calls.

    The model is made on the meta device, where it costs nothing; optimizer and schedules get one
    small layer.
    """
    calls: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
        "model": (timm.create_model, ()),
        "data": (data, ("device", "seed", "augment")),
        "augment": (
            augment(values.get("data") or {}),
            ("input_size", "is_training", "use_prefetcher", "separate"),
        ),
        "optimizer": (timm.optim.create_optimizer_v2, ("model_or_params",)),
        "lr_schedule": (
            timm.scheduler.create_scheduler_v2,
            ("optimizer", "num_epochs", "updates_per_epoch"),
        ),
        "masks": (apply, ("model",)),
        "regrow": (MaskScheduler, ("masks", "optimizer", "total_steps")),
        "loss": (timm.loss.LabelSmoothingCrossEntropy, ()),
        "mixup": (timm.data.Mixup, ("num_classes",)),
        "ema": (timm.utils.ModelEmaV3, ("model",)),
        "accelerator": (Accelerator, ()),
        "checkpoint": (_checkpoint, ()),
    }
    problems: list[str] = []
    sound: dict[str, Section] = {}
    for name, (call, given) in calls.items():
        if isinstance(values.get(name), dict):
            wrong = argument_problems(values[name], call, given)
            problems += [f"{name}.{key}: {problem}" for key, problem in wrong.items()]
            sound[name] = {key: value for key, value in values[name].items() if key not in wrong}
    return problems + _try(sound, calls["augment"][0])


def _checkpoint(every: int = 1, keep: int = 2) -> None:
    """The section `checkpoint`: every so many epochs, keep the last so many."""


def _try(sections: Mapping[str, Section], augment: Callable[..., Any]) -> list[str]:
    problems: list[str] = []

    def attempt(name: str, call: Callable[..., Any], **needed: Any) -> Any:
        """Make a call; if it fails, ask about each argument alone, so that one mistake does not hide another."""
        if name not in sections:
            return None
        try:
            return call(**{**needed, **sections[name]})
        except Exception as error:  # a factory may raise anything at a wrong argument
            found = [str(error)]
            for key, value in sections[name].items() if needed else ():
                try:
                    call(**{**needed, key: value})
                except Exception as alone:
                    found.append(str(alone))
            problems.extend(f"{name}: {problem}" for problem in dict.fromkeys(found))
        return None

    pattern = _pattern_of(sections.get("masks", {}))
    n, m = pattern or (1, 2)
    layer, sparsity = torch.nn.Linear(32 * m, 64), 1.0 - n / m
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    model = attempt("model", _make_model) if "model_name" in sections.get("model", {}) else None
    attempt("optimizer", functools.partial(_make_optimizer, list(layer.parameters())))
    attempt("lr_schedule", functools.partial(_make_schedule, optimizer))
    attempt("augment", augment)
    attempt("accelerator", _check_precision)
    attempt("mixup", timm.data.Mixup)
    attempt("loss", timm.loss.LabelSmoothingCrossEntropy)
    attempt("masks", functools.partial(_try_masks, model, layer.in_features), sparsity=sparsity)
    masks = apply(layer, sparsity, pattern=f"{n}:{m}" if pattern else None)
    attempt(
        "regrow", functools.partial(MaskScheduler, masks, optimizer, total_steps=10**9), every=1
    )
    return problems


def _make_model(model_name: str, **arguments: Any) -> torch.nn.Module:
    if ":" not in model_name and not timm.is_model(model_name):
        raise ValueError(f"timm knows no {model_name!r}{nearest(model_name, timm.list_models())}")
    with torch.device("meta"):
        return timm.create_model(
            model_name, **{**arguments, "pretrained": False, "checkpoint_path": ""}
        )


def _make_optimizer(
    parameters: list[torch.nn.Parameter], opt: str = "sgd", **arguments: Any
) -> None:
    known = timm.optim.list_optimizers()
    if opt.lower() not in known:
        raise ValueError(f"timm knows no opt {opt!r}{nearest(opt.lower(), known)}")
    timm.optim.create_optimizer_v2(parameters, opt, **arguments)


def _make_schedule(optimizer: torch.optim.Optimizer, **arguments: Any) -> None:
    if arguments.get("sched") == "plateau":
        raise ValueError("sched plateau depends on the past and could not be resumed; take another")
    needed = {"multistep": "decay_milestones", "step": "decay_epochs"}.get(
        str(arguments.get("sched"))
    )
    if needed and arguments.get(needed) is None:
        raise ValueError(
            f"sched {arguments['sched']} has no {needed}, and timm's default is of another run, which no multiplier "
            "stretches; say after how many epochs the learning rate falls"
        )
    schedule, _ = timm.scheduler.create_scheduler_v2(optimizer, **arguments, updates_per_epoch=1)
    if schedule is None and arguments.get("sched") != "none":
        raise ValueError(f"timm knows no sched {arguments.get('sched')!r}")


def _check_precision(mixed_precision: object = None, **arguments: Any) -> None:
    """Refuse what no Accelerator takes, without making one: a process has one state for all."""
    known = PrecisionType.list()
    if mixed_precision is not None and mixed_precision not in known:
        advice = (
            '; write "no" in quotes, YAML reads it as false' if mixed_precision is False else ""
        )
        raise ValueError(
            f"unknown mixed_precision {mixed_precision!r}; known are {', '.join(map(repr, known))}"
            f"{advice or nearest(mixed_precision, known)}"
        )


def _pattern_of(masks: Section) -> Pattern | None:
    """Return the pattern that masks shall keep; None where there is none, or one that the call itself refuses."""
    try:
        return parse(masks.get("pattern"))
    except ValueError:
        return None


def _try_masks(model: torch.nn.Module | None, inputs: int, **arguments: Any) -> None:
    """Count as `apply` would; the scores that need data are left to the run, which has them."""
    for key in ("method", "scores"):
        if arguments.get(key) in tuple(SALIENCY):
            del arguments[key]
    if model is None:  # patterns would have nothing to match
        model = torch.nn.Linear(inputs, 64)
        arguments = {
            key: value for key, value in arguments.items() if key not in ("include", "exclude")
        }
    own = {key: arguments.pop(key) for key in ("scores", "seed") if key in arguments}
    apply(torch.nn.Linear(8, 8), 0.5, **own)
    if arguments.get("method") == "magnitude":
        arguments["method"] = "uniform"  # a model on the meta device has no values
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run itself says what a pattern leaves out
        count_active(model, **arguments)
