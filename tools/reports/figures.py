"""The pictures of a report: their list, and those over the steps of a run.

A figure function takes the history of a run. It returns a figure, or the sentence that stands in
its place.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..run_folder.history import History, Numbers
from . import layer_figures, style
from .style import BLACK, BLUE, GREY, SKY, VERMILLION


class Picture(NamedTuple):
    """A section of the page: a drawing, or the sentence that stands in its place."""

    name: str
    """Of its file, without .png."""
    title: str
    caption: str
    wide: bool
    """Whether it fills the width of the page; two narrow ones stand side by side."""
    content: bytes | str
    """A PNG, or the sentence."""


def draw(history: History) -> list[Picture]:
    """Draw all pictures of a run, in their order."""
    pictures = []
    with style.look():
        for name, title, caption, wide, figure in PICTURES:
            drawn = figure(history)
            content = style.png(drawn) if isinstance(drawn, Figure) else drawn
            if content:
                pictures.append(Picture(name, title, caption, wide, content))
    return pictures


def accuracy(history: History) -> Figure | str:
    """Draw validation accuracy over steps, and that of the test set at the end."""
    if not history.has("val_top1"):
        result = "; this run has not come so far"
        if history.test:
            result = f": {history.test['test_top1']:.2f} %"
        return (
            "No images are held out (data.validation): accuracy is measured at the end, "
            f"on the test set{result}."
        )

    figure, (axes,) = style.panels()
    values = history.column("val_top1")
    axes.plot(history.steps, values, color=BLUE, label="validation", **style.marked(values))
    best = int(np.nanargmax(values))
    label = f"best {values[best]:.2f}"
    axes.plot(history.steps[best], values[best], "D", color=BLUE, mfc="white", label=label)
    add_test(axes, history, "test_top1", "{:.2f}")

    axes.set(ylabel="top-1 accuracy, %")
    limit_to_most(axes, values, history.last.get("test_top1"))
    style.steps_below(axes, history.end)
    style.legend_below(figure, columns=3)
    return figure


def limit_to_most(axes: Axes, values: Numbers, test: float | None) -> None:
    """Leave out the lowest tenth of a long line: its start would flatten the rest."""
    lowest = np.nanquantile(values, 0.1 if len(values) > 20 else 0.0)
    highest = np.nanmax(values)
    margin = 0.12 * (max(highest, test or 0.0) - lowest)
    if margin > 0:
        bottom = min(lowest, 100.0 if test is None else test) - 3 * margin
        top = max(highest, test or 0.0) + margin
        axes.set_ylim(max(0.0, bottom), min(100.0, top))


def loss(history: History) -> Figure | str:
    """Draw training and validation loss over steps, and that of the test set at the end."""
    if not history.has("train_loss"):
        return "The loss was not finite in any epoch."

    figure, (axes,) = style.panels()
    values = history.column("train_loss")
    marks = style.marked(values)
    axes.plot(history.steps, values, color=VERMILLION, label="training", **marks)
    if history.has("val_loss"):
        validation = history.column("val_loss")
        axes.plot(history.steps, validation, "--", color=BLUE, label="validation", **marks)
    add_test(axes, history, "test_loss", "{:.4f}")

    axes.set(ylabel="cross-entropy loss, nats")
    low, high = np.nanmin(values), np.nanmax(values)
    if low > 0 and high / low > 20:
        style.logarithmic(axes, "y")
    style.steps_below(axes, history.end)
    style.legend_below(figure, columns=3)
    return figure


def add_test(axes: Axes, history: History, key: str, form: str) -> None:
    """Draw a finite number of the test set as a star at the last step."""
    value = float((history.test or {}).get(key, np.nan))
    if np.isfinite(value):
        label = f"test {form.format(value)}"
        look: dict[str, Any] = {"color": BLACK, "markersize": 11, "linestyle": "", "clip_on": False}
        axes.plot(history.steps[-1], value, "*", label=label, **look)


def rates(history: History) -> Figure | str:
    """Draw the learning rate, and below it the share of active weights that an update exchanges."""
    values = history.column("lr")
    if not np.isfinite(values).all():
        return "The learning rate was not a finite number."

    moves = history.has("rate")
    figure, axes = style.panels(down=2 if moves else 1, sharex=True)
    # A learning rate holds from the beginning of its epoch.
    steps, held = [0, *history.steps], [values[0], *values]
    axes[0].plot(steps, held, color=BLUE, drawstyle="steps-pre")
    axes[0].set(ylabel="learning rate")
    low, high = float(np.min(values)), float(np.max(values))
    if low > 0 and high / low > 20:
        style.logarithmic(axes[0], "y")
    else:
        axes[0].set_ylim(0, 1.1 * high or None)

    if moves:
        rate = history.column("rate")
        axes[1].plot(history.steps, rate, color=VERMILLION, **style.marked(rate))
        axes[1].set(ylabel="rate of exchange", ylim=(0, None))
    style.steps_below(axes[-1], history.end)
    return figure


def cost(history: History) -> Figure | str:
    """Draw the FLOPs of a forward and of the training so far, as shares of the dense model's."""
    if not history.has("forward_flops"):
        return "FLOPs were not counted: the model can't be run on one image."
    if history.masks is not None and not history.masks.names:
        return "No masks, so a forward and the training cost what the dense model costs."

    figure, (axes,) = style.panels()
    axes.axhline(1.0, color=GREY, linewidth=1.2, linestyle=":")
    axes.text(0.01, 0.98, "dense", transform=axes.get_yaxis_transform(), color=GREY, va="top")

    # The second line lies on the first if the masks keep their density: hence the widths.
    forward, training = history.column("forward_flops"), history.column("train_flops")
    for values, name, line, color, width in (
        (forward, "forward", "-", SKY, 5),
        (training, "training so far", "--", BLACK, 1.9),
    ):
        look = {"color": color, "linewidth": width, **style.marked(values)}
        label = f"{name}, {values[-1]:.4f} × dense"
        axes.plot(history.steps, values, line, label=label, **look)
    axes.set(ylabel="FLOPs, × dense", ylim=(0, 1.08 * max(1.0, np.nanmax(training))))
    style.steps_below(axes, history.end)
    style.legend_below(figure)
    return figure


