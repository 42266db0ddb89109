"""The folder of a run: its name, its recipe, never written over another; and the wish to stop it."""

import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import yaml

from ..config.recipe import Recipe

FREE = {
    "data": ("eval_batch_size", "root", "workers", "download"),
    "accelerator": ("cpu", "log_with"),
}
"""Where and how things are read and written: no part of a run's name, and a resumed run may change it."""
FREE_SECTIONS = ("checkpoint", "stop_after_bad_losses")
SPLIT = {"data": ("batch_size",), "accelerator": ("gradient_accumulation_steps",)}
"""How the images of a step are shared out, which a resumed run may change too: their number is compared by itself."""


class RunError(Exception):
    """A run that can't start or go on; the message says why and what to do."""


def in_a_line(error: Exception) -> str:
    """Return an error's message without its line breaks."""
    return " ".join(str(error).split())


def run_folder(recipe: Path, overrides: Sequence[str], seed: int) -> Path:
    """Return runs/<recipe>[-key=value...]/seed<k>; the seed and what is free are no part of the recipe's name.

    >>> str(run_folder(Path("recipes/quickstart.yaml"), ["epochs=3", "seed=7", "data.root=/d", "data.workers=2"], 7))
    'runs/quickstart-epochs=3/seed7'
    """
    named = [override for override in overrides if not _is_free(override)]
    safe = [
        "".join(c if c.isalnum() or c in "=.,-_{}" else "_" for c in override) for override in named
    ]
    return Path("runs") / "-".join([recipe.stem, *safe]) / f"seed{seed}"


def _is_free(override: str) -> bool:
    """Return whether an override changes no number, or the seed alone."""
    names, _, text = override.partition("=")
    section, _, key = names.partition(".")
    if key or section not in FREE:
        return section in ("seed", *FREE_SECTIONS) or key in FREE.get(section, ())
    value = yaml.safe_load(text)
    return isinstance(value, dict) and decisive({section: value}) == {}


def decisive(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a recipe decides the numbers of a run: its sections without what is free, and none that is empty.

    >>> decisive({"data": {"name": "digits", "workers": 2}, "accelerator": {"cpu": True}, "masks": None, "epochs": 3})
    {'data': {'name': 'digits'}, 'epochs': 3}
    """
    return _without({key: value for key, value in recipe.items() if key not in FREE_SECTIONS}, FREE)


def _without(recipe: Mapping[str, Any], names: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Return a recipe's sections without these settings, and none that is then empty."""
    left = {
        key: {name: setting for name, setting in (value or {}).items() if name not in names[key]}
        if key in names
        else value
        for key, value in recipe.items()
    }
    return {key: value for key, value in left.items() if value not in (None, {})}


def check_folder(folder: Path) -> None:
    """Refuse what is there and no folder.

    Raises:
        RunError: This is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is no folder; write elsewhere with --out FOLDER")


def check_free(folder: Path) -> None:
    """Refuse a folder that holds anything.

    Raises:
        RunError: This one does.
    """
    check_folder(folder)
    if folder.exists() and any(folder.iterdir()):
        raise RunError(
            f"{folder} exists; continue that run with --resume, or write elsewhere with --out FOLDER"
        )


def start(folder: Path, recipe: Recipe) -> None:
    """Make the folder and write the recipe into it.

    Raises:
        RunError: The folder holds a run already, or can't be written.
    """
    try:
        check_free(folder)
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder.with_name(
            f"{folder.name}.unfinished"
        )  # beside: an empty folder may be started in again
        unfinished.write_text(recipe.as_yaml(), encoding="utf-8")
        unfinished.replace(folder / "recipe.yaml")
    except OSError as error:
        raise RunError(
            f"{folder} can't be written: {error}; write elsewhere with --out FOLDER"
        ) from None


def check_same_recipe(folder: Path, recipe: Recipe) -> None:
    """Refuse to go on with another recipe than the run began with.

    Raises:
        RunError: There is no run, or its recipe differs.
    """
    check_folder(folder)
    path = folder / "recipe.yaml"
    if not path.exists():
        raise RunError(f"{folder} holds no run to resume; start it without --resume")
    now = yaml.safe_load(recipe.as_yaml())
    try:
        before = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        before = None
    if not isinstance(before, dict) or not all(
        isinstance(before.get(key) or {}, dict) for key in FREE
    ):
        raise RunError(f"{path} is damaged; start a new run with --out FOLDER")
    was, must = (_without(decisive(sections), SPLIT) for sections in (before, now))
    differing = [key for key in {**before, **now} if was.get(key) != must.get(key)]
    if differing:
        lines = [f"  {key}: was {before.get(key)}, is {now.get(key)}" for key in differing]
        raise RunError(
            f"{folder} began with another recipe; give the same, or --out for a new run\n"
            + "\n".join(lines)
        )


class StopRequest:
    """Turns SIGINT (Ctrl-C) and SIGTERM into a question that is asked between batches; a second Ctrl-C interrupts."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, ranks: int = 1) -> None:
        self._received = False
        # Ranks agree over gloo, whatever they train on: a byte between hosts at every step, and no device waits for it.
        self._group: Any = torch.distributed.new_group(backend="gloo") if ranks > 1 else None

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._group is not None:
            torch.distributed.destroy_process_group(self._group)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = True
        if number == signal.SIGINT:  # SIGTERM may come twice, from a launcher and from who stops it
            signal.signal(number, signal.default_int_handler)

    def wanted(self) -> bool:
        """Return whether to stop here, the same on all ranks; all must ask as often."""
        if self._group is None:
            return self._received
        received = torch.tensor(int(self._received))
        torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX, group=self._group)
        return bool(received)


def end_gloo() -> None:
    """Join gloo's threads before the interpreter ends: one that still works then aborts the process."""
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        torch.distributed.destroy_process_group()
