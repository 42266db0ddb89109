"""SET and RigL in plain loops over lists, written from the papers alone; nothing of the package.

SET: Mocanu et al., 2018, arXiv 1707.04780. RigL: Evci et al., 2020, arXiv 1911.11134.
"""

import math
from dataclasses import dataclass, field


@dataclass
class Layer:
    """The weights of one layer, flattened, and which are active."""

    weights: list[float]
    active: list[bool]
    velocity: list[float] = field(default_factory=list)

    def train(self, gradient: list[float], lr: float, momentum: float) -> None:
        """Take a step of SGD with the active weights."""
        self.velocity = self.velocity or [0.0] * len(self.weights)
        for i, on in enumerate(self.active):
            if on:
                self.velocity[i] = momentum * self.velocity[i] + gradient[i]
                self.weights[i] -= lr * self.velocity[i]

    def smallest(self, candidates: list[int], count: int) -> set[int]:
        """Find the weights that are nearest to 0."""
        return set(sorted(candidates, key=lambda i: abs(self.weights[i]))[:count])

    def exchange(self, gone: set[int], grown: set[int]) -> None:
        """Move the mask. A weight that leaves or enters is 0; one that does both stays."""
        for i in gone ^ grown:
            self.active[i] = i in grown
            self.weights[i] = self.velocity[i] = 0.0

    def rigl(self, gradient: list[float], share: float) -> None:
        """Drop the smallest weights; grow where the gradient is largest among all not active."""
        on = [i for i, is_on in enumerate(self.active) if is_on]
        count = math.ceil(share * len(on))
        gone = self.smallest(on, count)
        candidates = [i for i, is_on in enumerate(self.active) if not is_on or i in gone]
        grown = set(sorted(candidates, key=lambda i: -abs(gradient[i]))[:count])
        self.exchange(gone, grown)

    def set_drops(self, share: float) -> tuple[set[int], set[int]]:
        """Find what SET must drop and what it may: the same share of each sign, nearest to 0.

        Rounding adds up to two weights of a sign. A weight of 0 has no sign and goes first, in
        place of another.
        """
        may = {i for i, on in enumerate(self.active) if on and self.weights[i] == 0}
        must, none = set[int](), len(may)
        for sign in (1.0, -1.0):
            group = [i for i, on in enumerate(self.active) if on and self.weights[i] * sign > 0]
            count = math.floor(share * len(group))
            must |= self.smallest(group, max(0, count - none))
            may |= self.smallest(group, count + 2)
        return must, may


def cosine(share: float, step: int, end: int) -> float:
    """Compute the share that an update exchanges; RigL lets it fall to 0."""
    return share / 2 * (1 + math.cos(math.pi * step / end))
