"""What the masks have been: which weights were ever active (R_s), which entered, which survived."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from itop_prune.layers.handle import ITOP
from itop_prune.topology import count_true


class Exploration:
    """Records every update, at a byte per weight, and another byte if survival is counted.

    R_s is the share of the masked weights that were active at least once (Liu et al., 2021, arXiv
    2102.02887). Exploration is reliable if new weights are trained long enough to compete at the
    next pruning. Many of them then survive. A weight that is pruned and grown again in one update
    never left, so it has survived.
    """

    def __init__(self, masks: Mapping[str, ITOP], survival: bool) -> None:
        self.explored = {name: itop.mask.clone() for name, itop in masks.items()}
        """By name, bool: was active at least once."""
        self._entered: dict[str, int] = {}  # {} before the first update
        self._counts_survival = survival
        self._grown: dict[str, Tensor] = {}  # bool: grew at the last update
        self._grown_before: dict[str, Tensor] = {}  # at the update before
        self._survived: dict[
            str, tuple[int, int]
        ] = {}  # of those: how many are left, how many grew

    def of(self, name: str, mask: Tensor) -> Tensor:
        """Look up what was explored of a layer, on the device of its mask."""
        explored = self.explored[name] = self.explored[name].to(mask.device)
        return explored

    def begin_update(self) -> None:
        """Begin an update, in which layers without a record gain no weights."""
        self._grown_before, self._grown = self._grown, {}
        self._entered, self._survived = {}, {}

    def record(self, name: str, before: Tensor, after: Tensor) -> None:
        """Record an update of one layer: its mask before and after."""
        self.of(name, after).logical_or_(before).logical_or_(after)
        entered = after & ~before
        self._entered[name] = count_true(entered)

        if self._counts_survival:
            self._grown[name] = entered
        grown = self._grown_before.pop(name, None)
        if grown is not None:
            left = count_true(grown.to(after.device) & after)
            self._survived[name] = (left, count_true(grown))

    def rate(self) -> float:
        """Compute R_s."""
        total = sum(explored.numel() for explored in self.explored.values())
        return sum(count_true(explored) for explored in self.explored.values()) / total

    def entered(self) -> dict[str, int]:
        """Count, by layer, the weights that entered its mask at the last update; {} before one."""
        if not self._entered:
            return {}
        return dict.fromkeys(self.explored, 0) | self._entered

    def survival_rates(self) -> dict[str, float]:
        """Compute, by layer, the share of the last update but one's new weights that are left.

        Layers in which nothing grew, or that were not updated twice, are left out.
        """
        rates = {}
        for name in self.explored:
            left, grown = self._survived.get(name, (0, 0))
            if grown:
                rates[name] = left / grown
        return rates

    def survival_rate(self) -> float:
        """Compute the share of all layers together; NaN if nothing grew."""
        left = sum(left for left, _ in self._survived.values())
        grown = sum(grown for _, grown in self._survived.values())
        return left / grown if grown else math.nan

    def state_dict(self) -> dict[str, Any]:
        """Copy the records."""
        state: dict[str, Any] = {
            "explored": {name: explored.clone() for name, explored in self.explored.items()},
            "entered": self.entered(),
        }
        if self._counts_survival:
            state["survival"] = {
                "grown": {name: tensor.clone() for name, tensor in self._grown.items()},
                "counts": dict(self._survived),
            }
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` copied."""
        for name, explored in self.explored.items():
            explored.copy_(state["explored"][name])
        self._entered = dict(state.get("entered", {}))
        if self._counts_survival and "survival" in state:
            survival = state["survival"]
            self._grown = {name: tensor.clone() for name, tensor in survival["grown"].items()}
            self._survived = {name: tuple(pair) for name, pair in survival["counts"].items()}
