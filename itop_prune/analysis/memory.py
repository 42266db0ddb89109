"""What training keeps in memory of the masked weights: dense, with masks, and in sparse storage."""

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from itop_prune.layers.handle import ITOP
from itop_prune.layers.sparse_storage import position_type
from itop_prune.memory import in_bytes
from itop_prune.messages import aligned
from itop_prune.update.exploration import BUDGET
from itop_prune.update.optimizer_state import statistics

FORMS = ("dense", "masks", "sparse")


@dataclass(frozen=True)
class Memory:
    """Bytes by what they hold, each (dense, masks, sparse); `str(memory)` is a table.

    They are kept from step to step. Activations come on top, and one dense weight at a time where a
    layer computes with it. Dense gradients come on top on the steps that an update needs. On a CPU
    the orders of kernels take 16 bytes for an active weight.
    """

    rows: Mapping[str, tuple[int, int, int]]

    @property
    def totals(self) -> tuple[int, int, int]:
        """The sums of the rows."""
        dense, masks, sparse = (sum(column) for column in zip(*self.rows.values(), strict=True))
        return dense, masks, sparse

    def cells(self) -> list[tuple[str, ...]]:
        """Make the cells of the table: a header, a line per row, the total."""
        lines = [(name, *map(in_bytes, row)) for name, row in self.rows.items()]
        return [("memory of training", *FORMS), *lines, ("total", *map(in_bytes, self.totals))]

    def __str__(self) -> str:
        return "\n".join(aligned(self.cells()))


def memory(masks: Mapping[str, ITOP], optimizer: Optimizer, others: int = 0) -> Memory | None:
    """Compute what training keeps of the masked weights in each storage.

    Args:
        masks: Of the model.
        optimizer: Tells how many numbers it keeps of each weight.
        others: Bytes of all other parameters.

    Returns:
        The table; None if the optimizer's numbers can't be found before its first step.
    """
    numbers = statistics_per_weight(optimizer, masks)
    if numbers is None:
        return None

    dense = active = positions = 0
    for itop in masks.values():
        size, count = itop.parameter.element_size(), itop.active
        dense, active = dense + size * itop.size, active + size * count
        positions += position_type(itop.size).itemsize * count
    weights = sum(itop.size for itop in masks.values())
    explored = min(BUDGET, math.ceil(weights / 8))
    each = {"weights": 1, "gradients": 1, "optimizer state": numbers}
    rows = {name: (count * dense, count * dense, count * active) for name, count in each.items()}
    rows["masks, positions"] = (0, weights, positions)
    rows["explored weights"] = (0, explored, explored)
    rows["all of other parameters"] = (others * (2 + numbers),) * 3
    return Memory(rows)


def statistics_per_weight(optimizer: Optimizer, masks: Mapping[str, ITOP]) -> int | None:
    """Count the numbers that an optimizer keeps of each weight; None if that can't be found.

    Before its first step an optimizer of its class takes one with a weight of its own.
    """
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):  # Accelerate's wrapper
        optimizer = optimizer.optimizer  # type: ignore[attr-defined]
    for itop in masks.values():
        if itop.parameter in optimizer.state:
            return len(statistics(optimizer, itop.parameter))

    tried = nn.Parameter(torch.zeros(1, 8))
    tried.grad = torch.zeros(1, 8)
    kind: Any = type(optimizer)
    known = inspect.signature(kind).parameters
    try:
        arguments = {key: value for key, value in optimizer.defaults.items() if key in known}
        twin = kind([tried], **arguments)
        twin.step()
    except Exception:  # its arguments are not its defaults, or it wants more than a step
        return None
    return len(statistics(twin, tried))
