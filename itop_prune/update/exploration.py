"""What the masks have been: which weights were ever active (R_s), which entered, which survived."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from itop_prune import bits
from itop_prune.layers.handle import ITOP
from itop_prune.topology import count_true


class Explored(Mapping[str, Tensor]):
    """By name: which weights were active at least once. It holds bits and gives bool tensors."""

    def __init__(self, masks: Mapping[str, ITOP]) -> None:
        self.bits = {name: bits.pack(itop.mask) for name, itop in masks.items()}
        self.shapes = {name: itop.shape for name, itop in masks.items()}

    def __getitem__(self, name: str) -> Tensor:
        return bits.unpack(self.bits[name], self.shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.bits)

    def __len__(self) -> int:
        return len(self.bits)

    def add(self, name: str, mask: Tensor) -> None:
        """Add the active weights of a mask, on its device."""
        self.bits[name] = self.bits[name].to(mask.device) | bits.pack(mask)

    def rate(self) -> float:
        """Compute R_s."""
        total = sum(math.prod(shape) for shape in self.shapes.values())
        return sum(bits.count(packed) for packed in self.bits.values()) / total


class Exploration:
    """Records every update, at a bit per weight, and another byte if survival is counted.

    R_s is the share of the masked weights that were active at least once (Liu et al., 2021, arXiv
    2102.02887). Exploration is reliable if new weights are trained long enough to compete at the
    next pruning. Many of them then survive. A weight that is pruned and grown again in one update
    never left, so it has survived.
    """

    def __init__(self, masks: Mapping[str, ITOP], survival: bool) -> None:
        self.explored = Explored(masks)
        self._entered: dict[str, int] = {}  # {} before the first update
        self._counts_survival = survival
        self._grown: dict[str, Tensor] = {}  # bool: grew at the last update
        self._grown_before: dict[str, Tensor] = {}  # at the update before
        # Of those: how many are left, how many grew.
        self._survived: dict[str, tuple[int, int]] = {}

    def begin_update(self) -> None:
        """Begin an update, in which layers without a record gain no weights."""
        self._grown_before, self._grown = self._grown, {}
        self._entered, self._survived = {}, {}

    def record(self, name: str, before: Tensor, after: Tensor) -> None:
        """Record an update of one layer: its mask before and after."""
        self.explored.add(name, before | after)
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
        return self.explored.rate()

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
            "shapes": dict(self.explored.shapes),
            "explored": {name: packed.clone() for name, packed in self.explored.bits.items()},
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
        for name, packed in self.explored.bits.items():
            packed.copy_(state["explored"][name])
        self._entered = dict(state.get("entered", {}))
        if self._counts_survival and "survival" in state:
            survival = state["survival"]
            self._grown = {name: tensor.clone() for name, tensor in survival["grown"].items()}
            self._survived = {name: tuple(pair) for name, pair in survival["counts"].items()}
