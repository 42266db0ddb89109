"""Show a run: a live display on a terminal, one plain line per epoch in a pipe or log file."""

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

from ..run_folder.labels import SHOWN, labelled, summary_line
from .layer_table import grouped, layer_table, memory_table

CURVES = ("train_loss", "val_top1", "exploration_rate")
REFRESH_SECONDS = 0.25
BARS = "▁▂▃▄▅▆▇█"
MARGIN = 4
"""Free columns beside the live display, where a terminal writes ^C or ^C^C. Without them that would
start a line of its own, which is not erased."""
CELL = 24
"""Columns of a number with its label."""
LINES_AROUND_TABLE = 10
"""Title, header and total of the table of layers, the lines after it, and the prompt."""


class Display:
    """The progress of a run, as a context. It is enabled on the main process only."""

    def __init__(
        self, title: str, epochs: int, total_steps: int, done: int = 0, enabled: bool = True
    ) -> None:
        # A terminal that lacks "▁" or "×" must not end a run.
        if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
            sys.stdout.reconfigure(errors="replace")

        self.console = Console(quiet=not enabled, highlight=False, emoji=False, soft_wrap=True)
        self._title, self._epochs, self._refreshed = title, epochs, 0.0
        self._history: list[Mapping[str, Any]] = []

        self._progress = Progress(
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            expand=True,
        )
        self._task = self._progress.add_task("", total=total_steps, completed=done)

        self._live: Live | None = None
        if enabled and is_terminal(self.console):
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
        """Tell whether to draw now; computing the numbers waits for the device."""
        return self._live is not None and time.monotonic() - self._refreshed > REFRESH_SECONDS

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Draw the numbers after a step."""
        if self._live:
            self._progress.update(self._task, completed=step)
            self._live.update(self._drawing(metrics), refresh=True)
            self._refreshed = time.monotonic()

    def remember(self, metrics: Mapping[str, Any]) -> None:
        """Add an epoch from before a resume to the curves."""
        self._history.append(metrics)

    def epoch(self, metrics: Mapping[str, Any]) -> None:
        """Show the metrics of a finished epoch."""
        self.remember(metrics)
        if not self._live:
            self.say(f"epoch {metrics['epoch']}/{self._epochs}  {summary_line(metrics)}")

    def finish(self, metrics: Mapping[str, Any], seconds: float) -> None:
        """Show the final metrics of a run."""
        self.say(f"{summary_line(metrics)}  in {seconds:.0f} s; {self._title}")

    def say(self, text: str) -> None:
        """Print a line, above the live display if there is one."""
        self.console.print(text, markup=False)

    def table(self, summary: Summary, whole: str) -> None:
        """Print the table of layers; on a terminal that it does not fit, layers in groups.

        Args:
            summary: The counts of the layers.
            whole: Says where each layer has a row, for the line after groups.
        """
        if not any(row.masked for row in summary.rows):
            self.say("no masked layers: a dense model")
        elif not is_terminal(self.console):
            self.say(str(summary))
        else:
            shown = grouped(summary, self.console.height - LINES_AROUND_TABLE)
            self.console.print(layer_table(shown))
            if shown != summary:
                self.say(f"{len(summary.rows)} layers in {len(shown.rows)} rows; {whole}")
            for text in (*summary.share(), *summary.cost()):
                self.say(text)
            if summary.memory:
                self.console.print(memory_table(summary.memory))

    def _drawing(self, metrics: Mapping[str, Any]) -> RenderableType:
        latest = {**(self._history[-1] if self._history else {}), **metrics}
        cells = [("epoch", f"{metrics['epoch']}/{self._epochs}"), *labelled(latest)]
        texts = [f"[dim]{label}[/] [bold]{text}[/]" for label, text in cells]
        width = self.console.width - MARGIN
        columns = max(1, width // CELL)
        numbers = Table.grid(padding=(0, 2), expand=True)
        for start in range(0, len(texts), columns):
            numbers.add_row(*texts[start : start + columns])

        curves = Table.grid(padding=(0, 2))
        for key in CURVES:
            values = [past[key] for past in self._history if past.get(key) is not None]
            if len(values) > 1:
                curves.add_row(f"[dim]{SHOWN[key][0]}[/]", f"[cyan]{sparkline(values)}[/]")

        content = Group(numbers, curves, self._progress)
        return Panel(content, title=Text(self._title), border_style="dim", width=width)


def is_terminal(console: Console) -> bool:
    """Tell whether a console can be drawn on; FORCE_COLOR does not make a log file a terminal."""
    return console.is_interactive and console.file.isatty()


def sparkline(values: list[float], width: int = 40) -> str:
    """Draw numbers as a line of small bars; of many numbers every second, third, ...

    >>> sparkline([0.0, 1.0, 2.0, 7.0])
    '▁▂▃█'
    """
    # Take every `interval`-th from the end, so that the newest is among them.
    interval = math.ceil(len(values) / width)
    values = values[:: -max(1, interval)][::-1]

    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    scale = 7 / (high - low) if high > low else 0.0
    return "".join(
        BARS[round(scale * (value - low))] if math.isfinite(value) else "×" for value in values
    )
