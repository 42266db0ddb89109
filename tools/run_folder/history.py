"""What a run folder tells about its run: read and checked, for the report."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from .folder import RunError, in_a_line
from .metrics import Metrics

Numbers = NDArray[np.float64]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Masks:
    """The masked layers of a run, at the beginning, or where layers.jsonl was begun anew, and after every update."""

    names: list[str]
    """In model order."""
    weights: Numbers
    """[layers]."""
    updates_before: int
    """How many updates were made before the first that is known; 0 but where layers.jsonl was lost."""
    steps: Numbers
    """[1 + updates]: 0, or from where they are known, and the step of every update."""
    active: Numbers
    """[1 + updates, layers]."""
    explored: Numbers
    """[1 + updates, layers]."""
    entered: Numbers
    """[updates, layers]."""
    survival: Numbers
    """[updates, layers], NaN where nothing was counted."""
    rates: Numbers
    """[updates]: the share of active weights that each was to exchange."""

    @property
    def updates(self) -> int:
        """How many updates were made, known or not."""
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
        """Of the active weights, the share that was not active before the update, [updates, layers]."""
        return self.entered / np.maximum(1, self.active[1:])


@dataclass(frozen=True)
class History:
    """All that is known of a run."""

    folder: Path
    recipe: dict[str, Any]
    recipe_text: str
    epochs: list[dict[str, Any]]
    """The metrics, at least one line."""
    test: dict[str, Any] | None
    """Of the test set; None where the run has not come to its end."""
    beginning: dict[str, Any] | None
    """The first line of layers.jsonl."""
    masks: Masks | None
    """None without layers.jsonl."""

    @property
    def title(self) -> str:
        """What the run is called: its folder, and the one above where that is named by the seed alone."""
        folder = self.folder.resolve()
        return (
            f"{folder.parent.name}, seed {folder.name[4:]}"
            if folder.name[:4] == "seed"
            else folder.name
        )

    @property
    def last(self) -> dict[str, Any]:
        """The numbers that the run ends with, those of the last epoch and the test set."""
        return {**self.epochs[-1], **(self.test or {})}

    @property
    def planned(self) -> int:
        """Epochs of the whole run."""
        return int(self.recipe.get("epochs", 0)) * int(self.recipe.get("multiplier") or 1)

    @cached_property
    def steps(self) -> list[float]:
        """At the end of every epoch."""
        return [line["step"] for line in self.epochs]

    @property
    def end(self) -> float:
        """The last step of which anything is known: of the last epoch, or of an update after it."""
        return max(self.steps[-1], self.masks.steps[-1] if self.masks else 0)

    def column(self, key: str) -> Numbers:
        """Return a number of every epoch; NaN where it is not there or not finite."""
        values = np.array(
            [line[key] if line.get(key) is not None else np.nan for line in self.epochs], np.float64
        )
        return np.where(np.isfinite(values), values, np.nan)

    def has(self, key: str) -> bool:
        """Return whether any epoch has a finite number of that name."""
        return bool(np.isfinite(self.column(key)).any())

    def first_mask(self) -> tuple[str, NDArray[np.bool_]] | None:
        """Return name and mask of the first masked layer as the run left it, from its weights or last checkpoint.

        Raises:
            RunError: They can't be read.
        """
        if not self.masks or not self.masks.names:
            return None
        name = self.masks.names[0]
        checkpoints = sorted(self.folder.glob("checkpoints/step-*/model.safetensors"), reverse=True)
        for path in [self.folder / "model.safetensors", *checkpoints]:
            if path.exists():
                try:
                    with safe_open(path, framework="numpy") as file:
                        return name, file.get_tensor(f"{name}_mask").astype(bool)
                except (OSError, SafetensorError) as error:
                    raise RunError(f"{path} can't be read: {error}") from None
        return None


def folders(given: Iterable[Path]) -> Iterator[Path]:
    """Yield the runs of these folders, each a run or one that holds seed<k>/ runs."""
    for folder in given:
        yield from ([] if (folder / "recipe.yaml").exists() else sorted(folder.glob("seed*/"))) or [
            folder
        ]


def read(folder: Path) -> History:
    """Read a run folder.

    Raises:
        RunError: It holds no run, no finished epoch, or a file in it is damaged.
    """
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
    metrics = Metrics(folder)
    lines_of(metrics)
    epochs, test = metrics.epochs, metrics.test
    if not epochs:
        raise RunError(
            f"{folder} holds no finished epoch, so there is nothing to draw; go on with --resume"
        )
    as_written(folder / "metrics.jsonl", lambda: check_numbers(epochs))
    notes = lines_of(Metrics(folder, "layers.jsonl"))
    masks = as_written(folder / "layers.jsonl", lambda: gather(notes)) if notes else None
    return History(folder, recipe, text, epochs, test, notes[0] if notes else None, masks)


def as_written(path: Path, look: Callable[[], Result]) -> Result:
    """Return what a look at a file's lines gives.

    Raises:
        RunError: They are not as the runner writes them.
    """
    try:
        return look()
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise RunError(
            f"{path} is damaged: it is not as a run writes it ({type(error).__name__}: {error}); put it right"
        ) from None


def lines_of(file: Metrics) -> list[dict[str, Any]]:
    """Return all lines of a file; [] where there is none.

    Raises:
        RunError: One is damaged or half written.
    """
    try:
        lines, count = file.read(), file.count()
    except OSError as error:
        raise RunError(f"{file.path} can't be read: {error}") from None
    if len(lines) < count:
        raise RunError(
            f"{file.path} is damaged in line {len(lines) + 1} of {count}; put it right, or remove it if it is the last"
        )
    return lines


def check_numbers(epochs: list[dict[str, Any]]) -> None:
    """Refuse metrics without what every epoch has.

    Raises:
        KeyError, TypeError: Something is missing, or not a number.
    """
    for line in epochs:
        for key in ("train_loss", "lr", "sparsity", "exploration_rate"):
            float(line[key])


def gather(notes: list[dict[str, Any]]) -> Masks:
    """Return the masked layers of layers.jsonl as arrays.

    Raises:
        KeyError, TypeError, ValueError: It is not as the runner writes it.
    """
    first, updates = notes[0], notes[1:]
    masked = [place for place, is_masked in enumerate(first["masked"]) if is_masked]

    def table(key: str, lines: list[dict[str, Any]]) -> Numbers:
        rows = [[line[key][place] for place in masked] for line in lines]
        return np.array(rows, np.float64).reshape(len(lines), len(masked))

    nothing = {"survival": [None] * len(first["names"])}
    return Masks(
        names=[first["names"][place] for place in masked],
        weights=table("weights", [first])[0],
        updates_before=int(first.get("updates_before", 0)),
        steps=np.array([line["step"] for line in notes], np.float64),
        active=table("active", notes),
        explored=table(
            "explored", [{"explored": first.get("explored", first["active"])}, *updates]
        ),
        entered=table("entered", updates),
        survival=table("survival", [{**nothing, **line} for line in updates]),
        rates=np.array([line["rate"] for line in updates], np.float64),
    )
