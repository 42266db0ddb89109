"""Pictures of the masks, layer by layer: exploration, changes, sparsity, the first mask itself.

A figure function takes the history of a run. It returns a figure, or the sentence that stands in
its place. Many layers are drawn as bands in place of lines, and as maps in place of bars.
"""

import math
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ..run_folder.history import History, Masks, Numbers
from . import style
from .style import BLACK, BLUE, GREY, SHADES, SKY, VERMILLION, WIDE

LINES_AT_MOST = 8
BARS_AT_MOST = 40
NAMES_AT_MOST = 36
COLUMNS_AT_MOST = 600
FILTERS_AT_MOST = 256
CELLS_AT_MOST = (300, 800)
NO_LAYERS = "Nothing is known by layer: this run has no layers.jsonl."
DENSE = "No masks: a dense model."


def short(name: str, most: int = 30) -> str:
    """Shorten a weight's name: without its ending, and without its beginning if it is long.

    >>> short("layers.0.weight"), short("stages.2.blocks.17.mixer.attention.qkv.weight")
    ('layers.0', '…blocks.17.mixer.attention.qkv')
    """
    name = name.removesuffix(".weight")
    return name if len(name) <= most else f"…{name[1 - most :]}"


def masks_of(history: History, moving: bool) -> Masks | str:
    """Find the masks, or say why there are none to be drawn, or none that moved."""
    masks = history.masks
    if masks is None:
        return NO_LAYERS
    if not masks.names:
        return DENSE
    if not moving or len(masks.steps) > 1:
        return masks

    if masks.updates_before:
        return (
            f"The {masks.updates_before:,} updates of the masks were made before layers.jsonl "
            "was begun anew."
        )
    if not history.recipe.get("regrow"):
        density = history.last["exploration_rate"]
        return f"The masks are static: R_s stays at the density, {density:.4f}."
    every, steps = history.recipe["regrow"].get("every"), history.steps[-1]
    if every <= steps:
        return (
            f"No update of the masks was made in {steps:,} steps: none was due up to regrow.stop, "
            "or numbers were not finite when it was."
        )
    return (
        f"No update of the masks was made: regrow.every is {every}, "
        f"and the run has made {steps:,} steps."
    )


# --- exploration ---


def exploration(history: History) -> Figure | str:
    """Draw R_s over steps, overall and by layer."""
    masks = masks_of(history, moving=True)
    if isinstance(masks, str):
        return masks

    figure, (axes,) = style.panels()
    steps = np.append(masks.steps, history.end)
    overall = hold_last(masks.explored.sum(1) / masks.weights.sum())
    by_layer = hold_last(masks.exploration_rates)
    label = f"all layers, {overall[-1]:.3f}"
    look: dict[str, Any] = {"color": BLACK, "linewidth": 2.6}
    axes.plot(steps, overall, drawstyle="steps-post", label=label, **look)

    if len(masks.names) > LINES_AT_MOST:
        draw_bands(axes, steps, by_layer)
    else:
        for place in np.argsort(-by_layer[-1], kind="stable"):  # the legend follows the lines' ends
            label = f"{short(masks.names[place], 22)}, {by_layer[-1, place]:.3f}"
            look = {
                "color": style.COLORS[place % 6],
                "linestyle": style.LINES[place % len(style.LINES)],
                "linewidth": 1.6,
            }
            axes.plot(steps, by_layer[:, place], drawstyle="steps-post", label=label, **look)

    style.legend_below(figure)
    axes.set(ylabel="R_s, share of weights explored", ylim=(0, 1.02))
    style.steps_below(axes, history.end)
    return figure


def hold_last(values: Numbers) -> Numbers:
    """Repeat the last row: the state after the last update holds until the end of the run."""
    return np.concatenate([values, values[-1:]])


def draw_bands(
    axes: Axes, steps: Numbers, values: Numbers, kind: Literal["post"] | None = "post"
) -> None:
    """Draw many layers as two bands: the span of all and of the middle half."""
    low, lower, upper, high = np.nanquantile(values, (0.0, 0.25, 0.75, 1.0), axis=1)
    for bottom, top, color, alpha, label in (
        (low, high, SKY, 0.3, "lowest to highest layer"),
        (lower, upper, BLUE, 0.4, "middle half of layers"),
    ):
        look: dict[str, Any] = {"step": kind, "color": color, "alpha": alpha, "linewidth": 0}
        axes.fill_between(steps, bottom, top, label=label, **look)


def exploration_map(history: History) -> Figure | str:
    """Draw R_s of every layer over steps as a map; return "" where lines show it."""
    masks = masks_of(history, moving=True)
    if isinstance(masks, str) or len(masks.names) <= LINES_AT_MOST:
        return ""

    count = len(masks.names)
    figure, (axes,) = style.panels(width=WIDE, height=min(6.5, max(3.0, 0.18 * count + 1.0)))
    updates = style.thinned(len(masks.steps), COLUMNS_AT_MOST)
    edges = np.append(masks.steps[updates], max(masks.steps[-1] + 1, history.end))
    rows = np.arange(count + 1) - 0.5
    values = masks.exploration_rates[updates].T
    drawn = axes.pcolormesh(edges, rows, values, cmap=SHADES, vmin=0, vmax=1)
    axes.invert_yaxis()

    labelled = style.thinned(count, NAMES_AT_MOST)
    axes.set_yticks(labelled, [short(masks.names[place]) for place in labelled], fontsize=8.5)
    axes.grid(visible=False)
    style.steps_below(axes, history.end)
    axes.set_xlim(0, edges[-1])
    figure.colorbar(drawn, ax=axes, label="R_s of the layer", pad=0.01)
    return figure


