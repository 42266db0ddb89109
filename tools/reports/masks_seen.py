"""The first layer's mask as a picture: which inputs it looks at."""

import math

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ..run_folder.history import History, Numbers
from .layer_figures import masks_of, short
from .style import SHADES, WIDE, panels

FILTERS_AT_MOST = 256
CELLS_AT_MOST = (300, 800)


def first_layer(history: History) -> Figure | str:
    """Draw the mask of the first layer: filters as tiles, or a matrix, with what each pixel of the image is read by."""
    masks = masks_of(history, moving=False)
    if isinstance(masks, str):
        return masks
    found = history.first_mask()
    if found is None:
        return "Neither model.safetensors nor a checkpoint is there to read the masks from."
    name, mask = found
    mask = mask.reshape(*mask.shape[:2], -1, mask.shape[-1]) if mask.ndim > 2 else mask
    if mask.ndim == 4 and mask[0, 0].size > 1:
        return filters(name, mask)
    image = (history.beginning or {}).get("image", [])
    return matrix(name, mask.reshape(len(mask), -1), image)


def filters(name: str, mask: NDArray[np.bool_]) -> Figure:
    """Draw a convolution: a tile per filter, every position as dark as input channels are active there."""
    count, channels, height, width = mask.shape
    tiles = mask[:FILTERS_AT_MOST].mean(1)
    across = min(len(tiles), max(1, round(math.sqrt(2.6 * len(tiles) * height / width))))
    down = -(-len(tiles) // across)
    canvas = np.full((down * (height + 1) + 1, across * (width + 1) + 1), np.nan)
    for place, tile in enumerate(tiles):
        top, left = place // across * (height + 1) + 1, place % across * (width + 1) + 1
        canvas[top : top + height, left : left + width] = tile
    figure, (axes,) = panels(
        width=WIDE, height=min(6.0, max(2.2, 8.6 * canvas.shape[0] / canvas.shape[1] + 0.6))
    )
    drawn = axes.imshow(canvas, cmap=SHADES, vmin=0, vmax=1, interpolation="nearest")
    axes.set_axis_off()
    shown = (
        f"{count} filters" if count == len(tiles) else f"the first {len(tiles)} of {count} filters"
    )
    axes.set_title(
        f"{short(name)}: {shown} of {height}×{width}, {channels} input channels, {mask.mean():.1%} active"
    )
    figure.colorbar(drawn, ax=axes, label="share of input channels active", pad=0.01)
    return figure


def matrix(name: str, mask: NDArray[np.bool_], image: list[int]) -> Figure:
    """Draw a linear map: how many outputs read each pixel, where its inputs are those of an image, and the mask."""
    outputs, inputs = mask.shape
    reads_image = len(image) == 3 and math.prod(image) == inputs and max(image[1:]) > 1
    ratios = {"width_ratios": [1, 1.7]} if reads_image else {}
    figure, axes = panels(2 if reads_image else 1, width=WIDE, height=4.0, gridspec_kw=ratios)
    if reads_image:
        readers = mask.reshape(outputs, *image).sum((0, 1))
        drawn = axes[0].imshow(readers, cmap=SHADES, vmin=0, interpolation="nearest")
        axes[0].set(title="connections of each pixel of the image", xlabel="column", ylabel="row")
        figure.colorbar(drawn, ax=axes[0], label="active weights", shrink=0.9)
        axes[0].grid(visible=False)
    cells = blocks(mask)
    extent = (0, inputs, outputs, 0)
    drawn = axes[-1].imshow(
        cells, cmap=SHADES, vmin=0, aspect="auto", extent=extent, interpolation="nearest"
    )
    axes[-1].set(
        title=f"{short(name)}: {outputs}×{inputs}, {mask.mean():.1%} active",
        xlabel="input",
        ylabel="output",
    )
    axes[-1].grid(visible=False)
    if cells.shape != mask.shape:
        figure.colorbar(drawn, ax=axes[-1], label="share active", shrink=0.9)
    return figure


def blocks(mask: NDArray[np.bool_]) -> Numbers:
    """Return a mask as shares of active weights, in blocks where it has more places than a picture shows."""
    factors = [
        max(1, -(-size // most)) for size, most in zip(mask.shape, CELLS_AT_MOST, strict=True)
    ]
    down, across = (-(-size // factor) for size, factor in zip(mask.shape, factors, strict=True))
    padded = np.full((down * factors[0], across * factors[1]), np.nan)
    padded[: mask.shape[0], : mask.shape[1]] = mask
    return np.nanmean(padded.reshape(down, factors[0], across, factors[1]), axis=(1, 3))
