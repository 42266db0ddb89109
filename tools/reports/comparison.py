r"""Compare finished runs: mean and spread over their seeds, as a Markdown table and a figure.

  itop-prune compare runs/fashion_mnist_* --picture compare.png
  itop-prune compare runs/*set-itop* runs/*dense* --vary multiplier \
      --picture compare.png --names SET-ITOP dense

The figure shows test accuracy against R_s, as in the paper, and against the cost of the training in
FLOPs and in steps; --against seconds takes the time of the training. A line joins experiments whose
recipes differ in the settings of --vary alone. The first of them stands beside each point.
--against course shows the accuracy on held-out images in the course of each run.
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
from ..run_folder.labels import subject
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
    "seconds",
)

PANELS = ("R_s", "FLOPs", "steps", "seconds", "course")
"""What the figure can show accuracy against."""


@dataclass(frozen=True)
class Runs:
    """The finished seeds of one experiment; each list has a number per seed."""

    name: str
    recipe: dict[str, Any]
    """The settings that decide the numbers, without the seed; {} if unknown."""
    subject: str
    """Model and images; "" if unknown."""
    top1: list[float]
    """Test accuracy in percent."""
    explored: list[float]
    """R_s at the end."""
    survival: list[float]
    """The share of grown weights that survived the next update, mean over epochs; or []."""
    sparsities: list[float]
    """Every sparsity that an epoch of any seed had, each once, in the order of the run."""
    train_flops: list[float]
    """Of the training, as a share of dense training of as many steps; or []."""
    steps: int
    seconds: list[float]
    """Of the training, without evaluation and checkpoints; or []."""
    courses: list[list[tuple[float, float]]]
    """Of each seed, by epoch: seconds of training, and accuracy on held-out images; or []."""

    @property
    def dense_steps(self) -> float | None:
        """The number of steps of dense training that cost the same FLOPs."""
        return self.steps * statistics.mean(self.train_flops) if self.train_flops else None

    @property
    def is_dense(self) -> bool:
        """Whether it was trained without masks."""
        return bool(self.recipe) and "masks" not in self.recipe

    def setting(self, key: str) -> str:
        """Look up a setting such as "regrow.every" in the recipe; "" if it is not there."""
        section, _, name = key.partition(".")
        value = self.recipe.get(section)
        if name:
            value = value.get(name) if isinstance(value, dict) else None
        return "" if value is None else str(value)

    def row(self, dense: "Runs | None" = None) -> tuple[str, ...]:
        """Format a row of the table, with the difference to the dense twin if there is one."""
        to_dense = ""
        if dense:
            difference = statistics.mean(self.top1) - statistics.mean(dense.top1)
            to_dense = f"{difference:+.2f}".replace("-", "−")
        sparsities = [f"{value:.4f}" for value in self.sparsities]
        if len(sparsities) > 2:
            sparsities = [f"{sparsities[0]} to {sparsities[-1]}"]
        return (
            self.name,
            str(len(self.top1)),
            spread(self.top1, 2),
            to_dense,
            " ".join(f"{value:.2f}" for value in self.top1),
            f"{statistics.mean(self.explored):.3f}",
            f"{statistics.mean(self.survival):.3f}" if self.survival else "",
            " ".join(sparsities),
            f"{statistics.mean(self.train_flops):.3f}" if self.train_flops else "",
            f"{self.steps:,}",
            f"{statistics.mean(self.seconds):.0f}" if self.seconds else "",
        )


def spread(values: Sequence[float], digits: int) -> str:
    """Format mean ± sample standard deviation; the mean alone for one value.

    >>> spread([1.0, 2.0, 3.0], 1)
    '2.0 ± 1.0'
    """
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def read(folder: Path, seeds: Sequence[Path] = ()) -> Runs:
    """Read one experiment: all seed<k> runs of a folder, or these.

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
    survival = []
    for lines in epochs:
        rates = [line["survival"] for line in lines if "survival" in line]
        if rates:
            survival.append(statistics.mean(rates))
    recipe, about = recipe_of(finished[0])
    return Runs(
        name=folder.name,
        recipe=recipe,
        subject=about,
        top1=[test["test_top1"] for test in tests],
        explored=[lines[-1]["exploration_rate"] for lines in epochs],
        survival=survival,
        sparsities=list(dict.fromkeys(line["sparsity"] for lines in epochs for line in lines)),
        train_flops=[lines[-1]["train_flops"] for lines in epochs if "train_flops" in lines[-1]],
        steps=tests[0]["step"],
        seconds=[lines[-1]["seconds"] for lines in epochs if "seconds" in lines[-1]],
        courses=[
            [(line["seconds"], line["val_top1"]) for line in lines]
            for lines in epochs
            if all({"seconds", "val_top1"} <= line.keys() for line in lines)
        ],
    )


