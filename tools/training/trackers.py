"""Experiment trackers (tensorboard, wandb, ...) through Accelerate: they get the numbers of metrics.jsonl."""

import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml
from accelerate import Accelerator
from accelerate.tracking import filter_trackers, get_available_trackers
from accelerate.utils import LoggerType

from itop_prune.messages import nearest

from ..config.recipe import Recipe
from ..run_folder.folder import RunError

PROJECT = "itop_prune"


def asked_for(recipe: Recipe) -> list[str]:
    """Return the trackers that a recipe names in `accelerator.log_with`.

    Raises:
        RunError: One is unknown, or not installed.
    """
    given = (recipe.accelerator or {}).get("log_with") or []
    names = [str(name) for name in (given if isinstance(given, (list, tuple)) else [given])]
    known, installed = (
        [str(kind) for kind in LoggerType],
        [str(kind) for kind in get_available_trackers()],
    )
    for name in names:
        if name not in known:
            raise RunError(
                f"accelerator.log_with is {name!r}; known are {', '.join(known)}{nearest(name, known)}"
            )
        if name not in installed and not (name == "all" and installed):
            there = f"installed are {', '.join(installed)}" if installed else "no tracker is"
            raise RunError(
                f"accelerator.log_with is {name!r}, which is not installed, {there}; install it, or leave out log_with"
            )
    return names


class Trackers:
    """The trackers of one run, as a context that closes them; on other ranks than the first they do nothing."""

    def __init__(self, accelerator: Accelerator, recipe: Recipe, folder: Path) -> None:
        self._accelerator, self._recipe, self._folder = accelerator, recipe, folder

    def start(self, step: int, resumed: bool) -> None:
        """Open them, in the run folder; a resumed run goes on in its curves, for wandb by an id that the folder keeps.

        Raises:
            RunError: One can't be opened.
        """
        folder, names = str(self._folder), asked_for(self._recipe)
        if not names:
            return
        of_each: dict[str, dict[str, Any]] = {
            "tensorboard": {"purge_step": step + 1}
        }  # drops what lies past the step
        if {"wandb", "all"} & set(names):
            shown = {"dir": folder, "name": "/".join(self._folder.parts[-2:])}
            of_each["wandb"] = {**shown, "id": self._wandb_id(), "resume": "allow"}
        settings = None if resumed else flat(yaml.safe_load(self._recipe.as_yaml()))
        self._accelerator.project_configuration.set_directories(folder)
        try:
            self._accelerator.log_with = filter_trackers(names, folder)
            self._accelerator.init_trackers(PROJECT, settings, of_each)
        except Exception as error:  # whatever a tracker raises without a login, a network, a disk
            raise RunError(
                f"{self._named()} can't be started: {error}; put it right, or leave out log_with"
            ) from None

    def log(self, line: dict[str, Any]) -> None:
        """Pass on a line of metrics.

        Raises:
            RunError: A tracker does not take it.
        """
        numbers = {key: value for key, value in line.items() if key != "step" and value is not None}
        try:
            self._accelerator.log(numbers, step=line["step"])
        except Exception as error:
            raise RunError(
                f"{self._named()} failed: {error}; go on with --resume, and with --out where log_with is left out"
            ) from None

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # `end_training` would end the ranks too, and another seed may follow
        for tracker in self._accelerator.trackers:
            tracker.finish()

    def _wandb_id(self) -> str:
        """Return the id of the run, drawn where there is none: a new run in a folder of the same name is another."""
        path = self._folder / "wandb_id"
        if not path.exists():
            path.write_text(f"{uuid.uuid4().hex[:16]}\n", encoding="utf-8")
        return path.read_text(encoding="utf-8").strip()

    def _named(self) -> str:
        return f"accelerator.log_with: {', '.join(asked_for(self._recipe))}"


def flat(sections: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe as trackers take settings: no sections, and text for what is no number.

    >>> flat({"masks": {"sparsity": 0.9, "include": ["fc"]}, "seed": 0})
    {'masks.sparsity': 0.9, 'masks.include': "['fc']", 'seed': 0}
    """
    found: dict[str, Any] = {}
    for name, value in sections.items():
        inner = (
            {f"{name}.{key}": part for key, part in value.items()}
            if isinstance(value, dict)
            else {name: value}
        )
        found |= inner
    return {
        name: value if isinstance(value, (int, float, str)) else str(value)
        for name, value in found.items()
    }
