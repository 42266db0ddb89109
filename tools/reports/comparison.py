"""Put finished runs side by side: mean and spread over their seeds, as a Markdown table and a picture.

  python tools/compare.py runs/fashion_mnist_* --picture compare.png python tools/compare.py
  runs/*set-itop* runs/*dense* --vary multiplier --picture compare.png --names SET-ITOP dense

The picture has the paper's figure, test accuracy against R_s, and beside it accuracy against the
cost of the training, in FLOPs and in steps. Experiments whose recipes differ in what --vary names,
and in nothing else, are joined by a line.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..run_folder.folder import RunError, decisive
from ..run_folder.metrics import Metrics

HEADER = (
    "run",
    "seeds",
    "test top-1",
    "to dense",
    "each seed",
    "R_s",
    "survival",
    "sparsity",
    "train FLOPs",
    "steps",
)


@dataclass(frozen=True)
class Runs:
    """The finished seeds of one experiment."""

    name: str
    recipe: dict[str, Any]
    """What decides the numbers, but for the seed; {} where it is not known."""
    top1: list[float]
    """Test accuracy by seed, in percent."""
    explored: list[float]
    """R_s at the end, by seed."""
    survival: list[float]
    """The share of what grew that survived the update after, mean over epochs, by seed; [] where nobody counted."""
    sparsities: list[float]
    """Every sparsity that an epoch of any seed had, each once, in the order of the run."""
    train_flops: list[float]
    """Of the training, as a share of what dense training of as many steps costs, by seed; [] where nobody counted."""
    steps: int

    @property
    def dense_steps(self) -> float | None:
        """How many steps of dense training have the same FLOPs."""
        return self.steps * statistics.mean(self.train_flops) if self.train_flops else None

    @property
    def is_dense(self) -> bool:
        """Whether it was trained without masks."""
        return bool(self.recipe) and "masks" not in self.recipe

    def setting(self, key: str) -> str:
        """Return what the recipe says of a key such as "regrow.every"; "" where it says nothing."""
        section, _, name = key.partition(".")
        value = self.recipe.get(section)
        value = value.get(name) if name and isinstance(value, dict) else None if name else value
        return "" if value is None else str(value)

    def row(self, dense: "Runs | None" = None) -> tuple[str, ...]:
        """Return a line of the table, beside the dense twin, if it has one."""
        shown = [f"{value:.4f}" for value in self.sparsities]
        return (
            self.name,
            str(len(self.top1)),
            spread(self.top1, 2),
            f"{statistics.mean(self.top1) - statistics.mean(dense.top1):+.2f}".replace("-", "−")
            if dense
            else "",
            " ".join(f"{value:.2f}" for value in self.top1),
            f"{statistics.mean(self.explored):.3f}",
            f"{statistics.mean(self.survival):.3f}" if self.survival else "",
            " ".join(shown) if len(shown) < 3 else f"{shown[0]} to {shown[-1]}",
            f"{statistics.mean(self.train_flops):.3f}" if self.train_flops else "",
            f"{self.steps:,}",
        )


def spread(values: Sequence[float], digits: int) -> str:
    """Return mean ± sample standard deviation, the latter from two values on.

    >>> spread([1.0, 2.0, 3.0], 1)
    '2.0 ± 1.0'
    """
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def read(folder: Path, seeds: Sequence[Path] = ()) -> Runs:
    """Return what is known of one experiment: a folder of seed<k> runs, all of them or these.

    Raises:
        RunError: No run in the folder is finished.
    """
    found = seeds or sorted(
        folder.glob("seed*"), key=lambda path: (as_number(path.name[4:]), path.name)
    )
    finished = [seed for seed in found if Metrics(seed).test and Metrics(seed).epochs]
    if not finished and (folder / "recipe.yaml").exists():
        raise RunError(f"{folder} is a run itself; give the folder that holds it, {folder.parent}")
    if not finished:
        raise RunError(
            f"{folder} holds no finished run; give folders of seed<k>/, such as runs/quickstart"
        )
    epochs = [Metrics(seed).epochs for seed in finished]
    tests = [test for seed in finished if (test := Metrics(seed).test)]
    counted = [[line["survival"] for line in lines if "survival" in line] for lines in epochs]
    return Runs(
        name=folder.name,
        recipe=recipe_of(finished[0]),
        top1=[test["test_top1"] for test in tests],
        explored=[lines[-1]["exploration_rate"] for lines in epochs],
        survival=[statistics.mean(rates) for rates in counted if rates],
        sparsities=list(dict.fromkeys(line["sparsity"] for lines in epochs for line in lines)),
        train_flops=[lines[-1]["train_flops"] for lines in epochs if "train_flops" in lines[-1]],
        steps=tests[0]["step"],
    )


def recipe_of(run: Path) -> dict[str, Any]:
    """Return what decided the numbers of a run, but for the seed; {} where that can't be read."""
    try:
        recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
        return {key: value for key, value in decisive(recipe).items() if key != "seed"}
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        return {}


