"""Several seeds of one recipe, one after another, and what they come to: mean and spread."""

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
from .state import on_main

Train = Callable[[Recipe, Path, bool], int]


def train_seeds(recipe: Recipe, count: int, folder: Path, resume: bool, train: Train) -> int:
    """Train the recipe's seed and those after it, each into folder/seed<k>; return 0, or what stopped one of them.

    With `resume` finished runs are left as they are, an unfinished one goes on, and the others
    begin.

    Raises: RunError: A run is there already, and is not to be resumed or began with another recipe;
        before any training.
    """
    accelerator = make_accelerator(recipe)
    recipes = [dataclasses.replace(recipe, seed=recipe.seed + place) for place in range(count)]
    folders = [folder / f"seed{one.seed}" for one in recipes]

    def look() -> list[str]:
        if (folder / "recipe.yaml").exists():
            raise RunError(
                f"{folder} is a run itself; several seeds go into a folder that holds runs: {folder.parent}"
            )
        return [standing(path, one, resume) for path, one in zip(folders, recipes, strict=True)]

    (standings,) = broadcast_object_list(
        [on_main(accelerator, look)]
    )  # a disk may show itself differently
    for one, path, stands in zip(recipes, folders, standings, strict=True):
        if stands == "finished":
            on_main(accelerator, lambda: print(f"{path} is finished"))  # noqa: B023  (called at once)
            continue
        if status := train(one, path, stands == "begun"):
            return status
        torch.compiler.reset()  # a model is compiled so often, and then no more
        gc.collect()  # what ranks and hooks hold of it
    on_main(accelerator, lambda: print(in_words(compare.read(folder, folders))))
    return 0


def standing(folder: Path, recipe: Recipe, resume: bool) -> str:
    """Return whether the run of a folder is "new", "begun" or "finished".

    Raises:
        RunError: It is there and not to be resumed, or is of another recipe.
    """
    if not resume or not (folder / "recipe.yaml").exists():
        check_free(folder)
        return "new"
    check_same_recipe(folder, recipe)
    return (
        "finished" if Metrics(folder).test and (folder / "model.safetensors").exists() else "begun"
    )


def in_words(runs: compare.Runs) -> str:
    """Return mean and spread of several seeds in one line."""
    top1, explored = compare.spread(runs.top1, 2), compare.spread(runs.explored, 4)
    count = len(runs.top1)
    return f"{count} {'seed' if count == 1 else 'seeds'} of {runs.name}: test top-1 {top1} %  R_s {explored}"
