"""Redistribution: which layers get the weights that grow at an update.

A redistribution is a function whose parameter names say what it needs, each a mapping by layer. It
returns a number from 0 by layer. The weights that grow are shared out in proportion to these
numbers, exactly, and no layer gets more than it has room for.

| name | what it is |
|---|---|
| `weights` | how many weights the layer has |
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
    """Share by mean momentum: layers whose weights would reduce the loss most get most.

    Reference: sparse momentum (SNFS), Dettmers & Zettlemoyer, 2019, arXiv 1907.04840; the name is
    that of their code.

    >>> momentum({"conv": 0.3, "fc": 0.1})
    {'conv': 0.3, 'fc': 0.1}
    """
    return momentum


def magnitude(magnitude: Statistics) -> Statistics:
    """Share by mean magnitude: layers whose weights have grown large get most.

    Reference: in the code of sparse momentum, Dettmers & Zettlemoyer, 2019, arXiv 1907.04840.

    >>> magnitude({"conv": 0.3, "fc": 0.1})
    {'conv': 0.3, 'fc': 0.1}
    """
    return magnitude


def nonzeros(active: Statistics) -> Statistics:
    """Share by the number of active weights: layers that have many get most.

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
