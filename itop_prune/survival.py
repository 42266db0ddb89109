"""Reliable exploration, counted: how many of the weights that grew at an update are still there after the next one."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Survival:
    """Remembers which weights grew, a byte per weight, and what became of them.

    Exploration is reliable when a new weight is trained long enough to compete at the next pruning (Liu et al., 2021,
    arXiv 2102.02887): then many survive. A weight that is pruned and grown again at once never left: it has survived.
    """

    def __init__(self) -> None:
        self._before: dict[str, Tensor] = {}
        self._grown: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}

    def begin(self) -> None:
        """Begin an update: a layer that has no part in it is left out of the shares."""
        self._before, self._grown, self._counts = self._grown, {}, {}

    def note(self, name: str, before: Tensor, after: Tensor) -> None:
        """Take in an update of one layer: its mask before and after, equal where it did not move."""
        grown = self._before.pop(name, None)
        if grown is not None:
            self._counts[name] = torch.stack(
                [(grown.to(after.device) & after).count_nonzero(), grown.count_nonzero().to(after.device)]
            )
        self._grown[name] = after & ~before

    def rates(self) -> dict[str, float]:
        """Return by layer the share of the weights grown at the last update but one that survived the last, in [0, 1].

        Layers where nothing grew, or that were not updated twice, are left out.
        """
        counted = {name: count.tolist() for name, count in self._counts.items()}
        return {name: survived / grown for name, (survived, grown) in counted.items() if grown}

    def rate(self) -> float:
        """Return the share of all layers together; NaN until there is one."""
        survived, grown = torch.stack([c.cpu() for c in self._counts.values()] or [torch.zeros(2)]).sum(0).tolist()
        return survived / grown if grown else float("nan")

    def state_dict(self) -> dict[str, Any]:
        """Return what is remembered."""
        return {"grown": {n: t.clone() for n, t in self._grown.items()}, "counts": dict(self._counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self._grown, self._counts = ({n: t.clone() for n, t in state[key].items()} for key in ("grown", "counts"))
