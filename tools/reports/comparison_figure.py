"""The figure of several experiments: accuracy against R_s and against the cost of training."""

import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patheffects import withStroke

from ..run_folder.folder import RunError
from . import style
from .comparison import Runs

WIDTH = 13.0
"""Inches: of a slide."""


def explored_of(runs: Runs) -> float:
    """Compute the mean R_s."""
    return statistics.mean(runs.explored)


def seconds_of(runs: Runs) -> float | None:
    """Compute the mean seconds of training; None if no run tells."""
    return statistics.mean(runs.seconds) if runs.seconds else None


COURSE = "course"
"""The panel of a line in time for each run."""
PANELS: dict[str, tuple[str, str, Callable[[Runs], float | None]]] = {
    "R_s": ("Against exploration", "R_s, share of weights explored", explored_of),
    "FLOPs": (
        "Against FLOPs",
        "training FLOPs, in steps of dense training",
        lambda runs: runs.dense_steps,
    ),
    "steps": ("Against steps", "training steps", lambda runs: runs.steps),
    "seconds": ("Against time", "training time, s", seconds_of),
    COURSE: ("Held-out images, test images at the end", "training time, s", seconds_of),
}
"""Title and label of each panel, and the position of an experiment on its lower axis."""


def draw(
    groups: Sequence[Sequence[Runs]],
    path: Path,
    vary: str | None,
    names: Sequence[str] | None,
    against: Sequence[str] | None = None,
) -> None:
    """Draw each experiment as a point with its deviation; a line joins those of a group.

    Args:
        groups: The experiments.
        path: The file; its ending decides the format.
        vary: The setting in which the experiments of a group differ; its value stands beside each.
        names: The names of the groups, in their order; None takes them from the folders.
        against: Keys of `PANELS`; None shows R_s, FLOPs and steps.

    Raises:
        RunError: The number of names is not that of the groups, or no recipe has the setting.
        OSError, ValueError: The file can't be written.
    """
    own = labels([[runs.name for runs in members] for members in groups])
    if names and len(names) != len(groups):
        raise RunError(
            f"--names gives {len(names)} for {len(groups)} experiments, in their order: "
            f"{'; '.join(own)}"
        )
    if vary and not any(runs.setting(vary) for members in groups for runs in members):
        raise RunError(
            f"--vary is {vary}, which no recipe of these has; give a setting such as regrow.every"
        )

    names = names or own
    columns = max(1, min(len(names), int(WIDTH / (0.75 + 0.09 * max(map(len, names))))))
    rows = -(-len(names) // columns)
    with style.look():
        shown = against or ("R_s", "FLOPs", "steps")
        height = 4.6 + 0.25 * rows
        figure, axes = style.panels(len(shown), width=WIDTH, height=height, sharey=True)
        for axis, key in zip(axes, shown, strict=True):
            title, label, position = PANELS[key]
            for place, (members, name) in enumerate(zip(groups, names, strict=True)):
                if key == COURSE:
                    draw_courses(axis, members, place)
                draw_group(axis, members, position, place, name)
            axis.set(title=title, xlabel=label)
            if key == "R_s":
                axis.set(xlim=(-0.03, 1.04))
            else:
                scale(axis, may_be_logarithmic=key != COURSE)

        axes[0].set(ylabel="test top-1, %")
        if vary:
            write_values(axes[0], PANELS[shown[0]][2], groups, vary)

        handles, texts = axes[0].get_legend_handles_labels()
        beside = f"beside the points: {vary}" if vary else None
        place_below: dict[str, Any] = {
            "loc": "outside lower center",
            "ncols": columns,
            "handlelength": 3,
        }
        figure.legend(handles, texts, title=beside, **place_below)
        figure.suptitle(title_of(groups), x=0.01, horizontalalignment="left")
        figure.savefig(path, dpi=150)


def draw_group(
    axis: Axes,
    members: Sequence[Runs],
    position: Callable[[Runs], float | None],
    place: int,
    name: str,
) -> None:
    """Draw the points of a group, and a level to reach through each dense one."""
    xs, heights, errors = [], [], []
    for runs in members:
        x = position(runs)
        if x is not None:
            xs.append(x)
            heights.append(statistics.mean(runs.top1))
            errors.append(statistics.stdev(runs.top1) if len(runs.top1) > 1 else 0.0)
    if not xs:
        return

    color = style.COLORS[place % len(style.COLORS)]
    marker = style.MARKERS[place % len(style.MARKERS)]
    line = ""
    if len(members) > 1 and (position is explored_of or max(xs) > 1.5 * min(xs)):
        line = style.LINES[place % len(style.LINES)]  # at one cost it would run straight up
    axis.errorbar(xs, heights, errors, fmt="none", ecolor=color, elinewidth=1.3, capsize=3)
    edge: dict[str, Any] = {"markersize": 8, "markeredgecolor": "white", "markeredgewidth": 0.4}
    axis.plot(xs, heights, linestyle=line, color=color, marker=marker, label=name, **edge)

    # A line of dense points is its own reference against a cost.
    if members[0].is_dense and (not line or position is explored_of):
        for height in heights:
            axis.axhline(height, color=color, linewidth=1.0, linestyle=(0, (1, 3)), zorder=0.9)


def draw_courses(axis: Axes, members: Sequence[Runs], place: int) -> None:
    """Draw the accuracy on held-out images after each epoch, a line for each run."""
    color = style.COLORS[place % len(style.COLORS)]
    for runs in members:
        for course in runs.courses:
            times, heights = zip(*course, strict=True)
            axis.plot(times, heights, color=color, marker=".", linewidth=1.3, markersize=4)


def title_of(groups: Sequence[Sequence[Runs]]) -> str:
    """Name what is compared: model and images if all share them, and what the bars mean."""
    found = [runs for members in groups for runs in members]
    subjects = {runs.subject for runs in found}
    start = f"{subjects.pop()}: test" if len(subjects) == 1 and subjects != {""} else "Test"
    has_bars = any(len(runs.top1) > 1 for runs in found)
    return f"{start} accuracy{', mean ± deviation over seeds' if has_bars else ''}"


def scale(axis: Axes, may_be_logarithmic: bool = True) -> None:
    """Begin an axis of costs at 0, or make it logarithmic where they differ much.

    If nobody counted them, the panel says so.
    """
    if not axis.lines:
        axis.text(0.5, 0.5, "not counted", transform=axis.transAxes, ha="center", color=style.GREY)
        axis.set(xticks=[])
        return

    low, high = axis.dataLim.intervalx
    if may_be_logarithmic and high > 5 * low:  # any such span holds two of 1, 2, 5, 10, ...
        style.logarithmic(axis, "x")
    else:
        style.from_zero(axis, 1.15 * high)


def write_values(
    axis: Axes,
    position: Callable[[Runs], float | None],
    groups: Sequence[Sequence[Runs]],
    vary: str,
) -> None:
    """Write the value that varies beside each point: above the higher lines, below the lower."""
    means = {}
    for place, members in enumerate(groups):
        if members[0].setting(vary):
            means[place] = statistics.mean(statistics.mean(runs.top1) for runs in members)
    middle = statistics.median(means.values())

    for place, mean in means.items():
        dark = [0.7 * part for part in to_rgb(style.COLORS[place % len(style.COLORS)])]
        offset, align = ((-6, 5), "right") if mean >= middle else ((6, -11), "left")
        for runs in groups[place]:
            x = position(runs)
            if x is None:
                continue
            text = axis.annotate(
                runs.setting(vary),
                (x, statistics.mean(runs.top1)),
                offset,
                textcoords="offset points",
                horizontalalignment=align,
                fontsize=8,
                color=dark,
            )
            text.set_path_effects([withStroke(linewidth=2, foreground="white")])


def labels(groups: Sequence[Sequence[str]]) -> list[str]:
    """Name groups of folders by what the folders of each share and not all groups share.

    >>> labels([["net_erk98_set", "net_erk98_set-multiplier=5"], ["net_erk98_set-lr=1"]])
    ['set', 'set, lr=1']
    >>> labels([["net_dense_x1", "net_dense_x5"], ["net_erk95_set_x1", "net_erk95_set_x5"]])
    ['dense', 'erk95_set']
    """
    stems: list[list[str]] = []
    overrides: list[list[str]] = []
    for members in groups:
        split = [re.split(r"-(?=[A-Za-z_.]+=)", name) for name in members]
        all_words = [parts[0].split("_") for parts in split]
        stems.append(common(all_words) or all_words[0])
        overrides.append(common([parts[1:] for parts in split]))
    shared_words = common(stems) if len(groups) > 1 else []
    shared_overrides = common(overrides) if len(groups) > 1 else []

    found = []
    for stem, override in zip(stems, overrides, strict=True):
        words = [word for word in stem[:-1] if word not in shared_words]
        name = "_".join([*words, stem[-1]])
        found.append(", ".join([name, *(one for one in override if one not in shared_overrides)]))
    if len(set(found)) < len(found):
        return [members[0] for members in groups]
    return found


def common(lists: Sequence[list[str]]) -> list[str]:
    """Find the words of every list, in the order of the first."""
    return [word for word in lists[0] if all(word in other for other in lists)]
