"""Pictures of a run over its steps: accuracy, loss, rate and learning rate, FLOPs.

A picture is a function of the history that returns a figure, or a sentence that says why there is
none.
"""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..run_folder.history import History
from .style import (
    BLACK,
    BLUE,
    GREY,
    SKY,
    VERMILLION,
    legend_below,
    logarithmic,
    marked,
    panels,
    steps_below,
)


def accuracy(history: History) -> Figure | str:
    """Draw validation accuracy over steps, and the test set's at the end."""
    if not history.has("val_top1"):
        tested = (
            f": {history.test['test_top1']:.2f} %"
            if history.test
            else "; this run has not come so far"
        )
        return f"No images are held out (data.validation): accuracy is measured at the end, on the test set{tested}."
    figure, (axes,) = panels()
    values = history.column("val_top1")
    axes.plot(history.steps, values, color=BLUE, label="validation", **marked(values))
    best = int(np.nanargmax(values))
    axes.plot(
        history.steps[best],
        values[best],
        "D",
        color=BLUE,
        markerfacecolor="white",
        label=f"best {values[best]:.2f}",
    )
    add_test(axes, history, "test_top1", "{:.2f}")
    axes.set(ylabel="top-1 accuracy, %")
    lowest = np.nanquantile(
        values, 0.1 if len(values) > 20 else 0.0
    )  # the first of many would press all others flat
    highest = max(np.nanmax(values), history.last.get("test_top1", 0.0))
    if highest - lowest > 0:
        room = 0.12 * (highest - lowest)
        axes.set_ylim(
            max(0.0, min(lowest, history.last.get("test_top1", 100.0)) - 3 * room),
            min(100.0, highest + room),
        )
    steps_below(axes, history.end)
    legend_below(figure, columns=3)
    return figure


def loss(history: History) -> Figure | str:
    """Draw training and validation loss over steps, and the test set's at the end."""
    if not history.has("train_loss"):
        return "The loss was not finite in any epoch."
    figure, (axes,) = panels()
    values = history.column("train_loss")
    axes.plot(history.steps, values, color=VERMILLION, label="training", **marked(values))
    if history.has("val_loss"):
        axes.plot(
            history.steps,
            history.column("val_loss"),
            "--",
            color=BLUE,
            label="validation",
            **marked(values),
        )
    add_test(axes, history, "test_loss", "{:.4f}")
    axes.set(ylabel="cross-entropy loss, nats")
    low, high = np.nanmin(values), np.nanmax(values)
    if low > 0 and high / low > 20:
        logarithmic(axes, "y")
    steps_below(axes, history.end)
    legend_below(figure, columns=3)
    return figure


def add_test(axes: Axes, history: History, key: str, form: str) -> None:
    """Draw the number of the test set at the last step, if it is there."""
    if history.test and np.isfinite(value := float(history.test.get(key, np.nan))):
        label = f"test {form.format(value)}"
        axes.plot(
            history.steps[-1],
            value,
            "*",
            color=BLACK,
            markersize=11,
            label=label,
            clip_on=False,
            linestyle="",
        )


def rates(history: History) -> Figure | str:
    """Draw the learning rate, and beside it the share of active weights that an update exchanges."""
    values, moves = history.column("lr"), history.has("rate")
    if not np.isfinite(values).all():
        return "The learning rate was not a finite number."
    figure, axes = panels(down=2 if moves else 1, sharex=True)
    steps, held = (
        [0, *history.steps],
        [values[0], *values],
    )  # an epoch's number holds from its beginning
    axes[0].plot(steps, held, color=BLUE, drawstyle="steps-pre")
    axes[0].set(ylabel="learning rate")
    if np.nanmin(values) > 0 and np.nanmax(values) / np.nanmin(values) > 20:
        logarithmic(axes[0], "y")
    else:
        axes[0].set_ylim(0, 1.1 * float(np.nanmax(values)) or None)
    if moves:
        axes[1].plot(history.steps, history.column("rate"), color=VERMILLION, **marked(values))
        axes[1].set(ylabel="rate of exchange", ylim=(0, None))
    steps_below(axes[-1], history.end)
    return figure


def cost(history: History) -> Figure | str:
    """Draw the FLOPs of a forward, and of the training so far, as shares of what the dense model costs."""
    if not history.has("forward_flops"):
        return "FLOPs were not counted: the model can't be run on one image."
    if history.masks is None or history.masks.names:
        figure, (axes,) = panels()
    else:
        return "No masks, so a forward and the training cost what the dense model costs."
    axes.axhline(1.0, color=GREY, linewidth=1.2, linestyle=":")
    axes.text(0.01, 0.98, "dense", transform=axes.get_yaxis_transform(), color=GREY, va="top")
    kinds = (
        ("forward_flops", "forward", "-", SKY, 5),
        ("train_flops", "training so far", "--", BLACK, 1.9),
    )
    for (
        key,
        label,
        line,
        color,
        linewidth,
    ) in kinds:  # one over the other: static and random growth cost the same
        values = history.column(key)
        label = f"{label}, {values[-1]:.4f}"
        axes.plot(
            history.steps,
            values,
            line,
            color=color,
            label=label,
            linewidth=linewidth,
            **marked(values),
        )
    axes.set(
        ylabel="FLOPs, share of dense",
        ylim=(0, max(1.08, 1.08 * np.nanmax(history.column("train_flops")))),
    )
    steps_below(axes, history.end)
    legend_below(figure)
    return figure
