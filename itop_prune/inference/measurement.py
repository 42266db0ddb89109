"""What functions take and how far their outputs are apart, and what `deploy` found with both, as a table."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only


@dataclass(frozen=True)
class Choice:
    """How one masked weight is computed with."""

    name: str
    shape: tuple[int, ...]
    density: float
    kernel: str
    """One of `itop_prune.inference.deployment.CHOICES`."""
    dense_seconds: float
    """Of the dense layer in one forward; 0 where it was not timed."""
    seconds: float
    """Of the layer as it was chosen."""
    why: str = ""
    """Why there was no choice but the dense layer."""


@dataclass(frozen=True)
class Report:
    """What `deploy` chose and measured; `str(report)` is a table."""

    choices: tuple[Choice, ...]
    shapes: tuple[tuple[int, ...], ...]
    """Of the example's tensors."""
    threads: int
    dense_seconds: float
    """Of a forward of the dense model."""
    seconds: float
    """Of the deployed one."""
    difference: float
    """Between their outputs, as a share of the dense one's norm."""
    fallback: str = ""
    """Why all of the model stayed dense, against what the layers alone said."""

    @property
    def speedup(self) -> float:
        """How many times as fast as the dense model."""
        return self.dense_seconds / self.seconds

    def cells(self) -> list[tuple[str, ...]]:
        """Return the table as text: a header, a line per layer, the whole model."""
        lines: list[tuple[str, ...]] = [
            ("weight", "shape", "density", "choice", "dense", "deployed", "speed-up", "")
        ]
        for row in self.choices:
            shape = "×".join(map(str, row.shape))
            numbers = _numbers(row.dense_seconds, row.seconds)
            lines.append((row.name, shape, f"{row.density:.4f}", row.kernel, *numbers, row.why))
        return [
            *lines,
            ("whole model", "", "", "", *_numbers(self.dense_seconds, self.seconds), self.fallback),
        ]

    def __str__(self) -> str:
        lines = self.cells()
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)][:-1]
        text = [
            "  ".join([a.ljust(widths[0]), *map(str.rjust, rest, widths[1:]), why])
            for a, *rest, why in lines
        ]
        where = f"inputs of {', '.join(map(str, self.shapes))}, threads: {self.threads}"
        tail = f"measured with {where}; others give the same outputs. Difference of outputs: {self.difference:.1e}"
        return "\n".join([*map(str.rstrip, text), tail])


def _numbers(dense: float, seconds: float) -> tuple[str, str, str]:
    return (
        (f"{1e3 * dense:.3f} ms", f"{1e3 * seconds:.3f} ms", f"{dense / seconds:.2f}")
        if seconds
        else ("", "", "")
    )


def in_turns(
    functions: Mapping[str, Callable[[], object]],
    at_least: int,
    within: float,
    of: Callable[[list[float]], float],
    wait: Callable[[], object] = lambda: None,
    in_a_row: int = 1,
) -> dict[str, float]:
    """Call functions in turns, after one call of each that does not count, and reduce the seconds of a call of each.

    Args: functions: By name. at_least: So many rounds; at most 1000. within: So many seconds, if
        more rounds fit. of: What reduces the seconds of the rounds: `min`, `statistics.median`.
        wait: Called before the clock is read: for a device that computes on its own. in_a_row: So
        many calls between two looks at the clock: such a device begins with one while the host
        prepares the next.
    """
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    until = time.perf_counter() + within
    for turn in range(1000):
        if turn >= at_least and time.perf_counter() > until:
            break
        for name, function in functions.items():
            wait()
            began = time.perf_counter()
            for _ in range(in_a_row):
                function()
            wait()
            taken[name].append((time.perf_counter() - began) / in_a_row)
    return {name: of(seconds) for name, seconds in taken.items()}


def copied(arguments: Any) -> Any:
    """Return arguments with copies of their tensors, for a forward that writes into its inputs."""
    return tree_map_only(Tensor, torch.clone, arguments)


def tensors_in(values: Any) -> list[Tensor]:
    """Return all tensors of nested containers, dataclasses among them, in order.

    >>> [tuple(tensor.shape) for tensor in tensors_in({"y": [torch.zeros(2), 3], "z": (torch.zeros(1, 4),)})]
    [(2,), (1, 4)]
    """
    found = []
    for leaf in tree_leaves(values):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif is_dataclass(leaf):
            found += tensors_in([getattr(leaf, field.name) for field in fields(leaf)])
    return found


def difference(ours: Any, theirs: Any) -> float:
    """Return the norm of the difference of all tensors as a share of theirs; NaN where there is nothing to compare.

    An infinity where theirs is the same one makes no difference.

    >>> difference({"y": torch.tensor([3.0, 4.5]), "n": 1}, {"y": torch.tensor([3.0, 4.0]), "n": 2})
    0.1
    """
    pairs = [
        (a.double(), b.double()) for a, b in zip(tensors_in(ours), tensors_in(theirs), strict=True)
    ]
    apart = sum(float((a - b)[a != b].square().sum()) for a, b in pairs)
    size = sum(float(b[b.isfinite()].square().sum()) for _, b in pairs)
    return 0.0 if pairs and apart == 0 else math.sqrt(apart / size) if size else math.nan
