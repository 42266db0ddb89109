"""What a recipe would do: its layers and its plan, without training."""

from typing import Any

import torch
from accelerate import Accelerator

import itop_prune

from ..config.recipe import Recipe
from ..data.source import MissingData
from .build import Run, build, open_for, steps_per_epoch
from .display import Display, counted


def dry_run(recipe: Recipe, accelerator: Accelerator) -> int:
    """Build everything and print the layers and the plan; where the data are missing, say so and do without."""
    data = missing = None
    try:
        data = open_for(recipe, accelerator)
    except MissingData as error:
        missing = error
    steps = (
        steps_per_epoch(data, accelerator) if data else 10**6
    )  # more than any interval of updates
    run = build(recipe, accelerator, data, steps)
    display = Display(
        str(recipe.model["model_name"]),
        run.epochs,
        run.epochs * steps,
        speaks=accelerator.is_main_process,
    )
    example = torch.zeros(1, *data.shape, device=accelerator.device) if data and run.cost else None
    display.table(itop_prune.summarize(run.bare, example_inputs=example))
    if missing:
        display.say(f"the number of steps is not known without the data: {missing}")
        return 0
    display.say(f"{run.epochs} epochs of {steps} steps, {run.epochs * steps} in all")
    if never := without_updates(run, recipe):
        display.say(never)
    elif run.regrow:
        plan = run.regrow.update_steps()
        shown = [*plan[:3], "...", plan[-1]] if len(plan) > 4 else list(plan)
        if (last := (recipe.regrow or {}).get("final_sparsity")) is not None:
            display.say(f"sparsity {last:.4f} after the last update")
        display.say(
            f"{counted(len(plan), 'update')} of the masks, after steps {', '.join(map(str, shown))}"
        )
    return 0


def without_updates(run: Run, recipe: Recipe) -> str | None:
    """Return why the masks of a run would never move, or None where they do, or are not meant to."""
    if run.regrow is None or run.regrow.update_steps():
        return None
    regrow: dict[str, Any] = recipe.regrow or {}
    steps, stop = run.epochs * run.steps_per_epoch, regrow.get("stop", 1.0)
    until = "the run has" if stop == 1.0 else f"up to regrow.stop, {stop}, the run has"
    return (
        f"no update of the masks: regrow.every is {regrow['every']}, and {until} {int(stop * steps)} steps; lower "
        "regrow.every, or train longer"
    )