# --- changes ---


def changes(history: History) -> Figure | str:
    """Draw the share of each mask that an update made new, and of grown weights that survived."""
    masks = masks_of(history, moving=True)
    if isinstance(masks, str):
        return masks

    figure, (axes,) = style.panels()
    steps = masks.steps[1:]
    marks = style.marked(steps)
    if len(masks.names) > 1 and len(steps) > 1:
        draw_bands(axes, steps, masks.changed, kind=None)
    axes.plot(steps, masks.rates, ":", color=GREY, label="rate")

    new = masks.entered.sum(1) / np.maximum(1, masks.active[1:].sum(1))
    label = f"new, all layers, {new[-1]:.4f} at the end"
    axes.plot(steps, new, color=BLACK, label=label, **marks)

    survived = survival(masks)
    if len(survived):
        last = survived[np.isfinite(survived)][-1]
        label = f"survived, {last:.3f} at the end"
        axes.plot(steps[1:], survived, "--", color=VERMILLION, label=label, **marks)

    axes.set(ylabel="share of active weights", ylim=(0, None))
    style.steps_below(axes, history.end)
    style.legend_below(figure)
    return figure


def survival(masks: Masks) -> Numbers:
    """Compute from the second update on the share of the weights grown before that survived it.

    It is NaN where nothing grew, and empty if nobody counted.
    """
    if not np.isfinite(masks.survival[1:]).any():
        return np.array([])

    grown = masks.entered[:-1]
    total = grown.sum(1)
    survived = np.nansum(masks.survival[1:] * grown, 1)
    return np.where(total > 0, survived / np.maximum(1, total), np.nan)


# --- sparsity ---


def sparsity(history: History) -> Figure | str:
    """Draw the sparsity of every layer as a bar; dense layers, masked or not, are marked."""
    masks = masks_of(history, moving=False)
    if isinstance(masks, str) or history.beginning is None:
        return str(masks)

    at_end = dict(zip(masks.names, masks.sparsities[-1], strict=True))
    at_start = dict(zip(masks.names, masks.sparsities[0], strict=True))
    names = history.beginning["names"]
    values = np.array([at_end.get(name, 0.0) for name in names])
    before = np.array([at_start.get(name, 0.0) for name in names])
    dense = []
    for name, value in zip(names, values, strict=True):
        if name not in at_end:
            dense.append("no mask")
        else:
            dense.append("dense" if value == 0 else "")

    first_step = masks.steps[0]
    since = f"at step {first_step:,.0f}" if first_step else "at the beginning"
    overall = float(1.0 - masks.active[-1].sum() / masks.weights.sum())
    draw = draw_bars if len(names) <= BARS_AT_MOST else draw_columns
    return draw([short(name) for name in names], values, before, since, dense, overall)


def draw_bars(
    names: list[str], values: Numbers, before: Numbers, since: str, dense: list[str], overall: float
) -> Figure:
    """Draw few layers: a lying bar each, with name and number."""
    figure, (axes,) = style.panels(width=WIDE, height=0.26 * len(names) + 1.1)
    places = np.arange(len(names))
    axes.barh(places, values, color=BLUE, height=0.7)
    for place, (value, word) in enumerate(zip(values, dense, strict=True)):
        # The number stands at the beginning of the bar: the line of all masks crosses its end.
        inside = value > 0.2
        x, color = (0.01, "white") if inside else (value + 0.005, BLACK)
        axes.text(x, place, word or f"{value:.4f}", va="center", fontsize=9, color=color)
    if np.abs(values - before).max() > 1e-3:
        axes.plot(before, places, "D", color=BLACK, mfc="white", label=since)
    label = f"all masks, {overall:.4f}"
    axes.axvline(overall, color=BLACK, linestyle="--", linewidth=1.2, label=label)

    axes.set_yticks(places, names, fontsize=9)
    axes.set(xlabel="sparsity, share of zeros", xlim=(0, 1.08), ylim=(len(names) - 0.4, -0.6))
    axes.grid(visible=False, axis="y")
    figure.legend(loc="outside upper right", ncols=2)
    return figure


