"""Read and check the files of a run, for the report."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from itop_prune.layers.sparse_storage import mask_of

from .folder import CHECKPOINTS, RunError, in_a_line
from .json_lines import JsonLines
from .metrics import Metrics

Numbers = NDArray[np.float64]
Result = TypeVar("Result")

LARGEST_MASK = 1 << 28
"""Weights of a layer whose mask is read to be drawn, at a byte each."""


@dataclass(frozen=True)
class Masks:
    """The masked layers of a run: at the first line of layers.jsonl, and after every update."""

    names: list[str]
    """In model order."""
    weights: Numbers
    """[layers]."""
    updates_before: int
    """Updates before the first known one; 0 unless layers.jsonl was lost."""
    steps: Numbers
    """[1 + updates]: the step of the first line, and of every update."""
    active: Numbers
    """[1 + updates, layers]."""
    explored: Numbers
    """[1 + updates, layers]."""
    entered: Numbers
    """[updates, layers]."""
    survival: Numbers
    """[updates, layers]; NaN if nothing was counted."""
    rates: Numbers
    """[updates]: the share of active weights to exchange."""

    @property
    def updates(self) -> int:
        """The number of updates, known or not."""
        return self.updates_before + len(self.steps) - 1

    @property
    def exploration_rates(self) -> Numbers:
        """R_s, [1 + updates, layers]."""
        return self.explored / self.weights

    @property
    def sparsities(self) -> Numbers:
        """[1 + updates, layers]."""
        return 1.0 - self.active / self.weights

    @property
    def changed(self) -> Numbers:
        """Share of the active weights that were inactive before the update, [updates, layers]."""
        return self.entered / np.maximum(1, self.active[1:])


@dataclass(frozen=True)
class History:
    """The files of a run, read and checked."""

    folder: Path
    recipe: dict[str, Any]
    recipe_text: str
    epochs: list[dict[str, Any]]
    """The lines of metrics.jsonl, at least one."""
    test: dict[str, Any] | None
    """The line of the test set; None if the run has not finished."""
    beginning: dict[str, Any] | None
    """The first line of layers.jsonl."""
    masks: Masks | None
    """None without layers.jsonl."""

    @property
    def title(self) -> str:
        """The name of the run: its folder, with the one above if the folder names only the seed."""
        folder = self.folder.resolve()
        if folder.name.startswith("seed"):
            return f"{folder.parent.name}, seed {folder.name[4:]}"
        return folder.name

    @property
    def last(self) -> dict[str, Any]:
        """The final numbers of the run: of the last epoch and the test set."""
        return {**self.epochs[-1], **(self.test or {})}

    @property
    def planned(self) -> int:
        """Epochs of the whole run."""
        return int(self.recipe.get("epochs", 0)) * int(self.recipe.get("multiplier") or 1)

    @cached_property
    def steps(self) -> list[float]:
        """Steps at the end of every epoch."""
        return [line["step"] for line in self.epochs]

    @property
    def end(self) -> float:
        """The last known step: of the last epoch, or of an update after it."""
        return max(self.steps[-1], self.masks.steps[-1] if self.masks else 0)

    def column(self, key: str) -> Numbers:
        """Read one number of every epoch; NaN if it is missing or not finite."""
        found = [line.get(key) for line in self.epochs]
        values = np.array([np.nan if value is None else value for value in found], np.float64)
        return np.where(np.isfinite(values), values, np.nan)

    def has(self, key: str) -> bool:
        """Tell whether any epoch has a finite number of that name."""
        return bool(np.isfinite(self.column(key)).any())

    def first_mask(self) -> tuple[str, NDArray[np.bool_]] | None:
        """Read the mask of the first masked layer from the final weights or the last checkpoint.

        Layers whose mask is too large to draw are passed over.

        Returns:
            Name and mask; None if there is none.

        Raises:
            RunError: They can't be read.
        """
        if not self.masks:
            return None
        sizes = zip(self.masks.names, self.masks.weights, strict=True)
        name = next((name for name, weights in sizes if weights <= LARGEST_MASK), None)
        if name is None:
            return None
        pattern = f"checkpoints/{CHECKPOINTS}/model.safetensors"
        checkpoints = sorted(self.folder.glob(pattern), reverse=True)
        for path in [self.folder / "model.safetensors", *checkpoints]:
            if not path.exists():
                continue
            try:
                with safe_open(path, framework="pt") as file:
                    return name, _read_mask(file, name)
            except (OSError, SafetensorError) as error:
                raise RunError(f"{path} can't be read: {error}") from None
        return None


def _read_mask(file: Any, name: str) -> NDArray[np.bool_]:
    """Read the mask of a weight in either storage."""
    if f"{name}_mask" in file.keys():  # noqa: SIM118
        return file.get_tensor(f"{name}_mask").bool().numpy()
    shape = tuple(file.get_tensor(f"{name}_shape").tolist())
    return mask_of(file.get_tensor(f"{name}_positions"), shape).numpy()


def folders(given: Iterable[Path]) -> list[Path]:
    """List the runs of these folders; each is a run, or holds seed<k>/ runs."""
    found: list[Path] = []
    for folder in given:
        is_run = (folder / "recipe.yaml").exists()
        seeds = [] if is_run else sorted(folder.glob("seed*/"))
        found += seeds or [folder]
    return found


def read_history(folder: Path) -> History:
    """Read the folder of a run.

    Raises:
        RunError: It holds no run, no finished epoch, or a file in it is damaged.
    """
    recipe, text = _read_recipe(folder)

    metrics = Metrics(folder)
    _lines_of(metrics)
    epochs, test = metrics.epochs, metrics.test
    if not epochs:
        raise RunError(
            f"{folder} holds no finished epoch, so there is nothing to draw; go on with --resume"
        )
    _as_written(metrics.path, lambda: _check_numbers(epochs))

    layers = JsonLines(folder / "layers.jsonl")
    lines = _lines_of(layers)
    masks = _as_written(layers.path, lambda: _gather(lines)) if lines else None
    return History(folder, recipe, text, epochs, test, lines[0] if lines else None, masks)


def _read_recipe(folder: Path) -> tuple[dict[str, Any], str]:
    """Read the recipe that the run wrote, as sections and as text."""
    path = folder / "recipe.yaml"
    try:
        text = path.read_text(encoding="utf-8")
        recipe = yaml.safe_load(text)
    except FileNotFoundError:
        raise RunError(
            f"{folder} holds no run: no recipe.yaml; give a folder such as runs/quickstart/seed0"
        ) from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RunError(f"{path} can't be read: {in_a_line(error)}") from None

    if not isinstance(recipe, dict):
        raise RunError(
            f"{path} is damaged: it holds no sections; put back the one that the run wrote"
        )
    return recipe, text


def _as_written(path: Path, look: Callable[[], Result]) -> Result:
    """Call a function that takes a file's lines to be as a run writes them; report if not."""
    try:
        return look()
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise RunError(
            f"{path} is damaged: it is not as a run writes it ({type(error).__name__}: {error}); "
            "put it right"
        ) from None


