"""Figures of sparse training: the time of a step, dense and sparse, and how both grow."""

from collections.abc import Iterable
from pathlib import Path

from matplotlib.axes import Axes

from ..reports import style
from .measure import Row
from .never_dense import EXPONENTS, Cost, name_of
from .sparse_training import CASES, MLP, VIT, title

SHARE = 0.27
"""Width of a bar, of the distance between two sparsities."""
CORES = 1
SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹"


def draw(rows: Iterable[Row], path: Path) -> None:
    """Draw the steps of the MLP and of the ViT on one core as bars.

    Args:
        rows: All rows of the benchmark; others do not count.
        path: The file; its ending decides the format.

    Raises:
        OSError, ValueError: The file can't be written.
    """
    found = {row.name: row for row in rows}
    with style.look():
        figure, axes = style.panels(2, width=style.WIDE, height=4.0)
        for axis, case in zip(axes, (MLP, VIT), strict=True):
            draw_case(axis, case, found)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        figure.savefig(path, dpi=160)


def draw_case(axis: Axes, case: str, found: dict[str, Row]) -> None:
    """Draw one network: three bars for each sparsity."""
    sparsities = list(CASES[case].targets[CORES])
    rows = [found[title(case, sparsity, CORES)] for sparsity in sparsities]
    kinds = {
        "dense": (style.GREY, [row.other or 0.0 for row in rows]),
        "with masks": (style.SKY, [row.masked or 0.0 for row in rows]),
        "sparse storage": (style.VERMILLION, [row.ours for row in rows]),
    }
    for place, (label, (color, heights)) in enumerate(kinds.items()):
        positions = [at + SHARE * (place - 1) for at in range(len(rows))]
        bars = axis.bar(positions, heights, SHARE, color=color, label=label)
    axis.bar_label(bars, [f"{row.ratio:.2g} ×" for row in rows], padding=2)

    labels = [f"{100 * sparsity:g} %" for sparsity in sparsities]
    axis.set_xticks(range(len(rows)), labels)
    axis.set(title=case, ylabel="training step, ms", xlabel="sparsity")
    axis.grid(visible=False, axis="x")


def draw_scale(rows: Iterable[Row], path: Path) -> None:
    """Draw the nanoseconds of steps and updates for an active weight, over their number.

    It takes and raises what `draw` does.
    """
    found = {row.name: row for row in rows}
    with style.look():
        figure, axes = style.panels(2, width=style.WIDE, height=3.4)
        for axis, what in zip(axes, Cost._fields, strict=True):
            costs = [found[name_of(what, exponent)].ours for exponent in EXPONENTS]
            axis.plot(EXPONENTS, costs, "o-", color=style.VERMILLION)
            axis.set(ylim=(0, 1.15 * max(costs)), title=f"One {what}")
            axis.set_xticks(EXPONENTS, [f"10{SUPERSCRIPTS[exponent]}" for exponent in EXPONENTS])
            axis.set(xlabel="active weights of the layer", ylabel="ns for an active weight")
        figure.savefig(path, dpi=160)
