"""Pictures of the masks of a run, layer by layer: what they explored, how sparse they are, how much they move.

A picture is a function of the history that returns a figure, or a sentence that says why there is
none. With more layers than can be told apart it draws bands over layers in place of lines, and maps
in place of bars.
"""

from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..run_folder.history import History, Masks, Numbers
from .style import (
    BLACK,
    BLUE,
    COLORS,
    GREY,
    LINES,
    SHADES,
    SKY,
    VERMILLION,
    WIDE,
    legend_below,
    marked,
    panels,
    steps_below,
    thinned,
)

LINES_AT_MOST = 8
BARS_AT_MOST = 40
NAMES_AT_MOST = 36
COLUMNS_AT_MOST = 600
OLD = "This run has no layers.jsonl (it was removed, or an earlier version wrote none): nothing is known by layer."
DENSE = "No masks: a dense model."


def short(name: str, most: int = 30) -> str:
    """Return a weight's name without what all share, from behind where it is long.

    >>> short("layers.0.weight"), short("stages.2.blocks.17.mixer.attention.qkv.weight")
    ('layers.0', '…blocks.17.mixer.attention.qkv')
    """
    name = name.removesuffix(".weight")
    return name if len(name) <= most else f"…{name[1 - most :]}"


def masks_of(history: History, moving: bool) -> Masks | str:
    """Return the masks, or why there are none to be drawn, or none that moved."""
    masks = history.masks
    if masks is None:
        return OLD
    if not masks.names:
        return DENSE
    if not moving or len(masks.steps) > 1:
        return masks
    if masks.updates_before:
        return f"The {masks.updates_before:,} updates of the masks were made before layers.jsonl was begun anew."
    if not history.recipe.get("regrow"):
        return f"The masks are static: R_s stays at the density, {history.last['exploration_rate']:.4f}."
    every = history.recipe["regrow"].get("every")
    if every <= history.steps[-1]:
        why = "none was due up to regrow.stop, or numbers were not finite when it was"
        return f"No update of the masks was made in {history.steps[-1]:,} steps: {why}."
    return f"No update of the masks was made: regrow.every is {every}, and the run has made {history.steps[-1]:,} steps."


def exploration(history: History) -> Figure | str:
    """Draw R_s over steps, overall and by layer."""
    masks = masks_of(history, moving=True)
    if isinstance(masks, str):
        return masks
    figure, (axes,) = panels()
    overall = masks.explored.sum(1) / masks.weights.sum()
    draw_held(
        axes,
        masks,
        overall,
        history,
        color=BLACK,
        linewidth=2.6,
        label=f"all layers, {overall[-1]:.3f}",
    )
    by_layer = masks.exploration_rates
    if len(masks.names) > LINES_AT_MOST:
        draw_bands(axes, *held(masks, by_layer, history))
    else:
        for place in np.argsort(
            -by_layer[-1], kind="stable"
        ):  # so the legend is in the order of the lines
            label = f"{short(masks.names[place], 22)}, {by_layer[-1, place]:.3f}"
            style = {
                "color": COLORS[place % 6],
                "linestyle": LINES[place % len(LINES)],
                "linewidth": 1.6,
            }
            draw_held(axes, masks, by_layer[:, place], history, label=label, **style)
    legend_below(figure)
    axes.set(ylabel="R_s, share of weights explored", ylim=(0, 1.02))
    steps_below(axes, history.end)
    return figure


def held(masks: Masks, values: Numbers, history: History) -> tuple[Numbers, Numbers]:
    """Return steps and values up to the end of the run: what an update leaves stays until the next."""
    return np.append(masks.steps, history.end), np.concatenate([values, values[-1:]])


def draw_held(axes: Axes, masks: Masks, values: Numbers, history: History, **style: Any) -> None:
    """Draw a line that jumps at updates."""
    axes.plot(*held(masks, values, history), drawstyle="steps-post", **style)


def draw_bands(
    axes: Axes, steps: Numbers, values: Numbers, kind: Literal["post"] | None = "post"
) -> None:
    """Draw what so many layers do: the span of all and of the middle half."""
    low, lower, upper, high = np.nanquantile(values, (0.0, 0.25, 0.75, 1.0), axis=1)
    axes.fill_between(
        steps,
        low,
        high,
        step=kind,
        color=SKY,
        alpha=0.3,
        linewidth=0,
        label="lowest to highest layer",
    )
    axes.fill_between(
        steps,
        lower,
        upper,
        step=kind,
        color=BLUE,
        alpha=0.4,
        linewidth=0,
        label="middle half of layers",
    )


def exploration_map(history: History) -> Figure | str:
    """Draw R_s of every layer over steps as a map, first layer on top; "" where lines show it."""
    masks = masks_of(history, moving=True)
    if isinstance(masks, str) or len(masks.names) <= LINES_AT_MOST:
        return ""
    count = len(masks.names)
    figure, (axes,) = panels(width=WIDE, height=min(6.5, max(3.0, 0.18 * count + 1.0)))
    places = thinned(len(masks.steps), COLUMNS_AT_MOST)
    edges = np.append(masks.steps[places], max(masks.steps[-1] + 1, history.end))
    rows = np.arange(count + 1) - 0.5
    drawn = axes.pcolormesh(
        edges, rows, masks.exploration_rates[places].T, cmap=SHADES, vmin=0, vmax=1
    )
    axes.invert_yaxis()
    labelled = thinned(count, NAMES_AT_MOST)
    axes.set_yticks(labelled, [short(masks.names[place]) for place in labelled], fontsize=8.5)
    axes.grid(visible=False)
    steps_below(axes, history.end)
    axes.set_xlim(0, edges[-1])
    figure.colorbar(drawn, ax=axes, label="R_s of the layer", pad=0.01)
    return figure


