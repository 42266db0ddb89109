"""Write a run as text: its metrics, with a label and a format for each, and what it trains."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from itop_prune.messages import in_digits

SHARE = "share"
"""The format of a share of all weights, which may be very near to 0 or 1."""
SHOWN = {  # metric: label, format
    "train_loss": ("loss", "{:.4f}"),
    "val_loss": ("val loss", "{:.4f}"),
    "val_top1": ("val top-1", "{:.2f} %"),
    "test_loss": ("test loss", "{:.4f}"),
    "test_top1": ("test top-1", "{:.2f} %"),
    "lr": ("lr", "{:.5g}"),
    "rate": ("rate", "{:.4f}"),
    "sparsity": ("sparsity", SHARE),
    "exploration_rate": ("R_s", SHARE),
    "survival": ("survival", "{:.4f}"),
    "train_flops": ("train FLOPs", SHARE),
    "images_per_second": ("images/s", "{:,.0f}"),
}

UNITS = {"train_flops": " × dense"}
"""What text adds to a number whose label does not say what it is a share of."""


def labelled(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Write label and text of the metrics that are there, in the order of `SHOWN`."""
    return [
        (label, text_of(metrics, key) + UNITS.get(key, ""))
        for key, (label, _) in SHOWN.items()
        if metrics.get(key) is not None
    ]


def text_of(metrics: Mapping[str, Any], key: str) -> str:
    """Write a metric that is there, without its unit; an estimate with its standard error.

    >>> text_of({"exploration_rate": 0.2, "exploration_error": 0.003}, "exploration_rate")
    '0.2000 ± 0.003'
    """
    form = SHOWN[key][1] if key in SHOWN else SHARE
    text = in_digits(metrics[key]) if form is SHARE else form.format(metrics[key])
    error = metrics.get("exploration_error") if key == "exploration_rate" else None
    return f"{text} ± {error:.1g}" if error else text


def summary_line(metrics: Mapping[str, Any]) -> str:
    """Write the metrics as one line of text."""
    return "  ".join(f"{label} {text}" for label, text in labelled(metrics))


def counted(number: int, what: str) -> str:
    """Write a number of things, singular or plural.

    >>> counted(1, "update"), counted(1200, "update")
    ('1 update', '1,200 updates')
    """
    return f"{number:,} {what}{'s' * (number != 1)}"


def subject(recipe: Mapping[str, Any]) -> str:
    """Name the model of a recipe and its images; own images by their place, if it is known.

    >>> subject({"model": {"model_name": "lenet300"}, "data": {"name": "digits"}})
    'lenet300 on digits'
    >>> subject({"model": {"model_name": "vgg"}, "data": {"name": "npz", "root": "/my/cats.npz"}})
    'vgg on cats.npz'
    """
    model, data = recipe.get("model") or {}, recipe.get("data") or {}
    images = data.get("name", "its data")
    if images in ("npz", "folder"):  # these names are file formats
        images = Path(str(data["root"])).name if data.get("root") else "its data"
    return f"{model.get('model_name', 'a model')} on {images}"
