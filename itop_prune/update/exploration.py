"""What the masks have been: which weights were ever active (R_s), which entered, which survived."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from itop_prune import bits
from itop_prune.layers.handle import ITOP
from itop_prune.methods.validation import is_count
from itop_prune.sparse_topology import contains
from itop_prune.topology import count_true, true_positions

BUDGET = 1 << 30
"""Bytes for a bit of every place, unless MaskScheduler is told another number."""
SMALL = 1 << 20
"""Layers of so many weights or fewer have a bit of every place in any case."""
SCATTER = 0x9E3779B97F4A7C15 - (1 << 64)
"""A number of a block times it, its middle bits taken, looks like chance (Knuth, TAOCP 6.4)."""


class Explored(Mapping[str, Tensor]):
    """By name: which weights were active at least once. It holds bits and gives bool tensors.

    If bits of all places take more than the budget, large layers are cut into blocks of n places.
    One place of each block has a bit, drawn by the number of the block. Their counts are estimates.
    """

    def __init__(self, masks: Mapping[str, ITOP], budget: int = BUDGET) -> None:
        if not is_count(budget):
            raise ValueError(
                f"explored_bytes is {budget!r}; allowed are whole numbers from 1, bytes for R_s"
            )
        self.shapes = {name: itop.shape for name, itop in masks.items()}
        self.sizes = {name: itop.size for name, itop in masks.items()}
        block = max(1, -(-sum(self.sizes.values()) // (8 * budget)))
        self.blocks = {name: 1 if size <= SMALL else block for name, size in self.sizes.items()}
        """How many places share a bit; 1: none do."""
        self.bits: dict[str, Tensor] = {}
        for name, itop in masks.items():
            length = -(-self.places(name) // 8)
            self.bits[name] = torch.zeros(length, dtype=torch.uint8, device=itop.buffer.device)
            self.add(name, itop.active_positions())

    def places(self, name: str) -> int:
        """Count the places of a layer that have a bit."""
        return max(1, self.sizes[name] // self.blocks[name])

    @property
    def exact(self) -> bool:
        """Whether every place has a bit."""
        return all(block == 1 for block in self.blocks.values())

    def __getitem__(self, name: str) -> Tensor:
        if self.blocks[name] > 1:
            raise ValueError(
                f"{name} has {self.sizes[name]:,} weights, and one of {self.blocks[name]:,} is "
                "counted as explored or not; give MaskScheduler a larger explored_bytes"
            )
        return bits.unpack(self.bits[name], self.shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.bits)

    def __len__(self) -> int:
        return len(self.bits)

    def add(self, name: str, seen: Tensor) -> None:
        """Add what is active, on its device: a mask, or positions."""
        self.bits[name] = self.bits[name].to(seen.device)
        if seen.dtype == torch.bool and self.blocks[name] == 1:
            self.bits[name] |= bits.pack(seen)
            return
        positions = true_positions(seen.flatten()) if seen.dtype == torch.bool else seen
        bits.put(self.bits[name], self._places_of(name, positions))

    def _places_of(self, name: str, positions: Tensor) -> Tensor:
        """Find the bits of positions, where they have one."""
        block = self.blocks[name]
        if block == 1:
            return positions
        number = positions.long() // block
        drawn = ((number * SCATTER) >> 32 & 0x7FFFFFFF) % block
        sampled = (positions.long() % block == drawn) & (number < self.places(name))
        return number.masked_select(sampled)

    def holds(self, name: str, positions: Tensor) -> bool:
        """Tell whether positions are explored, as far as they have a bit."""
        places = self._places_of(name, positions)
        byte = self.bits[name].to(places.device).index_select(0, places >> 3)
        return bool(((byte >> (places & 7)) & 1).all())

    def count(self, name: str) -> int:
        """Count the explored weights of a layer; an estimate if places share a bit."""
        return round(self._share(name) * self.sizes[name])

    def _share(self, name: str) -> float:
        """Compute the explored share of the places of a layer that have a bit."""
        return bits.count(self.bits[name]) / self.places(name)

    def rate(self) -> float:
        """Compute R_s."""
        return sum(map(self.count, self)) / sum(self.sizes.values())

    def error(self) -> float:
        """Compute the standard error of `rate`; 0 if every place has a bit."""
        variance = 0.0
        for name, size in self.sizes.items():
            if self.blocks[name] > 1:
                share = self._share(name)
                variance += size**2 * share * (1.0 - share) / self.places(name)
        return math.sqrt(variance) / sum(self.sizes.values())


class Exploration:
    """Records every update, at a bit per weight, and eight bytes per new one for survival.

    R_s is the share of the masked weights that were active at least once (Liu et al., 2021, arXiv
    2102.02887). Exploration is reliable if new weights are trained long enough to compete at the
    next pruning. Many of them then survive. A weight that is pruned and grown again in one update
    never left, so it has survived.
    """

    def __init__(self, masks: Mapping[str, ITOP], survival: bool, budget: int = BUDGET) -> None:
        self.explored = Explored(masks, budget)
        self._entered: dict[str, int] = {}  # {} before the first update
        self._counts_survival = survival
        self._grown: dict[str, Tensor] = {}  # positions that grew at the last update, rising
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
            flat = after.flatten()
            self._record_survival(
                name, true_positions(entered.flatten()), lambda grown: flat[grown.to(flat.device)]
            )

    def record_positions(self, name: str, before: Tensor, after: Tensor, entered: Tensor) -> None:
        """Record the same of positions alone, none of them -1; those that entered rise."""
        self.explored.add(name, before)
        self.explored.add(name, entered)
        self._entered[name] = len(entered)
        if self._counts_survival:
            rising = after.sort().values
            self._record_survival(
                name, entered.long(), lambda grown: contains(rising, grown.to(rising.device))
            )

    def _record_survival(
        self, name: str, entered: Tensor, is_active: Callable[[Tensor], Tensor]
    ) -> None:
        self._grown[name] = entered
        grown = self._grown_before.pop(name, None)
        if grown is not None:
            self._survived[name] = (count_true(is_active(grown)), len(grown))

    def rate(self) -> float:
        """Compute R_s."""
        return self.explored.rate()

    def error(self) -> float:
        """Compute the standard error of R_s."""
        return self.explored.error()

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
