"""Train several seeds of one recipe in sequence, and print their mean and spread."""

import dataclasses
import gc
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list

from ..config.recipe import Recipe
from ..reports import comparison as compare
from ..run_folder.folder import RunError, check_free, check_same_recipe
from ..run_folder.metrics import Metrics
from .build import make_accelerator
from .ranks import on_main

TrainRecipe = Callable[[Recipe, Path, bool], int]


def train_seeds(
    recipe: Recipe, count: int, folder: Path, resume: bool, train_recipe: TrainRecipe
) -> int:
    """Train the recipe's seed and those after it, each into folder/seed<k>.

    With `resume` finished runs stay as they are, an unfinished one goes on, and the rest begin.

    Returns:
        0, or the exit status of the run that did not finish.

    Raises:
        RunError: A run exists and is not to be resumed, or began with another recipe. Raised
            before any training.
    """
    accelerator = make_accelerator(recipe)
    recipes = [dataclasses.replace(recipe, seed=recipe.seed + index) for index in range(count)]
    folders = [folder / f"seed{each.seed}" for each in recipes]

    # The main process decides for all ranks: a shared disk may look different to each.
    found = on_main(accelerator, check_all, folder, folders, recipes, resume)
    (statuses,) = broadcast_object_list([found])

    for each, path, status in zip(recipes, folders, statuses, strict=True):
        if status == "finished":
            on_main(accelerator, print, f"{path} is finished")
            continue

        exit_status = train_recipe(each, path, status == "begun")
        if exit_status:
            return exit_status

        torch.compiler.reset()  # torch.compile gives up on a model after a few compilations
        gc.collect()  # tensors that ranks and hooks still hold

    on_main(accelerator, lambda: print(summary_line(compare.read(folder, folders))))
    return 0


def check_all(folder: Path, folders: list[Path], recipes: list[Recipe], resume: bool) -> list[str]:
    """Find the status of every run.

    Raises:
        RunError: As `train_seeds`.
    """
    if (folder / "recipe.yaml").exists():
        raise RunError(
            f"{folder} is a run itself; several seeds go into a folder that holds runs: "
            f"{folder.parent}"
        )
    return [run_status(path, each, resume) for path, each in zip(folders, recipes, strict=True)]


def run_status(folder: Path, recipe: Recipe, resume: bool) -> str:
    """Tell whether the run of a folder is "new", "begun" or "finished".

    Raises:
        RunError: It exists and is not to be resumed, or is of another recipe.
    """
    if not resume or not (folder / "recipe.yaml").exists():
        check_free(folder)
        return "new"

    check_same_recipe(folder, recipe)
    finished = Metrics(folder).test and (folder / "model.safetensors").exists()
    return "finished" if finished else "begun"


def summary_line(runs: compare.Runs) -> str:
    """Write mean and spread of several seeds as one line."""
    top1, explored = compare.spread(runs.top1, 2), compare.spread(runs.explored, 4)
    count = len(runs.top1)
    seeds = "seed" if count == 1 else "seeds"
    return f"{count} {seeds} of {runs.name}: test top-1 {top1} %  R_s {explored}"
