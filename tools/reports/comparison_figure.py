"""The picture of several experiments: accuracy against R_s, against the FLOPs and against the steps of the training."""

import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from ..run_folder.folder import RunError
from . import style
from .comparison import Runs

Position = Callable[[Runs], float | None]

PANELS: tuple[tuple[str, Position], ...] = (
    ("R_s, share of weights explored", lambda runs: statistics.mean(runs.explored)),
    ("training FLOPs, in steps of dense training", lambda runs: runs.dense_steps),
    ("training steps", lambda runs: runs.steps),
)
WIDTH = 13.0
"""Inches: of a slide."""
PLACES = (
    (7, 5),
    (7, -12),
    (-7, 5),
    (-7, -12),
    (0, 9),
    (0, -17),
    (13, -4),
    (-13, -4),
    (7, 17),
    (-7, 17),
    (7, -24),
)
"""Where the value of a point may stand beside it, in points, the best first."""


def draw(
    groups: Sequence[Sequence[Runs]], path: Path, vary: str | None, names: Sequence[str] | None
) -> None:
    """Draw a point for each experiment, with the deviation over its seeds; those of a group are joined by a line.

    Args:
        groups: What to draw.
        path: Where to; the ending says what kind of file.
        vary: The setting in which the experiments of a group differ; its value stands beside each.
        names: What the groups are called, in their order; None for what tells their folders apart.

    Raises:
        RunError: There are more names than groups, or fewer; or no recipe has the setting.
        OSError, ValueError: The file can't be written.
    """
    own = labels([[runs.name for runs in members] for members in groups])
    if names and len(names) != len(groups):
        raise RunError(
            f"--names gives {len(names)} for {len(groups)} experiments, in their order: {'; '.join(own)}"
        )
    if vary and not any(runs.setting(vary) for members in groups for runs in members):
        raise RunError(
            f"--vary is {vary}, which no recipe of these has; give a setting such as regrow.every"
        )
    with style.look():
        figure, axes = style.panels(
            3, sharey=True, width=WIDTH, height=4.6 + 0.25 * rows_of(names or own)
        )
        for axis, (label, x_of) in zip(axes, PANELS, strict=True):
            for place, (members, name) in enumerate(zip(groups, names or own, strict=True)):
                draw_group(axis, members, x_of, place, name)
            axis.set(xlabel=label)
        axes[0].set(ylabel="test top-1, %", xlim=(-0.03, 1.04))
        for axis in axes[1:]:
            scale(axis)
        handles, shown = axes[0].get_legend_handles_labels()
        said = f"beside the points: {vary}" if vary else None
        columns = columns_of(names or own)
        figure.legend(
            handles, shown, loc="outside lower center", ncols=columns, title=said, handlelength=3
        )
        if vary:
            write_values(figure, axes[0], groups, vary)
        figure.savefig(path, dpi=150)


def draw_group(
    axis: Axes, members: Sequence[Runs], x_of: Callable[[Runs], float | None], place: int, name: str
) -> None:
    """Draw the points of a group; a dense one also as a level to reach."""
    points = [(x, runs) for runs in members if (x := x_of(runs)) is not None]
    if not points:
        return
    xs, heights = [x for x, _ in points], [statistics.mean(runs.top1) for _, runs in points]
    errors = [statistics.stdev(runs.top1) if len(runs.top1) > 1 else 0.0 for _, runs in points]
    color = style.COLORS[place % len(style.COLORS)]
    look: dict[str, Any] = {
        "color": color,
        "marker": style.MARKERS[place % len(style.MARKERS)],
        "label": name,
    }
    apart = x_of is PANELS[0][1] or max(xs) > 1.5 * min(xs)  # not straight up, at one cost
    line = style.LINES[place % len(style.LINES)] if len(members) > 1 and apart else ""
    axis.errorbar(xs, heights, errors, fmt="none", ecolor=color, elinewidth=1.3, capsize=3)
    axis.plot(
        xs,
        heights,
        linestyle=line,
        markersize=8,
        markeredgecolor="white",
        markeredgewidth=0.4,
        **look,
    )
    for height in heights if members[0].is_dense else ():
        axis.axhline(height, color=color, linewidth=1.0, linestyle=(0, (1, 3)), zorder=0.9)


