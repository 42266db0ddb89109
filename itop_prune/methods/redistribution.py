"""Redistribution: which layers get the weights that grow at an update, in place of those that each has pruned.

A redistribution is a function whose parameter names say what it needs, each a mapping by layer;
back comes a number by layer, from 0. The total is shared out in proportion to them, exactly, and no
layer gets more than it has room for.

| name | what it is |
|---|---|
| `weights` | how many weights it has |
| `active` | how many are active, before the update |
| `pruned` | how many this update prunes |
| `magnitude` | mean abs(weight) of the active ones |
| `momentum` | mean abs(moving average of the gradient) of the active ones |
"""

from collections.abc import Callable, Mapping

Statistics = Mapping[str, float]
Redistribution = Callable[..., Statistics]

OFFERED = ("weights", "active", "pruned", "magnitude", "momentum")


def momentum(momentum: Statistics) -> Statistics:
    """Return the mean momentum: to layers whose weights would reduce the loss most.

    Reference: sparse momentum (SNFS), Dettmers & Zettlemoyer, 2019, arXiv 1907.04840; their code
    calls it momentum.

    >>> momentum({"conv": 0.3, "fc": 0.1})
    {'conv': 0.3, 'fc': 0.1}
    """
    return momentum


def magnitude(magnitude: Statistics) -> Statistics:
    """Return the mean magnitude: to layers whose weights have grown large.

    Reference: in the code of sparse momentum, Dettmers & Zettlemoyer, 2019, arXiv 1907.04840.

    >>> magnitude({"conv": 0.3, "fc": 0.1})
    {'conv': 0.3, 'fc': 0.1}
    """
    return magnitude


def nonzeros(active: Statistics) -> Statistics:
    """Return the number of active weights: to layers that have many.

    Reference: in the code of sparse momentum, Dettmers & Zettlemoyer, 2019, arXiv 1907.04840.

    >>> nonzeros({"conv": 30, "fc": 10})
    {'conv': 30, 'fc': 10}
    """
    return active


REDISTRIBUTIONS: dict[str, Redistribution] = {
    "momentum": momentum,
    "magnitude": magnitude,
    "nonzeros": nonzeros,
}
