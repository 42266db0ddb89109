"""The report as one HTML page that needs nothing but itself: no network, no script."""

import base64
import html
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from itop_prune.messages import in_digits

from ..run_folder.history import History
from ..run_folder.labels import SHOWN, counted, subject, text_of
from .figures import Picture
from .layer_figures import short

PAPER = "https://arxiv.org/abs/2102.02887"
FOOTER = f"""R_s is the share of the masked weights that were active at least once:
<a href="{PAPER}">Liu et al., Do We Actually Need Dense Over-Parameterization?, ICML 2021</a>.
Drawn by itop_prune from recipe.yaml, metrics.jsonl, layers.jsonl and the weights in the run folder;
<code>itop-prune report FOLDER</code> draws it again."""
OPEN_LAYERS = 40
"""A longer table of layers is closed at first."""
UNITS = {"forward_flops": "× dense", "train_flops": "× dense", "seconds": "s"}
"""Units of metrics whose names and formats leave them out."""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""A browser may load nothing for the page but what is in it."""
STYLE = Path(__file__).with_name("page.css").read_text(encoding="utf-8")


def page(history: History, pictures: Sequence[Picture]) -> str:
    """Write the page."""
    title = html.escape(history.title)
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        '<head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        f"<title>{title}</title><style>{STYLE}</style></head>",
        f'<body><header><h1>{title}</h1><p class="what">{html.escape(describe(history))}</p>',
        *(f'<p class="notice">{html.escape(notice)}</p>' for notice in notices(history)),
        f'<dl class="numbers">{"".join(headline(history))}</dl></header>',
        "<main>",
        *(section(picture) for picture in pictures),
        table_of_layers(history),
        settings(history),
        final_numbers(history),
        "</main>",
        f"<footer>{FOOTER}</footer>",
        "</body></html>",
        "",
    ]
    return "\n".join(parts)


def describe(history: History) -> str:
    """Describe in a sentence what was trained."""
    recipe = history.recipe
    masks, regrow = recipe.get("masks"), recipe.get("regrow")

    parts = [subject(recipe)]
    if not masks:
        parts.append("dense")
    elif "sparsity" in masks:
        parts.append(f"{masks.get('method', 'ERK')} masks at sparsity {masks['sparsity']}")
    if masks and regrow:
        prune, grow = regrow.get("prune", "magnitude"), regrow.get("grow", "random")
        parts.append(f"updated every {regrow.get('every')} steps: prune {prune}, grow {grow}")
    elif masks:
        parts.append("static")
    done = history.epochs[-1]["epoch"]
    parts.append(f"{counted(done, 'epoch')}, {history.steps[-1]:,} steps")
    return "; ".join(parts)


def notices(history: History) -> Iterator[str]:
    """Yield what a reader must know first: the run has not ended, went wrong, or lost something."""
    epoch, step, masks = history.epochs[-1]["epoch"], history.steps[-1], history.masks
    if history.test is None:
        yield (
            f"This run has not come to its end: {epoch} of {history.planned} epochs. "
            "The test set has not been used."
        )
    if masks and masks.names and history.end > step:
        explored = masks.explored[-1].sum() / masks.weights.sum()
        yield (
            f"It was stopped within epoch {epoch + 1}. Numbers by epoch, the large ones too, are "
            f"of the end of epoch {epoch}, step {step:,}; layers and masks are of the last update, "
            f"step {history.end:,.0f}, which left R_s at {explored:.4f}."
        )
    if masks and masks.updates_before:
        yield (
            f"Of {masks.updates:,} updates of the masks the first {masks.updates_before:,} are not "
            f"known by layer: layers.jsonl was lost before step {masks.steps[0]:,.0f}, where the "
            "run went on without it."
        )
    lost = epoch - len(history.epochs)
    if lost:
        yield (
            f"Of {epoch:,} epochs {lost:,} are not known: metrics.jsonl was lost, and the run went "
            "on without it."
        )
    bad = int((~np.isfinite(history.column("train_loss"))).sum())
    if bad:
        yield f"The training loss was not finite in {bad} of {len(history.epochs)} epochs."


def headline(history: History) -> Iterator[str]:
    """Yield the numbers that matter, as the runner shows them."""
    last, masks = history.last, history.masks
    labels = {
        "forward_flops": "forward FLOPs",
        "train_flops": "training FLOPs",
        "exploration_rate": "R_s, explored",
    }
    shown = ["sparsity", "exploration_rate", "survival", "forward_flops", "train_flops"]
    for key in ["test_top1" if "test_top1" in last else "val_top1", *shown]:
        if last.get(key) is not None:
            label, _ = SHOWN.get(key, (key, ""))
            yield tile(labels.get(key, label), key, text_of(last, key), UNITS.get(key, ""))

    if masks and masks.names and history.recipe.get("regrow"):
        made = masks.updates_before + int((masks.steps[1:] <= history.steps[-1]).sum())
        yield tile("updates of masks", "updates", f"{made:,}")
    if last.get("seconds") is not None:
        yield tile("training took", "seconds", duration(last["seconds"]))


def tile(label: str, key: str, text: str, unit: str = "") -> str:
    """Write one of these numbers, and its unit smaller."""
    small = f" <small>{html.escape(unit)}</small>" if unit else ""
    value = f'<dd data-shown="{key}">{html.escape(text)}{small}</dd>'
    return f"<div><dt>{html.escape(label)}</dt>{value}</div>"


def duration(seconds: float) -> str:
    """Format a time in at most two units.

    >>> duration(5.24), duration(59.9), duration(3725), duration(200000)
    ('5.2 s', '60 s', '1 h 2 min', '2 d 7 h')
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours = minutes // 60
    return f"{hours} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def section(picture: Picture) -> str:
    """Write a picture with its title, inline, or the sentence in its place."""
    if isinstance(picture.content, str):
        sentence = f"<p>{html.escape(picture.content)}</p>"
        return block(picture.name, picture.title, sentence, "wide" if picture.wide else "")

    title, caption = html.escape(picture.title), html.escape(picture.caption)
    data = base64.b64encode(picture.content).decode()
    image = f'<img alt="{title}. {caption}" src="data:image/png;base64,{data}">'
    figure = f"<figure>{image}<figcaption>{caption}</figcaption></figure>"
    return block(picture.name, picture.title, figure, "wide" if picture.wide else "")