def changes(history: History) -> Figure | str:
    """Draw the share of each mask that is new after an update, and how much of what grew survived the next."""
    masks = masks_of(history, moving=True)
    if isinstance(masks, str):
        return masks
    figure, (axes,) = panels()
    steps = masks.steps[1:]
    overall = masks.entered.sum(1) / np.maximum(1, masks.active[1:].sum(1))
    if len(masks.names) > 1 and len(steps) > 1:
        draw_bands(axes, steps, masks.changed, kind=None)
    axes.plot(steps, masks.rates, ":", color=GREY, label="rate")
    axes.plot(
        steps,
        overall,
        color=BLACK,
        label=f"new, all layers, {overall[-1]:.4f} at the end",
        **marked(steps),
    )
    if len(survived := survival(masks)):
        label = f"survived, {survived[np.isfinite(survived)][-1]:.3f} at the end"
        axes.plot(steps[1:], survived, "--", color=VERMILLION, label=label, **marked(steps))
    axes.set(ylabel="share of active weights", ylim=(0, None))
    steps_below(axes, history.end)
    legend_below(figure)
    return figure


def survival(masks: Masks) -> Numbers:
    """Return, from the second update on, which share of what grew in all layers survived it; NaN where nothing grew."""
    if not np.isfinite(masks.survival[1:]).any():
        return np.array([])
    grown = masks.entered[:-1]
    total = grown.sum(1)
    return np.where(
        total > 0, np.nansum(masks.survival[1:] * grown, 1) / np.maximum(1, total), np.nan
    )


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
    dense = [
        "no mask" if name not in at_end else "dense" if value == 0 else ""
        for name, value in zip(names, values, strict=True)
    ]
    overall = 1.0 - masks.active[-1].sum() / masks.weights.sum()
    draw = bars if len(names) <= BARS_AT_MOST else columns
    since = f"at step {masks.steps[0]:,.0f}" if masks.steps[0] else "at the beginning"
    return draw([short(name) for name in names], values, before, since, dense, float(overall))


def bars(
    names: list[str], values: Numbers, before: Numbers, since: str, dense: list[str], overall: float
) -> Figure:
    """Draw few layers: a lying bar each, with name and number."""
    figure, (axes,) = panels(width=WIDE, height=0.26 * len(names) + 1.1)
    places = np.arange(len(names))
    axes.barh(places, values, color=BLUE, height=0.7)
    for place, (value, word) in enumerate(zip(values, dense, strict=True)):
        inside = value > 0.2  # at its beginning: the line of all masks crosses its end
        where, color = (0.01, "white") if inside else (value + 0.005, BLACK)
        axes.text(where, place, word or f"{value:.4f}", va="center", fontsize=9, color=color)
    if np.abs(values - before).max() > 1e-3:
        axes.plot(
            before, places, "D", color=BLACK, markerfacecolor="white", label=since, linestyle=""
        )
    axes.axvline(
        overall, color=BLACK, linestyle="--", linewidth=1.2, label=f"all masks, {overall:.4f}"
    )
    axes.set_yticks(places, names, fontsize=9)
    axes.set(xlabel="sparsity, share of zeros", xlim=(0, 1.08), ylim=(len(names) - 0.4, -0.6))
    axes.grid(visible=False, axis="y")
    figure.legend(loc="outside upper right", ncols=2)
    return figure


def columns(
    names: list[str], values: Numbers, before: Numbers, since: str, dense: list[str], overall: float
) -> Figure:
    """Draw many layers: a thin standing bar each, from first to last, every k-th with its name."""
    figure, (axes,) = panels(width=WIDE, height=4.2)
    places = np.arange(len(names))
    axes.bar(places, values, color=BLUE, width=0.8, label="layer")
    marks = [place for place, word in enumerate(dense) if word]
    if marks:
        axes.plot(
            marks,
            np.zeros(len(marks)),
            "x",
            color=VERMILLION,
            label="dense layer",
            clip_on=False,
            linestyle="",
        )
    if np.abs(values - before).max() > 1e-3:
        axes.plot(places, before, "_", color=BLACK, label=since, linestyle="")
    axes.axhline(
        overall, color=BLACK, linestyle="--", linewidth=1.2, label=f"all masks, {overall:.4f}"
    )
    labelled = thinned(len(names), NAMES_AT_MOST)
    axes.set_xticks(
        labelled,
        [names[place] for place in labelled],
        rotation=60,
        ha="right",
        rotation_mode="anchor",
        fontsize=8,
    )
    axes.set(ylabel="sparsity, share of zeros", xlim=(-1, len(names)), ylim=(0, 1.02))
    axes.grid(visible=False, axis="x")
    figure.legend(loc="outside upper right", ncols=4)
    return figure
