"""How pictures look: colours for every eye, lines that differ in print, a white ground."""

import io
from collections.abc import Sized
from contextlib import AbstractContextManager
from typing import Any, Literal

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

# The palette of Okabe and Ito, which colour-blind readers can tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK = COLORS
GREY, PALE = "#666666", "#E4E4E4"
MARKERS = "osD^vP*X<>"
LINES: tuple[Any, ...] = (
    *("-", "--", "-.", ":"),
    *((0, (6, 1, 1, 1)), (0, (1, 1)), (0, (4, 1, 1, 1, 1, 1))),
)
SHADES: Colormap = LinearSegmentedColormap.from_list("shades", ["#F1EFE8", "#7FA8C9", "#0B2545"])
"""From nothing to all, ever darker: it reads in grey too."""
HALF, WIDE = 5.2, 10.6
"""Inches: of a picture beside another, and of one alone."""
SETTINGS = {
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.edgecolor": GREY,
    "grid.color": PALE,
    "lines.linewidth": 1.9,
    "lines.markersize": 5.5,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "text.parse_math": False,  # a $ in the name of a layer is a $
}


def look() -> AbstractContextManager[None]:
    """Open a context with these settings, whatever the machine's own are."""
    return matplotlib.style.context(["default", SETTINGS])


def panels(
    across: int = 1, down: int = 1, width: float = HALF, height: float = 3.6, **settings: Any
) -> tuple[Figure, list[Axes]]:
    """Create a figure, without pyplot, and its axes row by row."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(np.ravel(figure.subplots(down, across, **settings)))


def steps_below(axes: Axes, last: float) -> None:
    """Label the lower axis with optimizer steps, from 0 to the last."""
    axes.set(xlabel="optimizer steps")
    from_zero(axes, max(1.0, last) * 1.02)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def from_zero(axes: Axes, end: float) -> None:
    """Begin the lower axis at 0, with thousands set apart."""
    axes.set(xlim=(0, end))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def logarithmic(axes: Axes, which: Literal["x", "y"]) -> None:
    """Make an axis logarithmic, with its numbers written out."""
    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0,) if high > 100 * low else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")
    )
    axis.set_minor_formatter(NullFormatter())


def marked(values: Sized) -> dict[str, Any]:
    """Choose a marker for the points of a short line, so that a single one is seen."""
    return {"marker": "o" if len(values) <= 30 else ""}


def legend_below(figure: Figure, columns: int = 2) -> None:
    """Put the legend under the picture, where it covers nothing."""
    figure.legend(loc="outside lower center", ncols=columns, handlelength=2.6, columnspacing=1.4)


def thinned(count: int, most: int) -> range:
    """Choose every k-th of so many labels, so that at most so many are drawn.

    >>> list(thinned(5, 5)), list(thinned(300, 4))
    ([0, 1, 2, 3, 4], [0, 75, 150, 225])
    """
    return range(0, count, max(1, -(-count // most)))


def png(figure: Figure) -> bytes:
    """Render a figure as a PNG, sharp on a fine screen and on paper."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
    return buffer.getvalue()
