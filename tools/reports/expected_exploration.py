"""Compare the R_s of a run with the R_s that random growth should reach.

  python tools/expected_exploration.py runs/*set-itop*

At density d and rate r an update prunes the share d * r of a layer's weights. As many grow, drawn
from the inactive share 1 - d + d * r. An update thus finds the fraction d * r / (1 - d + d * r) of
the weights that were never active. After all updates

    R_s = 1 - (1 - d) * product of (1 - d * r / (1 - d + d * r)).

What is trained or pruned in between does not matter.
"""

import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from ..run_folder import history
from ..run_folder.folder import RunError, in_a_line
from ..run_folder.labels import counted
from .report import parse_runs


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line for each run; return 1 if one was left out."""
    status = 0
    for folder in parse_runs(argv, __doc__):
        try:
            print(summary_line(folder))
        except RunError as error:
            print(f"left out: {in_a_line(error)}", file=sys.stderr)
            status = 1
    return status


def explored(density: float, rates: Iterable[float]) -> float:
    """Compute the share of a layer that random growth should explore by updates at these rates.

    >>> explored(0.5, [])
    0.5
    >>> explored(0.5, [0.5, 0.5])  # 0.25 grow of 0.75 inactive weights: a third, twice
    0.7777777777777777
    """
    if density == 1:
        return 1.0
    found = [density * rate / (1 - density + density * rate) for rate in rates]
    return 1 - (1 - density) * math.prod(1 - share for share in found)


def summary_line(folder: Path) -> str:
    """Compare the R_s of a run with the expected one, in a line.

    Raises:
        RunError: There is no run, its masks do not move, or the formula does not apply to them.
    """
    found = history.read_history(folder)
    masks, regrow = found.masks, found.recipe.get("regrow") or {}
    if masks is None or not masks.updates:
        raise RunError(f"{folder} has made no update of masks, or has no layers.jsonl")
    if masks.updates_before:
        raise RunError(
            f"{folder} has lost the first {masks.updates_before} updates of layers.jsonl"
        )
    if regrow.get("grow", "random") != "random" or (masks.active != masks.active[0]).any():
        raise RunError(
            f"{folder} does not grow at random at constant density, which the expected R_s is for"
        )

    densities = masks.active[0] / masks.weights
    by_layer = np.array([explored(density, masks.rates) for density in densities])
    expected = float(by_layer @ masks.weights / masks.weights.sum())
    measured = float(masks.explored[-1].sum() / masks.weights.sum())
    return (
        f"{folder}: R_s {measured:.4f} after {counted(masks.updates, 'update')}, "
        f"{found.end:,.0f} steps; expected {expected:.4f} ({measured / expected - 1:+.2%})"
    )