def draw_columns(
    names: list[str], values: Numbers, before: Numbers, since: str, dense: list[str], overall: float
) -> Figure:
    """Draw many layers: a thin standing bar each, every k-th with its name."""
    figure, (axes,) = style.panels(width=WIDE, height=4.2)
    places = np.arange(len(names))
    axes.bar(places, values, color=BLUE, width=0.8, label="layer")
    marked = [place for place, word in enumerate(dense) if word]
    if marked:
        zeros = np.zeros(len(marked))
        axes.plot(marked, zeros, "x", color=VERMILLION, label="dense layer", clip_on=False)
    if np.abs(values - before).max() > 1e-3:
        axes.plot(places, before, "_", color=BLACK, label=since)
    label = f"all masks, {overall:.4f}"
    axes.axhline(overall, color=BLACK, linestyle="--", linewidth=1.2, label=label)

    labelled = style.thinned(len(names), NAMES_AT_MOST)
    slanted: dict[str, Any] = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(labelled, [names[place] for place in labelled], fontsize=8, **slanted)
    axes.set(ylabel="sparsity, share of zeros", xlim=(-1, len(names)), ylim=(0, 1.02))
    axes.grid(visible=False, axis="x")
    figure.legend(loc="outside upper right", ncols=4)
    return figure


# --- the first mask ---


def first_layer(history: History) -> Figure | str:
    """Draw the mask of the first layer: a convolution as tiles, a linear map as a matrix."""
    masks = masks_of(history, moving=False)
    if isinstance(masks, str):
        return masks
    found = history.first_mask()
    if found is None:
        return "There is neither a file of weights nor a layer small enough to draw its mask."

    name, mask = found
    if mask.ndim > 2:  # kernels of one or three dimensions become pictures
        mask = mask.reshape(*mask.shape[:2], -1, mask.shape[-1])
        if mask[0, 0].size > 1:
            return draw_filters(name, mask)
    image = (history.beginning or {}).get("image", [])
    return draw_matrix(name, mask.reshape(len(mask), -1), image)


def draw_filters(name: str, mask: NDArray[np.bool_]) -> Figure:
    """Draw a tile per filter; a position is as dark as many input channels are active there."""
    count, channels, height, width = mask.shape
    tiles = mask[:FILTERS_AT_MOST].mean(1)
    across = min(len(tiles), max(1, round(math.sqrt(2.6 * len(tiles) * height / width))))
    down = -(-len(tiles) // across)
    canvas = np.full((down * (height + 1) + 1, across * (width + 1) + 1), np.nan)
    for place, tile in enumerate(tiles):
        top, left = place // across * (height + 1) + 1, place % across * (width + 1) + 1
        canvas[top : top + height, left : left + width] = tile

    inches = 8.6 * canvas.shape[0] / canvas.shape[1] + 0.6
    figure, (axes,) = style.panels(width=WIDE, height=min(6.0, max(2.2, inches)))
    drawn = axes.imshow(canvas, cmap=SHADES, vmin=0, vmax=1, interpolation="nearest")
    axes.set_axis_off()
    shown = f"{count} filters"
    if count > len(tiles):
        shown = f"the first {len(tiles)} of {shown}"
    size = f"{height}×{width}, {channels} input channels, {mask.mean():.1%} active"
    axes.set_title(f"{short(name)}: {shown} of {size}")
    figure.colorbar(drawn, ax=axes, label="share of input channels active", pad=0.01)
    return figure


def draw_matrix(name: str, mask: NDArray[np.bool_], image: list[int]) -> Figure:
    """Draw a linear map as a matrix; if it reads an image, also the active weights by pixel."""
    outputs, inputs = mask.shape
    reads_image = len(image) == 3 and math.prod(image) == inputs and max(image[1:]) > 1
    if reads_image:
        ratios = {"width_ratios": [1, 1.7]}
        figure, axes = style.panels(2, width=WIDE, height=4.0, gridspec_kw=ratios)
        readers = mask.reshape(outputs, *image).sum((0, 1))
        drawn = axes[0].imshow(readers, cmap=SHADES, vmin=0, interpolation="nearest")
        axes[0].set(title="connections of each pixel of the image", xlabel="column", ylabel="row")
        figure.colorbar(drawn, ax=axes[0], label="active weights", shrink=0.9)
        axes[0].grid(visible=False)
    else:
        figure, axes = style.panels(width=WIDE, height=4.0)

    cells = blocks(mask)
    look: dict[str, Any] = {"vmin": 0, "aspect": "auto", "extent": (0, inputs, outputs, 0)}
    drawn = axes[-1].imshow(cells, cmap=SHADES, interpolation="nearest", **look)
    title = f"{short(name)}: {outputs}×{inputs}, {mask.mean():.1%} active"
    axes[-1].set(title=title, xlabel="input", ylabel="output")
    axes[-1].grid(visible=False)
    if cells.shape != mask.shape:
        figure.colorbar(drawn, ax=axes[-1], label="share active", shrink=0.9)
    return figure


def blocks(mask: NDArray[np.bool_]) -> Numbers:
    """Compute shares of active weights in blocks, so many that a picture can show each."""
    rows, columns = mask.shape
    high = max(1, -(-rows // CELLS_AT_MOST[0]))
    wide = max(1, -(-columns // CELLS_AT_MOST[1]))
    down, across = -(-rows // high), -(-columns // wide)
    padded = np.full((down * high, across * wide), np.nan)
    padded[:rows, :columns] = mask
    return np.nanmean(padded.reshape(down, high, across, wide), axis=(1, 3))