def without(recipe: dict[str, Any], *keys: str) -> str:
    """Return a recipe without sections or settings, as a text that is the same for the same.

    >>> without({"regrow": {"every": 9, "grow": "random"}, "epochs": 2}, "regrow.every", "epochs")
    '{"regrow": {"grow": "random"}}'
    """
    left = {
        section: {
            name: setting for name, setting in value.items() if f"{section}.{name}" not in keys
        }
        if isinstance(value, dict)
        else value
        for section, value in recipe.items()
        if section not in keys
    }
    return json.dumps(left, sort_keys=True, default=str)


def dense_twin(runs: Runs, found: Sequence[Runs]) -> Runs | None:
    """Return which of these is the same but for the masks, and has none; None for a dense one."""
    if runs.is_dense or not runs.recipe:
        return None
    own = without(runs.recipe, "masks", "regrow")
    return next((other for other in found if other.is_dense and without(other.recipe) == own), None)


def families(found: Sequence[Runs], vary: str | None) -> list[list[Runs]]:
    """Group experiments whose recipes differ in one setting alone, by its size; without one, each is alone.

    >>> runs = [Runs(rate, {"lr": float(rate)}, *[[]] * 5, steps=9) for rate in ("1e-1", "0.05", "1e-3")]
    >>> [[member.name for member in members] for members in families(runs, "lr")]
    [['1e-3', '0.05', '1e-1']]
    """
    groups: dict[str, list[Runs]] = {}
    for place, runs in enumerate(found):
        alike = without(runs.recipe, vary) if vary and runs.setting(vary) else f"alone {place}"
        groups.setdefault(alike, []).append(runs)
    return [
        sorted(
            members,
            key=lambda runs: (as_number(runs.setting(vary or "")), runs.setting(vary or "")),
        )
        for members in groups.values()
    ]


def as_number(text: str) -> float:
    """Return the number that a text is, infinity for other texts."""
    try:
        return float(text)
    except ValueError:
        return math.inf


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, without folders that hold no finished run; return 1 where none does."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs", type=Path, nargs="+", help="folders that hold seed<k>/ runs of one recipe each"
    )
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help="draw them too: .png, .svg or .pdf"
    )
    parser.add_argument(
        "--vary",
        metavar="KEY",
        help="a setting, such as regrow.every, to join by a line what it varies",
    )
    parser.add_argument(
        "--names", nargs="+", metavar="NAME", help="what the picture calls them, in its order"
    )
    options = parser.parse_args(argv)
    if (options.vary or options.names) and not options.picture:
        parser.error("--vary and --names are of the picture; add --picture FILE, or leave them out")
    found = []
    for folder in {folder.resolve(): folder for folder in options.runs}.values():
        try:
            found.append(read(folder))
        except RunError as error:
            print(f"left out: {error}", file=sys.stderr)
    if not found:
        return 1
    for line in (
        HEADER,
        ("---",) * len(HEADER),
        *(runs.row(dense_twin(runs, found)) for runs in found),
    ):
        print(f"| {' | '.join(line)} |")
    if not options.picture:
        return 0
    try:
        from . import (
            comparison_figure as side_by_side,  # needs matplotlib, which the table does without
        )

        side_by_side.draw(
            families(found, options.vary), options.picture, options.vary, options.names
        )
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (OSError, ValueError) as error:
        print(f"error: {options.picture} can't be written: {error}", file=sys.stderr)
        return 1
    return 0
