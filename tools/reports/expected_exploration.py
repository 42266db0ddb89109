"""Say how much random growth has explored, beside what the settings of a run foretell.

  python tools/expected.py runs/*set-itop*

Of a layer with density d, an update at rate r lets d * r of the weights leave, and as many are
drawn among those that are then inactive, 1 - d + d * r. So of what was never active a share d * r /
(1 - d + d * r) is found, and at the end R_s is 1 - (1 - d) * prod(1 - d * r / (1 - d + d * r)):
whatever is trained in between, and whatever is pruned.
"""

import argparse
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from ..run_folder import history
from ..run_folder.folder import RunError, in_a_line
from ..run_folder.labels import counted


def explored(density: float, rates: Iterable[float]) -> float:
    """Return the share of a layer that random growth is expected to explore by updates at these rates.

    >>> explored(0.5, [])
    0.5
    >>> explored(0.5, [0.5, 0.5])  # of 0.75 inactive weights 0.25 grow: a third of the unexplored, twice
    0.7777777777777777
    """
    if density == 1:
        return 1.0
    found = (density * rate / (1 - density + density * rate) for rate in rates)
    return 1 - (1 - density) * math.prod(1 - share for share in found)


def in_words(folder: Path) -> str:
    """Return the R_s of a run beside the expected one, in a line.

    Raises:
        RunError: There is none: no run, masks that do not move, or the formula is not for them.
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
        f"{folder}: R_s {measured:.4f} after {counted(masks.updates, 'update')}, {found.end:,.0f} steps; "
        f"expected {expected:.4f} ({measured / expected - 1:+.2%})"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line for each run; return 1 where there is none for one of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="a run folder, or one that holds seed<k>/ runs",
    )
    status = 0
    for folder in history.folders(parser.parse_args(argv).runs):
        try:
            print(in_words(folder))
        except RunError as error:
            print(f"left out: {in_a_line(error)}", file=sys.stderr)
            status = 1
    return status
