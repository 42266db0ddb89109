"""What the masks have been: which weights were ever active (R_s), what the last update brought in, what survives."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from itop_prune.mask import ITOP
from itop_prune.survival import Survival


class Exploration:
    """Takes note of every update: a byte per weight, and another one where survival is counted.

    R_s is the share of the masked weights that were active at least once (Liu et al., 2021, arXiv 2102.02887).
    """

    def __init__(self, masks: Mapping[str, ITOP], survival: bool) -> None:
        self.explored = {name: itop.mask.clone() for name, itop in masks.items()}
        """By name, bool: was active at least once."""
        self._survival = Survival() if survival else None
        self._entered: dict[str, Tensor | int] = {}

    def of(self, name: str, mask: Tensor) -> Tensor:
        """Return what was explored of a layer, on the device of its mask: the model may have been moved."""
        explored = self.explored[name] = self.explored[name].to(mask.device)
        return explored

    def begin(self) -> None:
        """Begin an update: in a layer of which nothing is noted, nothing enters."""
        self._entered = dict.fromkeys(self.explored, 0)
        if self._survival:
            self._survival.begin()

    def note(self, name: str, before: Tensor, after: Tensor) -> None:
        """Take in an update of one layer: its mask before and after, equal where it did not move."""
        self.of(name, after).logical_or_(before | after)
        self._entered[name] = (after & ~before).count_nonzero()
        if self._survival:
            self._survival.note(name, before, after)

    def rate(self) -> float:
        """Return R_s."""
        total = sum(explored.numel() for explored in self.explored.values())
        return sum(int(explored.count_nonzero()) for explored in self.explored.values()) / total

    def entered(self) -> dict[str, int]:
        """Return by layer how many weights entered its mask at the last update; {} before there was one."""
        return {name: int(self._entered.get(name, 0)) for name in self.explored} if self._entered else {}

    def survival_rates(self) -> dict[str, float]:
        """Return by layer what share of the weights grown at the last update but one survived the last."""
        return self._survival.rates() if self._survival else {}

    def survival_rate(self) -> float:
        """Return the share of all layers together; NaN where there is none."""
        return self._survival.rate() if self._survival else math.nan

    def state_dict(self) -> dict[str, Any]:
        """Return what is remembered."""
        state: dict[str, Any] = {"explored": {name: explored.clone() for name, explored in self.explored.items()}}
        state["entered"] = self.entered()
        return state | ({"survival": self._survival.state_dict()} if self._survival else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            ValueError: The state is of other masks.
        """
        saved, own = ({name: tuple(t.shape) for name, t in e.items()} for e in (state["explored"], self.explored))
        if saved != own:
            differing = sorted(name for name in saved.keys() | own.keys() if saved.get(name) != own.get(name))
            raise ValueError(f"the state was saved for other masks; different are: {', '.join(differing)}")
        for name, explored in self.explored.items():
            explored.copy_(state["explored"][name])
        self._entered = dict(state.get("entered", {}))
        if self._survival and "survival" in state:
            self._survival.load_state_dict(state["survival"])
