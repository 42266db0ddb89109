"""Presets: the methods that move masks by name, as arguments of `apply` and `MaskScheduler`."""

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from itop_prune.messages import nearest
from itop_prune.methods.validation import is_count, is_number


class Preset(NamedTuple):
    """A method that moves masks."""

    updates: int
    """How many updates its recipe makes."""
    arguments: Mapping[str, Any]
    """Of MaskScheduler, beside `every` and `final_sparsity`."""
    start: Callable[[float], float] | None = None
    """Final density -> density at the beginning. None: the density stays."""


PRESETS: dict[str, Preset] = {
    "SET-ITOP": Preset(60, {}),
    "RigL-ITOP": Preset(24, {"grow": "gradient"}),
    "SET": Preset(20, {"prune": "set", "rate": 0.3, "schedule": "constant"}),
    "RigL": Preset(90, {"grow": "gradient", "rate": 0.3, "min_rate": 0, "stop": 0.75}),
    "SNFS": Preset(20, {"grow": "momentum", "redistribute": "momentum"}),
    "MEST": Preset(20, {"prune": "mest", "rate": 0.3, "min_rate": 0, "schedule": "linear"}),
    "GMP": Preset(
        90,
        {"rate": 0, "min_rate": 0, "density": "cubic", "stop": 0.75},
        start=lambda density: 1.0,
    ),
    "GraNet": Preset(
        18,
        {"grow": "gradient", "scope": "global", "density": "cubic", "stop": 0.75},
        start=lambda density: max(density, 0.5),
    ),
    "AC/DC": Preset(
        8,
        {"rate": 0, "min_rate": 0, "scope": "global", "density": "alternating", "stop": 0.8},
        start=lambda density: 1.0,
    ),
    "Sparse-to-sparser": Preset(
        45,
        {
            "grow": "sampled_gradient",
            "gradient_steps": 5,
            "scope": "global",
            "rate": 0.3,
            "density": {"power": 1.5},
            "stop": 0.75,
        },
        start=lambda density: min(1.0, 5 * density),
    ),
}


def preset(
    name: str, sparsity: float, total_steps: int, updates: int | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Look up a method: its arguments for `apply`, and those for `MaskScheduler`.

    They are those of the method's recipe. `every` follows from the length of the training.

    Args:
        name: A key of `PRESETS`, such as "SET-ITOP", "RigL-ITOP" or "GraNet".
        sparsity: Share of zeros at the end, in (0, 1).
        total_steps: Optimizer steps of the whole training, at least 1.
        updates: How many updates to make, or a few more; at least 1. None: as many as the recipe
            makes in 12,000 steps.

    Returns:
        Two dicts, which you may change: `masks = apply(model, **first)`, then
        `MaskScheduler(masks, optimizer, total_steps=total_steps, **second)`. The callbacks of
        `itop_prune.integrations` take both: `SparseTrainingCallback(**first, **second)`.

    Raises:
        ValueError: The name is unknown, a number is out of range, or there are too few steps for
            the updates.

    >>> preset("RigL-ITOP", sparsity=0.98, total_steps=12_000)
    ({'sparsity': 0.98}, {'every': 500, 'grow': 'gradient'})
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(
            f"unknown preset {name!r}; known are {', '.join(PRESETS)}{nearest(name, PRESETS)}"
        )
    if not is_number(sparsity) or not 0.0 < sparsity < 1.0:
        raise ValueError(
            f"sparsity is {sparsity!r}; allowed is a number in (0, 1), the final share of zeros"
        )
    found = PRESETS[name]
    wanted = found.updates if updates is None else updates
    for argument, number in {"total_steps": total_steps, "updates": wanted}.items():
        if not is_count(number):
            raise ValueError(f"{argument} is {number!r}; allowed are whole numbers from 1")

    arguments = copy.deepcopy(dict(found.arguments))
    stop = arguments.get("stop", 1.0)
    every = math.floor(stop * total_steps / wanted + 1e-9)
    if every < 1:
        raise ValueError(
            f"total_steps is {total_steps}, and {name} makes {wanted} updates in the first "
            f"{stop:.0%} of them: train for {math.ceil(wanted / stop)} steps or more, or give "
            "fewer updates"
        )
    if "gradient_steps" in arguments:
        arguments["gradient_steps"] = min(arguments["gradient_steps"], every)

    for_scheduler = {"every": every, **arguments}
    if found.start is None:
        return {"sparsity": sparsity}, for_scheduler
    first = 1.0 - found.start(1.0 - sparsity)
    return {"sparsity": round(first, 9)}, {**for_scheduler, "final_sparsity": sparsity}


def pointer(method: object) -> str:
    """Point to `preset` behind an error, if a name is that of a preset; else return "".

    >>> pointer("rigl")
    "; 'RigL' moves masks: itop_prune.preset('RigL', ...) gives its arguments"
    """
    by_lower_case = {name.lower(): name for name in PRESETS}
    name = by_lower_case.get(str(method).lower())
    if name is None:
        return ""
    return f"; {name!r} moves masks: itop_prune.preset({name!r}, ...) gives its arguments"
