"""What the masks have been: which weights were ever active (R_s), what the last update brought in, what survives."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from itop_prune.counting import active_in, count_each, fetched
from itop_prune.layers.handle import ITOP


class Exploration:
    """Takes note of every update: a byte per weight, and another one where survival is counted.

    R_s is the share of the masked weights that were active at least once (Liu et al., 2021, arXiv
    2102.02887). It tells of reliable exploration where new weights are trained long enough to
    compete at the next pruning: then many survive. A weight that is pruned and grown again at once
    never left, and has survived.
    """

    def __init__(self, masks: Mapping[str, ITOP], survival: bool) -> None:
        self.explored = {name: itop.mask.clone() for name, itop in masks.items()}
        """By name, bool: was active at least once."""
        self._entered: dict[str, Tensor] = {}
        """How many weights entered each mask at the last update, of layers that it took note of."""
        self._counts_survival = survival
        self._grown: dict[str, Tensor] = {}
        """Which weights grew at the last update."""
        self._grown_before: dict[str, Tensor] = {}
        self._survived: dict[str, Tensor] = {}
        """Of those that grew at the update before: how many are left, and how many there were."""

    def of(self, name: str, mask: Tensor) -> Tensor:
        """Return what was explored of a layer, on the device of its mask: the model may have been moved."""
        explored = self.explored[name] = self.explored[name].to(mask.device)
        return explored

    def begin(self) -> None:
        """Begin an update: in a layer of which nothing is noted, nothing enters."""
        self._grown_before, self._entered, self._grown, self._survived = self._grown, {}, {}, {}

    def note(self, name: str, before: Tensor, after: Tensor) -> None:
        """Take in an update of one layer: its mask before and after, equal where it did not move."""
        self.of(name, after).logical_or_(before).logical_or_(after)
        entered = after > before  # of bools
        self._entered[name] = active_in(entered)
        if self._counts_survival:
            self._grown[name] = entered
        if (grown := self._grown_before.pop(name, None)) is not None:
            grown = grown.to(after.device)
            self._survived[name] = torch.stack([active_in(grown & after), active_in(grown)])

    def rate(self) -> float:
        """Return R_s."""
        total = sum(explored.numel() for explored in self.explored.values())
        return sum(count_each(self.explored).values()) / total

    def entered(self) -> dict[str, int]:
        """Return by layer how many weights entered its mask at the last update; {} before there was one."""
        return dict.fromkeys(self.explored, 0) | fetched(self._entered) if self._entered else {}

    def survival_rates(self) -> dict[str, float]:
        """Return by layer what share of the weights grown at the last update but one survived the last, in [0, 1].

        Layers where nothing grew, or that were not updated twice, are left out.
        """
        counts = fetched(self._survived)
        in_order = ((name, counts[name]) for name in self.explored if name in counts)
        return {name: left / grown for name, (left, grown) in in_order if grown}

    def survival_rate(self) -> float:
        """Return the share of all layers together; NaN where there is none."""
        counts = fetched(self._survived).values()
        grown = sum(grown for _, grown in counts)
        return sum(left for left, _ in counts) / grown if grown else math.nan

    def state_dict(self) -> dict[str, Any]:
        """Return what is remembered."""
        state: dict[str, Any] = {
            "explored": {name: explored.clone() for name, explored in self.explored.items()}
        }
        state["entered"] = self.entered()
        if self._counts_survival:
            grown = {name: tensor.clone() for name, tensor in self._grown.items()}
            state["survival"] = {"grown": grown, "counts": dict(self._survived)}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            ValueError: The state is of other masks.
        """
        saved, own = (
            {name: tuple(t.shape) for name, t in e.items()}
            for e in (state["explored"], self.explored)
        )
        if saved != own:
            differing = sorted(
                name for name in saved.keys() | own.keys() if saved.get(name) != own.get(name)
            )
            raise ValueError(
                f"the state was saved for other masks; different are: {', '.join(differing)}"
            )
        for name, explored in self.explored.items():
            explored.copy_(state["explored"][name])
        self._entered = {
            name: torch.tensor(count) for name, count in state.get("entered", {}).items()
        }
        if self._counts_survival and "survival" in state:
            self._grown, self._survived = (
                {n: t.clone() for n, t in state["survival"][key].items()}
                for key in ("grown", "counts")
            )
