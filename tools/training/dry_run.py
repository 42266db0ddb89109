"""Show what a recipe would do, its layers and its plan, without training."""

from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator

import itop_prune

from ..config.recipe import Recipe
from ..data.arrays import DOWNLOADS
from ..data.source import MissingData
from ..run_folder.labels import counted
from .build import build, open_for, steps_per_epoch
from .display import Display
from .run import Run

UNKNOWN_STEPS = 10**6
"""Steps of an epoch when the data are missing; more than any interval of updates."""


def dry_run(recipe: Recipe, accelerator: Accelerator) -> int:
    """Build everything and print layers and plan; missing data are not downloaded.

    Raises:
        MissingData: The run would not find its data. The layers are printed before.
    """
    data = missing = None
    try:
        here = replace(recipe, data={**recipe.data, "download": False})
        data = open_for(here, accelerator)
    except MissingData as error:
        missing = error

    steps = steps_per_epoch(data, accelerator) if data else UNKNOWN_STEPS
    run = build(recipe, accelerator, data, steps)
    title = str(recipe.model["model_name"])
    display = Display(title, run.epochs, run.total_steps, enabled=accelerator.is_main_process)

    example = None
    if data and run.cost:
        example = torch.zeros(1, *data.shape, device=accelerator.device)
    summary = itop_prune.summarize(
        run.unwrapped_model, example_inputs=example, optimizer=run.optimizer
    )
    display.table(summary, "add | cat for a row each")

    if missing:
        if not recipe.data.get("download") or recipe.data["name"] not in DOWNLOADS:
            raise missing
        root = recipe.data.get("root", "data")
        display.say(
            f"{recipe.data['name']} is not in {root} and the run will download it; until then the "
            "number of steps is not known"
        )
        return 0

    display.say(f"{run.epochs} epochs of {steps} steps, {run.total_steps} in all")
    for line in describe_updates(run, recipe):
        display.say(line)
    return 0


def describe_updates(run: Run, recipe: Recipe) -> list[str]:
    """Describe when the masks will move, one sentence per item."""
    if run.regrow is None:
        return []
    never = explain_no_update(run, recipe)
    if never:
        return [never]

    lines = []
    final_sparsity = (recipe.regrow or {}).get("final_sparsity")
    if final_sparsity is not None:
        lines.append(f"sparsity {final_sparsity:.4f} after the last update")

    plan = run.regrow.update_steps()
    shown = [*plan[:3], "...", plan[-1]] if len(plan) > 4 else list(plan)
    steps = ", ".join(map(str, shown))
    return [*lines, f"{counted(len(plan), 'update')} of the masks, after steps {steps}"]


def explain_no_update(run: Run, recipe: Recipe) -> str | None:
    """Explain why no update will happen, or return None if updates are planned or disabled."""
    if run.regrow is None or run.regrow.update_steps():
        return None

    regrow: dict[str, Any] = recipe.regrow or {}
    stop = regrow.get("stop", 1.0)
    until = "the run has" if stop == 1.0 else f"up to regrow.stop, {stop}, the run has"
    return (
        f"no update of the masks: regrow.every is {regrow['every']}, and {until} "
        f"{int(stop * run.total_steps)} steps; lower regrow.every, or train longer"
    )
