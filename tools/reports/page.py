"""The report as one HTML page: it needs nothing but itself, no network, no script."""

import base64
import html
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..run_folder.history import History
from ..run_folder.labels import SHOWN, counted
from .layer_figures import short

PAPER = "https://arxiv.org/abs/2102.02887"
FOOTER = f"""R_s is the share of the masked weights that were active at least once:
<a href="{PAPER}">Liu et al., Do We Actually Need Dense Over-Parameterization?, ICML 2021</a>. Drawn by itop_prune from
recipe.yaml, metrics.jsonl, layers.jsonl and the weights in the folder of the run;
<code>python tools/report.py FOLDER</code> draws it again."""
OPEN_LAYERS = 40
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""What a browser may load for the page: what is in it."""
STYLE = Path(__file__).with_name("page.css").read_text(encoding="utf-8")


class Picture(NamedTuple):
    """A section of the page: a drawing, or the sentence in place of one."""

    name: str
    """Of its file, without .png."""
    title: str
    says: str
    """What is to be seen."""
    wide: bool
    drawn: bytes | str


def page(history: History, pictures: list[Picture]) -> str:
    """Return the page as text."""
    title = html.escape(history.title)
    drawn = [section(picture) for picture in pictures if isinstance(picture.drawn, bytes)]
    absent = [section(picture) for picture in pictures if isinstance(picture.drawn, str)]
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            '<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            f"<title>{title}</title><style>{STYLE}</style></head>",
            f'<body><header><h1>{title}</h1><p class="what">{html.escape(what(history))}</p>',
            notice(history),
            f'<dl class="numbers">{"".join(headline(history))}</dl></header>',
            "<main>",
            *drawn,
            table_of_layers(history),
            *absent,
            settings(history),
            final_numbers(history),
            "</main>",
            f"<footer>{FOOTER}</footer>",
            "</body></html>",
            "",
        ]
    )


def what(history: History) -> str:
    """Return what was trained, in a sentence."""
    recipe = history.recipe
    model, data = (recipe.get(key) or {} for key in ("model", "data"))
    masks, regrow = (recipe.get(key) for key in ("masks", "regrow"))
    images = data.get("name", "its data")
    if images in ("npz", "folder") and data.get(
        "root"
    ):  # which say how they lie, not what they are
        images = Path(str(data["root"])).name
    parts = [f"{model.get('model_name', 'a model')} on {images}"]
    if not masks:
        parts.append("dense")
    elif "sparsity" in masks:
        parts.append(f"{masks.get('method', 'ERK')} masks at sparsity {masks['sparsity']}")
    if masks and regrow:
        rules = {
            key: regrow.get(key, default)
            for key, default in (("prune", "magnitude"), ("grow", "random"))
        }
        parts.append(
            f"updated every {regrow.get('every')} steps: prune {rules['prune']}, grow {rules['grow']}"
        )
    elif masks:
        parts.append("static")
    done = history.epochs[-1]["epoch"]
    parts.append(f"{counted(done, 'epoch')}, {history.steps[-1]:,} steps")
    return "; ".join(parts)


def notice(history: History) -> str:
    """Return what a reader must know before the numbers: that the run has not ended, went wrong, or lost something."""
    said = []
    epoch, step, masks = history.epochs[-1]["epoch"], history.steps[-1], history.masks
    if history.test is None:
        said.append(
            f"This run has not come to its end: {epoch} of {history.planned} epochs. The test set has not been used."
        )
    if masks and masks.names and history.end > step:
        explored = masks.explored[-1].sum() / masks.weights.sum()
        said.append(
            f"It was stopped within epoch {epoch + 1}. Numbers by epoch, the large ones too, are of the end of epoch "
            f"{epoch}, step {step:,}; layers and masks are of the last update, step {history.end:,.0f}, which left R_s "
            f"at {explored:.4f}."
        )
    if masks and masks.updates_before:
        said.append(
            f"Of {masks.updates:,} updates of the masks the first {masks.updates_before:,} are not known by layer: "
            f"layers.jsonl was lost before step {masks.steps[0]:,.0f}, where the run went on without it."
        )
    if lost := epoch - len(history.epochs):
        said.append(
            f"Of {epoch:,} epochs {lost:,} are not known: metrics.jsonl was lost, and the run went on without it."
        )
    bad = int((~np.isfinite(history.column("train_loss"))).sum())
    if bad:
        said.append(f"The training loss was not finite in {bad} of {len(history.epochs)} epochs.")
    return "".join(f'<p class="notice">{html.escape(text)}</p>' for text in said)


def headline(history: History) -> Iterator[str]:
    """Yield the numbers that matter, as the runner shows them."""
    last = history.last
    shown = ["test_top1"] if "test_top1" in last else ["val_top1"]
    shown += ["sparsity", "exploration_rate", "survival", "forward_flops", "train_flops"]
    labels = {
        "forward_flops": "forward FLOPs",
        "train_flops": "training FLOPs",
        "exploration_rate": "R_s, explored",
    }
    for key in shown:
        if last.get(key) is not None:
            label, form = SHOWN.get(key, (key, "{:.4f}"))
            yield tile(labels.get(key, label), key, form.format(last[key]))
    if history.masks and history.masks.names and history.recipe.get("regrow"):
        made = history.masks.updates_before + int(
            (history.masks.steps[1:] <= history.steps[-1]).sum()
        )
        yield tile("updates of masks", "updates", f"{made:,}")
    if last.get("seconds") is not None:
        yield tile("training took", "seconds", duration(last["seconds"]))


def tile(label: str, key: str, text: str) -> str:
    """Return one of these numbers."""
    return (
        f'<div><dt>{html.escape(label)}</dt><dd data-shown="{key}">{html.escape(text)}</dd></div>'
    )


def duration(seconds: float) -> str:
    """Return a time in two units.

    >>> duration(5.24), duration(59.9), duration(3725), duration(200000)
    ('5.2 s', '60 s', '1 h 2 min', '2 d 7 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours = minutes // 60
    return f"{hours} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def section(picture: Picture) -> str:
    """Return a picture with its title, inline, or the sentence that stands for it."""
    if isinstance(picture.drawn, str):
        return block(
            picture.name, picture.title, f"<p>{html.escape(picture.drawn)}</p>", "absent wide"
        )
    title, says, data = (
        html.escape(picture.title),
        html.escape(picture.says),
        base64.b64encode(picture.drawn).decode(),
    )
    image = f'<img alt="{title}. {says}" src="data:image/png;base64,{data}">'
    figure = f"<figure>{image}<figcaption>{says}</figcaption></figure>"
    return block(picture.name, picture.title, figure, "wide" if picture.wide else "")


def block(name: str, title: str, content: str, kind: str = "") -> str:
    """Return a section around HTML, of a kind that page.css knows."""
    return f'<section id="{name}" class="{kind}"><h2>{html.escape(title)}</h2>{content}</section>'


def table_of_layers(history: History) -> str:
    """Return a line per layer: weights, active, sparsity, R_s."""
    masks, first = history.masks, history.beginning
    if masks is None or first is None or not masks.names:
        return ""
    rows: list[tuple[str, ...]] = [("layer", "weights", "active", "sparsity", "R_s")]
    place = {name: number for number, name in enumerate(masks.names)}
    for name, weights in zip(first["names"], first["weights"], strict=True):
        if name in place:
            active, explored = (
                int(masks.active[-1, place[name]]),
                int(masks.explored[-1, place[name]]),
            )
            numbers = (f"{active:,}", f"{1 - active / weights:.4f}", f"{explored / weights:.4f}")
        else:
            numbers = (f"{weights:,}", "no mask", "")
        rows.append((short(name, 60), f"{weights:,}", *numbers))
    total, active, explored = (
        int(part.sum()) for part in (masks.weights, masks.active[-1], masks.explored[-1])
    )
    rows.append(
        (
            "all masks",
            f"{total:,}",
            f"{active:,}",
            f"{1 - active / total:.4f}",
            f"{explored / total:.4f}",
        )
    )
    is_open = " open" if len(rows) <= OPEN_LAYERS else ""
    says = f'<summary class="note">{len(rows) - 2} layers, as the run left them at step {history.end:,.0f}</summary>'
    return block(
        "layers", "Layers", f"<details{is_open}>{says}{table(rows, total=True)}</details>", "wide"
    )


def settings(history: History) -> str:
    """Return the recipe as it was resolved."""
    return block("settings", "Settings", f"<pre>{html.escape(history.recipe_text)}</pre>")


def final_numbers(history: History) -> str:
    """Return the last numbers in full, and what made them."""
    numbers = "".join(
        f'<tr><td>{html.escape(key)}</td><td data-number="{html.escape(key)}">{html.escape(str(value))}</td></tr>'
        for key, value in history.last.items()
    )
    made_with: Mapping[str, Any] = (history.beginning or {}).get("made_with", {})
    versions = (
        table([("made with", ""), *((key, str(value)) for key, value in made_with.items())])
        if made_with
        else ""
    )
    head = f"<tr><th>metric</th><th>after epoch {history.epochs[-1]['epoch']:,}</th></tr>"
    return block(
        "numbers", "Final numbers and versions", f"<table>{head}{numbers}</table>{versions}"
    )


def table(rows: list[tuple[str, ...]], total: bool = False) -> str:
    """Return a table of texts; the first row is its head."""

    def row(cells: tuple[str, ...], kind: str, name: str = "") -> str:
        return (
            f"<tr{name}>{''.join(f'<{kind}>{html.escape(cell)}</{kind}>' for cell in cells)}</tr>"
        )

    body = [row(cells, "td", ' class="all"' * (total and cells is rows[-1])) for cells in rows[1:]]
    return f"<table>{row(rows[0], 'th')}{''.join(body)}</table>"
