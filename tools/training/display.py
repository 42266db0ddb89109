"""What a run shows: on a terminal a live display, in a pipe or a log file one plain line an epoch."""

import io
import math
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from itop_prune import Summary

SHOWN = {  # metric: label, format
    "train_loss": ("loss", "{:.4f}"),
    "val_loss": ("val loss", "{:.4f}"),
    "val_top1": ("val top-1", "{:.2f} %"),
    "test_loss": ("test loss", "{:.4f}"),
    "test_top1": ("test top-1", "{:.2f} %"),
    "lr": ("lr", "{:.5g}"),
    "rate": ("rate", "{:.4f}"),
    "sparsity": ("sparsity", "{:.4f}"),
    "exploration_rate": ("R_s", "{:.4f}"),
    "survival": ("survival", "{:.4f}"),
    "train_flops": ("train FLOPs", "{:.4f}"),
    "images_per_second": ("images/s", "{:,.0f}"),
}
CURVES = ("train_loss", "val_top1", "exploration_rate")
REFRESH_SECONDS = 0.25


def in_words(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return label and text of the metrics that are shown, in the order of `SHOWN`."""
    return [
        (label, form.format(metrics[key]))
        for key, (label, form) in SHOWN.items()
        if metrics.get(key) is not None
    ]


def line(metrics: Mapping[str, Any]) -> str:
    """Return the metrics as one line of text."""
    return "  ".join(f"{label} {text}" for label, text in in_words(metrics))


def counted(number: int, what: str) -> str:
    """Return a number of things in words.

    >>> counted(1, "update"), counted(1200, "update")
    ('1 update', '1,200 updates')
    """
    return f"{number:,} {what}{'s' * (number != 1)}"


def sparkline(values: list[float], width: int = 40) -> str:
    """Return numbers as a line of little bars, the lowest to the highest; of many every second, third, ...

    >>> sparkline([0.0, 1.0, 2.0, 7.0])
    '▁▂▃█'
    """
    values = values[:: -max(1, -(-len(values) // width))][::-1]  # the newest is among them
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    scale = 7 / (high - low) if high > low else 0.0
    return "".join(
        "▁▂▃▄▅▆▇█"[round(scale * (value - low))] if math.isfinite(value) else "×"
        for value in values
    )


def draws(console: Console) -> bool:
    """Return whether a console is a terminal that can be drawn on, whatever FORCE_COLOR says of a log."""
    return console.is_interactive and console.file.isatty()


class Display:
    """Progress of a run, as a context. Only the main process speaks."""

    def __init__(
        self, title: str, epochs: int, total_steps: int, done: int = 0, speaks: bool = True
    ) -> None:
        if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
            sys.stdout.reconfigure(
                errors="replace"
            )  # a terminal that knows no "▁" or "×" must not end a run
        self.console = Console(quiet=not speaks, highlight=False, emoji=False, soft_wrap=True)
        self._title, self._epochs, self._refreshed = title, epochs, 0.0
        self._history: list[Mapping[str, Any]] = []
        columns = (
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
        )
        self._progress = Progress(
            *columns, TimeRemainingColumn(), console=self.console, expand=True
        )
        self._task = self._progress.add_task("", total=total_steps, completed=done)
        self._live: Live | None = None
        if draws(self.console) and speaks:
            self._live = Live(console=self.console, auto_refresh=False, transient=True)

    def __enter__(self) -> "Display":
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.stop()

    def is_due(self) -> bool:
        """Return whether it is time to draw: numbers cost a look at the device."""
        return self._live is not None and time.monotonic() - self._refreshed > REFRESH_SECONDS

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Draw the state after a step."""
        if self._live:
            self._progress.update(self._task, completed=step)
            self._live.update(self._drawing(metrics), refresh=True)
            self._refreshed = time.monotonic()

    def remember(self, metrics: Mapping[str, Any]) -> None:
        """Take over an epoch of before a resume, for the curves."""
        self._history.append(metrics)

    def epoch(self, metrics: Mapping[str, Any]) -> None:
        """Show the metrics of a finished epoch."""
        self.remember(metrics)
        if not self._live:
            self.say(f"epoch {metrics['epoch']}/{self._epochs}  {line(metrics)}")

    def finish(self, metrics: Mapping[str, Any], seconds: float) -> None:
        """Show the end of a run."""
        self.say(f"{line(metrics)}  in {seconds:.0f} s; {self._title}")

    def say(self, text: str) -> None:
        """Print a line, above the live display if there is one."""
        self.console.print(text, markup=False)

    def table(self, summary: Summary) -> None:
        """Print the table of layers."""
        if not any(row.masked for row in summary.rows):
            self.say("no masked layers: a dense model")
        elif not draws(self.console):
            self.say(str(summary))
        else:
            self.console.print(layers(summary))
            for text in summary.cost():
                self.say(text)

    def _drawing(self, metrics: Mapping[str, Any]) -> RenderableType:
        merged = {**(self._history[-1] if self._history else {}), **metrics}
        numbers = Table.grid(padding=(0, 3), expand=True)
        words = [("epoch", f"{metrics['epoch']}/{self._epochs}"), *in_words(merged)]
        for start in range(0, len(words), 4):
            numbers.add_row(
                *(f"[dim]{label}[/] [bold]{text}[/]" for label, text in words[start : start + 4])
            )
        curves = Table.grid(padding=(0, 2))
        for key in CURVES:
            values = [past[key] for past in self._history if past.get(key) is not None]
            if len(values) > 1:
                curves.add_row(f"[dim]{SHOWN[key][0]}[/]", f"[cyan]{sparkline(values)}[/]")
        return Panel(
            Group(numbers, curves, self._progress), title=Text(self._title), border_style="dim"
        )


def layers(summary: Summary) -> Table:
    """Return the table of layers as rich draws it."""
    header, *rows, total = summary.cells()
    table = Table(
        title=f"sparsity {summary.sparsity:.4f}", show_footer=True, header_style="bold", box=None
    )
    for place, (name, last) in enumerate(zip(header, total, strict=True)):
        table.add_column(name, footer=last, justify="left" if place == 0 else "right")
    for row in rows:
        table.add_row(*row)
    return table
