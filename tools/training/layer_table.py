"""The table of layers on a terminal, which is rarely as high as a model has layers."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from rich.table import Table

from itop_prune import Summary
from itop_prune.analysis.memory import Memory
from itop_prune.analysis.summary import Row
from itop_prune.messages import in_digits


def layer_table(summary: Summary) -> Table:
    """Build the table of layers for rich."""
    return _table(f"sparsity {in_digits(summary.sparsity)}", summary.cells())


def memory_table(memory: Memory) -> Table:
    """Build the table of what training keeps in memory."""
    return _table("", memory.cells())


def _table(title: str, cells: Sequence[Sequence[str]]) -> Table:
    """Build a table of a header, rows and a total."""
    header, *rows, total = cells
    table = Table(title=title or None, show_footer=True, header_style="bold", box=None)
    for index, (name, footer) in enumerate(zip(header, total, strict=True)):
        is_name = index == 0
        justify: Literal["left", "right"] = "left" if is_name else "right"
        table.add_column(name, footer=footer, justify=justify, no_wrap=not is_name)
    for row in rows:
        table.add_row(*row)
    return table


def grouped(summary: Summary, most: int) -> Summary:
    """Join layers of one block until the table has at most so many rows.

    Blocks are those of the names: layer1.0, or all of layer1 if these are still too many. The sums
    stay what they are.
    """
    rows = summary.rows
    depth = max((row.name.count(".") for row in rows), default=0)
    while len(rows) > most and depth:
        groups: dict[tuple[str, bool], list[Row]] = {}
        for row in summary.rows:
            block = ".".join(row.name.split(".")[:depth])
            groups.setdefault((block, row.masked), []).append(row)
        rows = tuple(joined(members, f"{block}.*") for (block, _), members in groups.items())
        depth -= 1

    # A model without blocks: the first layers, and the rest as one.
    if len(rows) > max(2, most):
        kept = max(1, most - 1)
        rows = (*rows[:kept], joined(rows[kept:], "others"))
    return replace(summary, rows=rows)


def joined(rows: Sequence[Row], name: str) -> Row:
    """Sum up rows as one; a single row stays as it is."""
    if len(rows) == 1:
        return rows[0]

    explored = [row.explored for row in rows if row.explored is not None]
    computes = {row.computes for row in rows}
    return Row(
        f"{name} ({len(rows)})",
        (),
        weights=sum(row.weights for row in rows),
        active=sum(row.active for row in rows),
        explored=sum(explored) if len(explored) == len(rows) else None,
        masked=rows[0].masked,
        computes=computes.pop() if len(computes) == 1 else "both",
    )
