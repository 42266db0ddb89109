"""Pass the numbers of metrics.jsonl to experiment trackers (tensorboard, wandb, ...)."""

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


def tracker_names(recipe: Recipe) -> list[str]:
    """List the trackers that a recipe names in `accelerator.log_with`.

    Raises:
        RunError: One is unknown, or not installed.
    """
    given = (recipe.accelerator or {}).get("log_with") or []
    names = [str(name) for name in (given if isinstance(given, (list, tuple)) else [given])]
    known = [str(kind) for kind in LoggerType]
    installed = [str(kind) for kind in get_available_trackers()]

    for name in names:
        if name not in known:
            raise RunError(
                f"accelerator.log_with is {name!r}; known are {', '.join(known)}"
                f"{nearest(name, known)}"
            )
        if name not in installed and not (name == "all" and installed):
            there = f"installed are {', '.join(installed)}" if installed else "no tracker is"
            raise RunError(
                f"accelerator.log_with is {name!r}, which is not installed, {there}; "
                "install it, or leave out log_with"
            )
    return names


class Trackers:
    """The trackers of one run; leaving the context closes them.

    On other ranks than the first they do nothing.
    """

    def __init__(self, accelerator: Accelerator, recipe: Recipe, folder: Path) -> None:
        self._accelerator, self._recipe, self._folder = accelerator, recipe, folder
        self._names = tracker_names(recipe)

    def start(self, step: int, resumed: bool) -> None:
        """Open the trackers in the run folder; a resumed run continues its curves.

        Raises:
            RunError: One can't be opened.
        """
        if not self._names:
            return

        folder = str(self._folder)
        # tensorboard drops the points past this step.
        settings: dict[str, dict[str, Any]] = {"tensorboard": {"purge_step": step + 1}}
        if {"wandb", "all"} & set(self._names):
            name = "/".join(self._folder.parts[-2:])
            run_id = self._wandb_id()
            settings["wandb"] = {"dir": folder, "name": name, "id": run_id, "resume": "allow"}
        recipe = None if resumed else flat(yaml.safe_load(self._recipe.as_yaml()))

        self._accelerator.project_configuration.set_directories(folder)
        try:
            self._accelerator.log_with = filter_trackers(self._names, folder)
            self._accelerator.init_trackers(PROJECT, recipe, settings)
        except Exception as error:  # without a login, a network, or space on the disk
            raise RunError(
                f"{self._label()} can't be started: {error}; put it right, or leave out log_with"
            ) from None

    def log(self, line: dict[str, Any]) -> None:
        """Pass on a line of metrics.

        Raises:
            RunError: A tracker fails.
        """
        numbers = {key: value for key, value in line.items() if key != "step" and value is not None}
        try:
            self._accelerator.log(numbers, step=line["step"])
        except Exception as error:
            raise RunError(
                f"{self._label()} failed: {error}; "
                "go on with --resume, and with --out where log_with is left out"
            ) from None

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # `Accelerator.end_training` would end the ranks too, and another seed may follow.
        for tracker in self._accelerator.trackers:
            tracker.finish()

    def _wandb_id(self) -> str:
        """Read the id of the run, or draw one: a new run in an old folder is another run."""
        path = self._folder / "wandb_id"
        if not path.exists():
            path.write_text(f"{uuid.uuid4().hex[:16]}\n", encoding="utf-8")
        return path.read_text(encoding="utf-8").strip()

    def _label(self) -> str:
        return f"accelerator.log_with: {', '.join(self._names)}"


def flat(sections: dict[str, Any]) -> dict[str, Any]:
    """Flatten a recipe into the settings that trackers take: numbers and text.

    >>> flat({"masks": {"sparsity": 0.9, "include": ["fc"]}, "seed": 0})
    {'masks.sparsity': 0.9, 'masks.include': "['fc']", 'seed': 0}
    """
    settings: dict[str, Any] = {}
    for section, value in sections.items():
        if isinstance(value, dict):
            settings |= {f"{section}.{key}": part for key, part in value.items()}
        else:
            settings[section] = value

    for name, value in settings.items():
        if not isinstance(value, (int, float, str)):
            settings[name] = str(value)
    return settings
