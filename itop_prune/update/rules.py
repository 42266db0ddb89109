"""Which weights are pruned and grown, and in which layers: the checked arguments of a run."""

from collections.abc import Mapping
from typing import NamedTuple

from itop_prune.layers.handle import ITOP
from itop_prune.memory import in_bytes, total_memory
from itop_prune.methods import criteria, redistribution
from itop_prune.methods.criteria import Criterion
from itop_prune.methods.lookup import CheckedFunction, lookup, needed_arguments
from itop_prune.methods.redistribution import Redistribution
from itop_prune.methods.validation import is_number

SCORE = 4
"""Bytes of a score."""


class Rules(NamedTuple):
    """Arguments of `MaskScheduler` that say which weights leave and enter."""

    prune: CheckedFunction
    grow: CheckedFunction
    redistribute: CheckedFunction | None
    across_layers: bool
    """Whether the lowest scores of all layers together are pruned."""
    floor: float

    @classmethod
    def of(
        cls,
        prune: str | Criterion,
        grow: str | Criterion,
        redistribute: str | Redistribution,
        scope: str,
        floor: float,
    ) -> "Rules":
        """Look up names and check values.

        Raises:
            ValueError: A name is unknown, a function asks for what is not offered, or the floor is
                out of range.
        """
        if scope not in ("layer", "global"):
            raise ValueError(f"scope is {scope!r}; allowed are 'layer' and 'global'")
        if not is_number(floor) or not 0.0 <= floor < 1.0 or (floor and scope == "layer"):
            raise ValueError(
                f"floor is {floor!r}; allowed is a number in [0, 1), with scope='global'"
            )

        checked = None
        if redistribute != "none":
            menu = {"none": redistribution.nonzeros, **redistribution.REDISTRIBUTIONS}
            function = lookup(redistribute, menu, "redistribute")
            needs = needed_arguments(function, redistribution.OFFERED, "redistribution")
            checked = CheckedFunction(function, needs)
        return cls(
            criteria.find(prune, "prune"),
            criteria.find(grow, "grow"),
            checked,
            scope == "global",
            floor,
        )

    @property
    def needs(self) -> set[str]:
        """The arguments that any of the functions asks for."""
        functions = [self.prune, self.grow]
        if self.redistribute:
            functions.append(self.redistribute)
        return {need for function in functions for need in function.needs}

    @property
    def positions_suffice(self) -> bool:
        """Whether an update looks at active weights alone, and needs no tensor of a whole layer."""
        return self.prune.function is criteria.magnitude and self.grow.function is criteria.random

    @property
    def largest_gradients_suffice(self) -> bool:
        """Whether a layer needs of a gradient as many of the largest numbers as it has weights."""
        return (
            self.grow.function is criteria.gradient
            and self.redistribute is None
            and not {"grad", "momentum"} & {*self.prune.needs}
        )

    @property
    def spare_dense(self) -> bool:
        """Whether a dense layer exchanges nothing, since what it pruned could only grow in it."""
        return self.redistribute is None

    @property
    def shares_layers(self) -> bool:
        """Whether only the sum over layers is kept, not the count of each layer."""
        return self.across_layers or self.redistribute is not None


def check_dense_tensors_fit(rules: Rules, masks: Mapping[str, ITOP]) -> None:
    """Refuse rules that look at all weights of a layer, where these take more than the memory.

    Raises:
        ValueError: As above.
    """
    weighed = rules.redistribute is not None and {"magnitude", "momentum"} & {
        *rules.redistribute.needs
    }
    if rules.positions_suffice and not weighed:
        return
    for name, itop in masks.items():
        there, needed = total_memory(itop.buffer.device), SCORE * itop.size
        if needed > there:
            raise ValueError(
                f"{name} is too large for updates that look at all of its {itop.size:,} weights: "
                f"scores of them take {in_bytes(needed)}, and {itop.buffer.device} has "
                f"{in_bytes(there)}. Take prune='magnitude', grow='random' and redistribute='none' "
                "or 'nonzeros', which look at active weights alone"
            )