def _lines_of(file: JsonLines) -> list[dict[str, Any]]:
    """Read all lines of a file; [] without the file.

    Raises:
        RunError: One is damaged or half written.
    """
    try:
        lines, count = file.read(), file.count()
    except OSError as error:
        raise RunError(f"{file.path} can't be read: {error}") from None
    if len(lines) < count:
        raise RunError(
            f"{file.path} is damaged in line {len(lines) + 1} of {count}; "
            "put it right, or remove it if it is the last"
        )
    return lines


def _check_numbers(epochs: list[dict[str, Any]]) -> None:
    """Raise KeyError or TypeError unless every epoch has its numbers."""
    for line in epochs:
        for key in ("train_loss", "lr", "sparsity", "exploration_rate"):
            float(line[key])


def _gather(lines: list[dict[str, Any]]) -> Masks:
    """Gather the masked layers of layers.jsonl as arrays.

    Raises:
        KeyError, TypeError, ValueError: It is not as a run writes it.
    """
    first, updates = lines[0], lines[1:]
    masked = [index for index, is_masked in enumerate(first["masked"]) if is_masked]

    def table(key: str, lines: list[dict[str, Any]]) -> Numbers:
        rows = [[line[key][index] for index in masked] for line in lines]
        return np.array(rows, np.float64).reshape(len(lines), len(masked))

    explored_at_first = {"explored": first.get("explored", first["active"])}
    no_survival = {"survival": [None] * len(first["names"])}
    return Masks(
        names=[first["names"][index] for index in masked],
        weights=table("weights", [first])[0],
        updates_before=int(first.get("updates_before", 0)),
        steps=np.array([line["step"] for line in lines], np.float64),
        active=table("active", lines),
        explored=table("explored", [explored_at_first, *updates]),
        entered=table("entered", updates),
        survival=table("survival", [{**no_survival, **line} for line in updates]),
        rates=np.array([line["rate"] for line in updates], np.float64),
    )