PICTURES: tuple[tuple[str, str, str, bool, Callable[[History], Figure | str]], ...] = (
    ("accuracy", "Accuracy", "The test set is used once, at the end.", False, accuracy),
    (
        "loss",
        "Loss",
        "Training loss is the mean over an epoch, while the weights change.",
        False,
        loss,
    ),
    (
        "exploration",
        "Explored weights, R_s",
        "The share of weights that were active at least once. It rises at every update.",
        False,
        layer_figures.exploration,
    ),
    (
        "changes",
        "Changes of the masks",
        "New: the share of active weights that were inactive before the update. "
        "Survived (with regrow.survival): the share of grown weights that are still active after "
        "the next update. Bands are layers.",
        False,
        layer_figures.changes,
    ),
    (
        "flops",
        "FLOPs",
        "With kernels that skip every zero. Training so far is a mean over steps.",
        False,
        cost,
    ),
    ("rates", "Learning rate, rate of exchange", "At the end of each epoch.", False, rates),
    (
        "exploration_by_layer",
        "R_s by layer",
        "A row per layer, the first on top; a stronger colour is more explored.",
        True,
        layer_figures.exploration_map,
    ),
    (
        "sparsity",
        "Sparsity by layer",
        "Share of zeros in each layer as the run left it.",
        True,
        layer_figures.sparsity,
    ),
    (
        "first_layer",
        "Mask of the first masked layer",
        "As the run left it; a stronger colour is more active weights.",
        True,
        layer_figures.first_layer,
    ),
)
"""Name, title, caption, whether it is wide, and the function that draws it; in their order."""