def block(name: str, title: str, content: str, kind: str = "") -> str:
    """Wrap HTML in a section of a kind that page.css knows."""
    return f'<section id="{name}" class="{kind}"><h2>{html.escape(title)}</h2>{content}</section>'


def table_of_layers(history: History) -> str:
    """Write a row per layer: weights, active, sparsity, R_s."""
    masks, first = history.masks, history.beginning
    if masks is None or first is None or not masks.names:
        return ""

    rows: list[tuple[str, ...]] = [("layer", "weights", "active", "sparsity", "R_s")]
    place = {name: number for number, name in enumerate(masks.names)}
    for name, weights in zip(first["names"], first["weights"], strict=True):
        if name in place:
            active = masks.active[-1, place[name]]
            explored = masks.explored[-1, place[name]]
            rows.append((short(name, 60), *row_of(weights, active, explored)))
        else:
            rows.append((short(name, 60), f"{weights:,}", f"{weights:,}", "no mask", ""))
    total = row_of(masks.weights.sum(), masks.active[-1].sum(), masks.explored[-1].sum())
    rows.append(("all masks", *total))

    is_open = " open" if len(rows) <= OPEN_LAYERS else ""
    note = f"{len(rows) - 2} layers, as the run left them at step {history.end:,.0f}"
    summary = f'<summary class="note">{note}</summary>'
    content = f"<details{is_open}>{summary}{table(rows, total=True)}</details>"
    return block("layers", "Layers", content, "wide")


def row_of(weights: float, active: float, explored: float) -> tuple[str, ...]:
    """Format the numbers of a masked layer."""
    sparsity, share = 1 - active / weights, explored / weights
    return f"{weights:,.0f}", f"{active:,.0f}", in_digits(sparsity), in_digits(share)


def settings(history: History) -> str:
    """Write the resolved recipe."""
    return block("settings", "Settings", f"<pre>{html.escape(history.recipe_text)}</pre>")


def final_numbers(history: History) -> str:
    """Write the last numbers, under their names in metrics.jsonl, and the versions."""
    rows = [f"<tr><th>metric</th><th>after epoch {history.epochs[-1]['epoch']:,}</th></tr>"]
    for key, value in history.last.items():
        if value is None:  # the rate of masks that never move
            continue
        name, text = html.escape(key), html.escape(f"{rounded(value)} {UNITS.get(key, '')}".strip())
        rows.append(f'<tr><td>{name}</td><td data-number="{name}">{text}</td></tr>')

    made_with = (history.beginning or {}).get("made_with", {})
    versions = ""
    if made_with:
        versions = table([("made with", ""), *((key, str(made_with[key])) for key in made_with)])
    note = '<p class="note">Rounded; metrics.jsonl has all digits of every epoch.</p>'
    content = f"<table>{''.join(rows)}</table>{note}{versions}"
    return block("numbers", "Final numbers and versions", content)


def rounded(value: float) -> str:
    """Write a number with five significant digits, or up to the unit if it is larger.

    >>> rounded(0.004255815534729902), rounded(3880.0494), rounded(123456.78), rounded(3800)
    ('0.0042558', '3,880', '123,457', '3,800')
    >>> rounded(float("nan"))
    'nan'
    """
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.5g}"


def table(rows: Sequence[tuple[str, ...]], total: bool = False) -> str:
    """Write a table of texts; the first row is its head, the last one may be the total."""
    lines = []
    for number, row in enumerate(rows):
        kind = "th" if number == 0 else "td"
        cells = "".join(f"<{kind}>{html.escape(cell)}</{kind}>" for cell in row)
        is_total = total and number == len(rows) - 1
        lines.append(f'<tr class="all">{cells}</tr>' if is_total else f"<tr>{cells}</tr>")
    return f"<table>{''.join(lines)}</table>"