def scale(axis: Axes) -> None:
    """Make an axis of costs logarithmic, also around one cost alone; say so where nobody counted any."""
    if not axis.lines:
        axis.text(0.5, 0.5, "not counted", transform=axis.transAxes, ha="center", color=style.GREY)
        return
    style.logarithmic(axis, "x")
    low, high = axis.dataLim.intervalx
    if low == high:
        axis.set_xlim(low / 2, 2 * high)


def write_values(figure: Figure, axis: Axes, groups: Sequence[Sequence[Runs]], vary: str) -> None:
    """Write beside each point what varies, in its colour, where it hides neither a point nor another value."""
    figure.draw_without_rendering()  # so that it is known where things lie
    spots = [
        (place, runs.setting(vary), (statistics.mean(runs.explored), statistics.mean(runs.top1)))
        for place, members in enumerate(groups)
        for runs in members
    ]
    centres = [axis.transData.transform(spot) for _, _, spot in spots]
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in centres]
    for place, value, spot in spots:
        color = tuple(
            0.7 * part for part in to_rgb(style.COLORS[place % len(style.COLORS)])
        )  # letters are thin
        text = axis.annotate(
            value, spot, PLACES[0], textcoords="offset points", fontsize=9, color=color
        )
        text.set_path_effects([withStroke(linewidth=2, foreground="white")])

        def hides(offset: tuple[int, int], text: Annotation = text) -> int:
            box = put(text, offset)
            return sum(box.overlaps(other) for other in taken) + (
                not axis.bbox.x0 < box.x0 < box.x1 < axis.bbox.x1
            )

        taken.append(put(text, min(PLACES, key=hides)))


def put(text: Annotation, offset: tuple[int, int]) -> Bbox:
    """Move a text beside its point; return where it lies."""
    text.set_position(offset)
    text.set_horizontalalignment(
        "left" if offset[0] > 0 else "right" if offset[0] < 0 else "center"
    )
    return text.get_window_extent()


def labels(groups: Sequence[Sequence[str]]) -> list[str]:
    """Return what tells groups of folders apart: what is common to the folders of each, without what all groups share.

    >>> labels([["mnist_net_erk98_set", "mnist_net_erk98_set-multiplier=5"], ["mnist_net_erk98_set-lr=1-multiplier=5"]])
    ['set', 'set, lr=1, multiplier=5']
    >>> labels([["cifar_net_dense_x1", "cifar_net_dense_x5"], ["cifar_net_erk95_set_x1", "cifar_net_erk95_set_x5"]])
    ['dense', 'erk95_set']
    """
    parts = []
    for members in groups:
        split = [re.split(r"-(?=[A-Za-z_.]+=)", name) for name in members]
        stems, overrides = [one[0].split("_") for one in split], [one[1:] for one in split]
        parts.append((common(stems) or stems[0], common(overrides)))
    stems_of_all, overrides_of_all = (common([part[kind] for part in parts]) for kind in (0, 1))
    many = len(parts) > 1
    found = []
    for stem, override in parts:
        kept = [word for word in stem[:-1] if not many or word not in stems_of_all] + stem[-1:]
        found.append(
            ", ".join(
                ["_".join(kept), *(o for o in override if not many or o not in overrides_of_all)]
            )
        )
    return found if len(set(found)) == len(found) else [members[0] for members in groups]


def common(lists: Sequence[Sequence[str]]) -> list[str]:
    """Return what is in every list, in the order of the first."""
    return [word for word in lists[0] if all(word in other for other in lists)]


def columns_of(names: Sequence[str]) -> int:
    """Return how many names of the legend stand side by side."""
    return max(1, min(len(names), int(WIDTH / (0.75 + 0.09 * max(map(len, names))))))


def rows_of(names: Sequence[str]) -> int:
    """Return how many lines the legend has."""
    return -(-len(names) // columns_of(names))
