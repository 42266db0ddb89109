#!/usr/bin/env python
"""Put finished runs side by side: mean and spread over their seeds, as a Markdown table and a picture.

  python tools/compare.py runs/fashion_mnist_* --picture compare.png
  python tools/compare.py runs/*every=* --vary regrow.every --picture interval.png

The picture has the paper's figure, test accuracy against R_s, and beside it accuracy against the cost of the training,
in FLOPs and in steps. Experiments that differ in what --vary names, and in nothing else, are joined by a line.
"""

import argparse
import math
import os
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metrics import Metrics
from runs import RunError

PLACES: tuple[Callable[["Runs"], float | None], ...] = (
    lambda runs: statistics.mean(runs.explored),
    lambda runs: runs.dense_steps,
    lambda runs: runs.steps,
)
HEADER = ("run", "seeds", "test top-1", "each seed", "R_s", "survival", "sparsity", "train FLOPs", "steps")


@dataclass(frozen=True)
class Runs:
    """The finished seeds of one experiment."""

    name: str
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

    def row(self) -> tuple[str, ...]:
        """Return a line of the table."""
        shown = [f"{value:.4f}" for value in self.sparsities]
        return (
            self.name,
            str(len(self.top1)),
            spread(self.top1, 2),
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
    found = seeds or sorted(folder.glob("seed*"))
    finished = [lines for seed in found if len(lines := Metrics(seed).read()) > 1 and "test_top1" in lines[-1]]
    if not finished:
        raise RunError(f"{folder} holds no finished run; give folders of seed<k>/, such as runs/quickstart")
    epochs = [lines[-2] for lines in finished]
    counted = [[line["survival"] for line in lines[:-1] if "survival" in line] for lines in finished]
    return Runs(
        name=folder.name,
        top1=[lines[-1]["test_top1"] for lines in finished],
        explored=[last["exploration_rate"] for last in epochs],
        survival=[statistics.mean(rates) for rates in counted if rates],
        sparsities=list(dict.fromkeys(line["sparsity"] for lines in finished for line in lines[:-1])),
        train_flops=[last["train_flops"] for last in epochs if "train_flops" in last],
        steps=finished[0][-1]["step"],
    )


def families(found: Sequence[Runs], vary: str | None) -> dict[str, list[tuple[str, Runs]]]:
    """Group experiments whose names differ in one override alone; each comes with its value of that one, by its size.

    >>> runs = [Runs(f"set-lr={rate}-every=9", *[[]] * 5, steps=9) for rate in ("1e-1", "0.05", "1e-3")]
    >>> {name: [value for value, _ in members] for name, members in families(runs, "lr").items()}
    {'set-every=9': ['1e-3', '0.05', '1e-1']}
    """
    groups: dict[str, list[tuple[str, Runs]]] = {}
    for runs in found:
        override = re.search(rf"-{re.escape(vary)}=(.*?)(?=-[A-Za-z_.]+=|$)", runs.name) if vary else None
        name = runs.name.replace(override[0], "") if override else runs.name
        groups.setdefault(name, []).append((override[1] if override else "", runs))
    return {
        name: sorted(members, key=lambda member: (as_number(member[0]), member[0])) for name, members in groups.items()
    }


def as_number(text: str) -> float:
    """Return the number that a text is, infinity for other texts."""
    try:
        return float(text)
    except ValueError:
        return math.inf


def draw(found: Sequence[Runs], path: Path, vary: str | None = None) -> None:
    """Draw accuracy against R_s, FLOPs and steps: a point an experiment, with the deviation over its seeds.

    Args:
        found: What to draw.
        path: Where to; the ending says what kind of file.
        vary: An override, such as "regrow.every": points that differ in it alone are joined, its value beside them.
    """
    import style  # needs matplotlib, which the table does without

    groups = families(found, vary)
    prefix = os.path.commonprefix(list(groups))  # noqa: RUF071  (letter by letter is meant)
    shared = prefix.rfind("_") + 1
    with style.look():
        figure, axes = style.panels(3, sharey=True, width=14, height=max(4.5, 0.24 * len(groups)))
        for place, (name, members) in enumerate(groups.items()):
            look: dict[str, Any] = {"color": style.COLORS[place % len(style.COLORS)]}
            look |= {"marker": style.MARKERS[place % len(style.MARKERS)], "label": name[shared:]}
            for axis, place_of in zip(axes, PLACES, strict=True):
                points = [(x, value, runs) for value, runs in members if (x := place_of(runs)) is not None]
                heights = [statistics.mean(runs.top1) for _, _, runs in points]
                errors = [statistics.stdev(runs.top1) if len(runs.top1) > 1 else 0.0 for _, _, runs in points]
                line = "" if axis is not axes[0] else style.LINES[place % len(style.LINES)]
                if points:
                    axis.errorbar([x for x, _, _ in points], heights, errors, capsize=3, linestyle=line, **look)
                for (x, value, _), height in zip(points, heights, strict=True) if axis is axes[0] else ():
                    axis.annotate(value, (x, height), (4, 4), textcoords="offset points", fontsize=8)
        axes[0].set(xlabel="R_s, share of weights explored", ylabel="test top-1, %")
        axes[1].set(xlabel="training FLOPs, in steps of dense training")
        axes[2].set(xlabel="training steps")
        for axis in axes[1:]:
            style.logarithmic(axis, "x")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper")
        figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, without folders that hold no finished run; return 1 where none does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders that hold seed<k>/ runs of one recipe each")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw them too: .png, .svg or .pdf")
    parser.add_argument(
        "--vary", metavar="KEY", help="an override, such as regrow.every, to join by a line what it varies"
    )
    options = parser.parse_args(argv)
    found = []
    for folder in options.runs:
        try:
            found.append(read(folder))
        except RunError as error:
            print(f"left out: {error}", file=sys.stderr)
    if not found:
        return 1
    for line in (HEADER, ("---",) * len(HEADER), *(runs.row() for runs in found)):
        print(f"| {' | '.join(line)} |")
    if options.picture:
        try:
            draw(found, options.picture, options.vary)
        except (OSError, ValueError) as error:
            print(f"error: {options.picture} can't be written: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
