"""The pictures of a report, in their order: what each is called, says and is drawn by."""

from collections.abc import Callable

from matplotlib.figure import Figure

from ..run_folder.history import History
from . import curves, masks_seen, style
from . import layer_figures as topographies
from .page import Picture

Drawing = Callable[[History], Figure | str]

PICTURES: tuple[tuple[str, str, str, bool, Drawing], ...] = (
    ("accuracy", "Accuracy", "The test set is used once, at the end.", False, curves.accuracy),
    (
        "loss",
        "Loss",
        "Training loss is the mean over an epoch, while the weights change.",
        False,
        curves.loss,
    ),
    (
        "exploration",
        "Explored weights, R_s",
        "The share of weights that were active at least once; it rises at every update of the masks.",
        False,
        topographies.exploration,
    ),
    (
        "changes",
        "Changes of the masks",
        "New: of the active weights, those that were not active before the update. Survived, with regrow.survival: of "
        "those that grew at an update, the ones still active after the next. Bands are layers.",
        False,
        topographies.changes,
    ),
    (
        "flops",
        "FLOPs",
        "With kernels that skip every zero; training so far, a mean over steps.",
        False,
        curves.cost,
    ),
    ("rates", "Learning rate, rate of exchange", "At the end of each epoch.", False, curves.rates),
    (
        "exploration_by_layer",
        "R_s by layer",
        "A row per layer, the first on top; darker is more explored.",
        True,
        topographies.exploration_map,
    ),
    (
        "sparsity",
        "Sparsity by layer",
        "Share of zeros in each layer as the run left it.",
        True,
        topographies.sparsity,
    ),
    (
        "first_layer",
        "Mask of the first masked layer",
        "As the run left it; darker is more active weights.",
        True,
        masks_seen.first_layer,
    ),
)


def draw(history: History) -> list[Picture]:
    """Draw all pictures of a run that it has something for; of an odd number of narrow ones the first is wide."""
    pictures = []
    with style.look():
        found = {name: drawing(history) for name, _, _, _, drawing in PICTURES}
        narrow = [
            name for name, _, _, wide, _ in PICTURES if not wide and isinstance(found[name], Figure)
        ]
        for name, title, says, wide, _ in PICTURES:
            drawn, widened = found[name], len(narrow) % 2 == 1 and name == narrow[0]
            if isinstance(drawn, Figure):
                if widened:
                    drawn.set_size_inches(style.WIDE, drawn.get_figheight())
                pictures.append(Picture(name, title, says, wide or widened, style.png(drawn)))
            elif drawn:
                pictures.append(Picture(name, title, says, wide, drawn))
    return pictures
