"""The folder of a run: its name, and its recipe; a run never writes over another."""

import contextlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from itop_prune.files.writing import replacing

from ..config.recipe import Recipe
from .lock import LOCK, locked

WRITTEN = (
    "recipe.yaml",
    "metrics.jsonl",
    "layers.jsonl",
    "model.safetensors",
    "sparse.safetensors",
    "checksums.json",
)
"""Files that a run writes; commands that hold no lock may write others."""
CHECKPOINTS = "step-" + 9 * "[0-9]"
"""The pattern of the names of checkpoints."""
FREE = {
    "data": ("eval_batch_size", "root", "workers", "download"),
    "accelerator": ("cpu", "log_with"),
}
"""Settings that change no number; not part of a run's name, and free to change on resume."""
FREE_SECTIONS = ("checkpoint", "stop_after_bad_losses")
SPLIT = {"data": ("batch_size",), "accelerator": ("gradient_accumulation_steps",)}
"""Settings that share out the images of a step; on resume only the number of images must match."""


class RunError(Exception):
    """A run that can't start or go on; the message says why and what to do."""


def in_a_line(error: Exception) -> str:
    """Write an error's message without its line breaks."""
    return " ".join(str(error).split())


def run_folder(recipe: Path, overrides: Sequence[str], seed: int) -> Path:
    """Name the folder of a run: runs/<recipe>[-key=value...]/seed<k>, without free settings.

    >>> overrides = ["epochs=3", "seed=7", "data.root=/d", "data.workers=2"]
    >>> str(run_folder(Path("recipes/quickstart.yaml"), overrides, 7))
    'runs/quickstart-epochs=3/seed7'
    """
    parts = [recipe.stem]
    for override in overrides:
        if not _is_free(override):
            parts.append("".join(c if c.isalnum() or c in "=.,-_{}" else "_" for c in override))
    return Path("runs") / "-".join(parts) / f"seed{seed}"


def _is_free(override: str) -> bool:
    """Tell whether an override changes no number, or the seed alone."""
    names, _, text = override.partition("=")
    section, _, key = names.partition(".")
    if key or section not in FREE:
        return section in ("seed", *FREE_SECTIONS) or key in FREE.get(section, ())

    value = yaml.safe_load(text)
    return isinstance(value, dict) and decisive({section: value}) == {}


def decisive(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Select the settings of a recipe that decide the numbers of a run, without empty sections.

    >>> decisive({"data": {"name": "digits", "workers": 2}, "masks": None, "epochs": 3})
    {'data': {'name': 'digits'}, 'epochs': 3}
    """
    sections = {key: value for key, value in recipe.items() if key not in FREE_SECTIONS}
    return _without(sections, FREE)


def _without(recipe: Mapping[str, Any], names: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Drop these settings, and the sections that are then empty."""
    left = {}
    for key, value in recipe.items():
        if key in names:
            settings = (value or {}).items()
            value = {name: setting for name, setting in settings if name not in names[key]}
        if value not in (None, {}):
            left[key] = value
    return left


def check_folder(folder: Path) -> None:
    """Refuse a path that exists and is no folder.

    Raises:
        RunError: This one is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is no folder; write elsewhere with --out FOLDER")


def check_free(folder: Path) -> None:
    """Refuse a folder that holds anything but what a failed start leaves.

    Raises:
        RunError: This one does.
    """
    check_folder(folder)
    if folder.exists() and set(folder.iterdir()) - {folder / LOCK, *_unfinished(folder)}:
        raise RunError(
            f"{folder} exists; continue that run with --resume, or write elsewhere with "
            "--out FOLDER"
        )


@contextlib.contextmanager
def opened(folder: Path, recipe: Recipe, resume: bool) -> Iterator[None]:
    """Start a run in a folder or go on with one, and keep other runs out of it, as a context.

    Raises:
        RunError: The folder holds a run already, or none to resume; another process writes
            into it; or it can't be written.
    """

    def check() -> None:
        if resume:
            check_same_recipe(folder, recipe)
        else:
            check_free(folder)

    with contextlib.ExitStack() as lock:
        try:
            check()  # first without the lock, whose file would change a foreign folder
            folder.mkdir(parents=True, exist_ok=True)
            lock.enter_context(locked(folder))
            check()

            _remove_unfinished(folder)
            if not resume:
                with replacing(folder / "recipe.yaml") as unfinished:
                    unfinished.write_text(recipe.as_yaml(), encoding="utf-8")
        except BlockingIOError:
            raise RunError(
                f"{folder} is in use by another run, and only one may write into it; wait until "
                "that one ends, or write elsewhere with --out FOLDER"
            ) from None
        except OSError as error:
            raise RunError(
                f"{folder} can't be written: {error}; write elsewhere with --out FOLDER"
            ) from None
        yield


def _unfinished(folder: Path) -> list[Path]:
    """List what a run has begun to write, or did not finish before it was killed."""
    found = [path for name in WRITTEN for path in folder.glob(f"unfinished-*-{name}")]
    return [*found, *folder.glob("checkpoints/unfinished-*")]


def _remove_unfinished(folder: Path) -> None:
    """Remove what killed runs left; only the holder of the lock may."""
    for path in _unfinished(folder):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def check_same_recipe(folder: Path, recipe: Recipe) -> None:
    """Refuse to resume a run with another recipe than it began with.

    Raises:
        RunError: There is no run, or its recipe differs.
    """
    check_folder(folder)
    path = folder / "recipe.yaml"
    if not path.exists():
        raise RunError(f"{folder} holds no run to resume; start it without --resume")

    before = _read_sections(path)
    now = yaml.safe_load(recipe.as_yaml())
    was, must = (_without(decisive(sections), SPLIT) for sections in (before, now))
    differing = [key for key in {**before, **now} if was.get(key) != must.get(key)]
    if differing:
        lines = [f"  {key}: was {before.get(key)}, is {now.get(key)}" for key in differing]
        raise RunError(
            f"{folder} began with another recipe; give the same, or --out for a new run\n"
            + "\n".join(lines)
        )


def _read_sections(path: Path) -> dict[str, Any]:
    """Read the recipe that a run wrote."""
    try:
        sections = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        sections = None

    sound = isinstance(sections, dict) and all(
        isinstance(sections.get(key) or {}, dict) for key in FREE
    )
    if not sound:
        raise RunError(f"{path} is damaged; start a new run with --out FOLDER")
    return sections