def recipe_of(run: Path) -> tuple[dict[str, Any], str]:
    """Read the settings that decided a run's numbers, without the seed, and name its subject.

    {} and "" if the recipe is unreadable.
    """
    try:
        recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
        settings = {key: value for key, value in decisive(recipe).items() if key != "seed"}
        return settings, subject(recipe)
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        return {}, ""


def without(recipe: dict[str, Any], *keys: str) -> str:
    """Write a recipe without sections or settings, as a text that equal recipes share.

    >>> without({"regrow": {"every": 9, "grow": "random"}, "epochs": 2}, "regrow.every", "epochs")
    '{"regrow": {"grow": "random"}}'
    """
    left = {}
    for section, value in recipe.items():
        if section in keys:
            continue
        if isinstance(value, dict):
            value = {name: value[name] for name in value if f"{section}.{name}" not in keys}
        left[section] = value
    return json.dumps(left, sort_keys=True, default=str)


def dense_twin(runs: Runs, found: Sequence[Runs]) -> Runs | None:
    """Find the dense experiment whose recipe is the same without masks; None for a dense one."""
    if runs.is_dense or not runs.recipe:
        return None
    own = without(runs.recipe, "masks", "regrow")
    for other in found:
        if other.is_dense and without(other.recipe) == own:
            return other
    return None


def families(found: Sequence[Runs], vary: Sequence[str]) -> list[list[Runs]]:
    """Group experiments whose recipes differ in some settings alone, in the order of the first.

    Without settings each experiment is a group.

    >>> rates = ("1e-1", "0.05", "1e-3")
    >>> runs = [Runs(rate, {"lr": float(rate)}, "", *[[]] * 5, 9, [], []) for rate in rates]
    >>> [[member.name for member in members] for members in families(runs, ["lr"])]
    [['1e-3', '0.05', '1e-1']]
    """
    if not vary:
        return [[runs] for runs in found]

    groups: dict[str, list[Runs]] = {}
    for place, runs in enumerate(found):
        key = without(runs.recipe, *vary) if runs.setting(vary[0]) else f"alone {place}"
        groups.setdefault(key, []).append(runs)
    for members in groups.values():
        members.sort(key=lambda runs: (as_number(runs.setting(vary[0])), runs.setting(vary[0])))
    return list(groups.values())


def as_number(text: str) -> float:
    """Convert a text to a number, or to infinity if it is none."""
    try:
        return float(text)
    except ValueError:
        return math.inf


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table of the finished runs, and draw them; return 1 if none is finished."""
    options = parse(argv)
    found = []
    for folder in {folder.resolve(): folder for folder in options.runs}.values():
        try:
            found.append(read(folder))
        except RunError as error:
            print(f"left out: {error}", file=sys.stderr)
    if not found:
        return 1

    rows = [HEADER, ("---",) * len(HEADER), *(runs.row(dense_twin(runs, found)) for runs in found)]
    for row in rows:
        print(f"| {' | '.join(row)} |")
    if not options.picture:
        return 0

    try:
        from .comparison_figure import draw  # needs matplotlib, which the table does without

        groups = families(found, options.vary)
        draw(
            groups, options.picture, next(iter(options.vary), None), options.names, options.against
        )
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (OSError, ValueError) as error:
        print(f"error: {options.picture} can't be written: {error}", file=sys.stderr)
        return 1
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs", type=Path, nargs="+", help="folders that hold seed<k>/ runs of one recipe each"
    )
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help="draw a figure too: .png, .svg or .pdf"
    )
    parser.add_argument(
        "--vary",
        nargs="+",
        default=[],
        metavar="KEY",
        help="join experiments that differ in these settings alone: epochs regrow.every",
    )
    parser.add_argument(
        "--names", nargs="+", metavar="NAME", help="name the experiments of the figure, in order"
    )
    parser.add_argument(
        "--against",
        nargs="+",
        choices=PANELS,
        help="the panels of the figure; R_s, FLOPs and steps unless given",
    )
    options = parser.parse_args(argv)
    if (options.vary or options.names or options.against) and not options.picture:
        parser.error(
            "--vary, --names and --against are of the picture; add --picture FILE, "
            "or leave them out"
        )
    return options
