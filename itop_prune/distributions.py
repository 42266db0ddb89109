"""Distributions: how one budget of active weights is shared out over the layers. Pure Python.

A distribution is a function `(shapes, density) -> densities`: the shape of every masked weight by name and the share of
all of them that is kept, in (0, 1]; back comes the share kept in each, in [0, 1].
"""

import math
from collections.abc import Callable, Mapping

from itop_prune.menu import choose

Shapes = Mapping[str, tuple[int, ...]]
Distribution = Callable[[Shapes, float], dict[str, float]]


def uniform(shapes: Shapes, density: float) -> dict[str, float]:
    """Return the same density for every layer.

    >>> uniform({"a": (4, 3), "b": (2, 4)}, 0.5)
    {'a': 0.5, 'b': 0.5}
    """
    return dict.fromkeys(shapes, density)


def er(shapes: Shapes, density: float) -> dict[str, float]:
    """Return densities proportional to (out + in) / (out * in), Erdős-Rényi.

    Reference: SET, Mocanu et al., 2018, arXiv 1707.04780.

    >>> er({"a": (8, 8), "b": (4, 8)}, 0.5)
    {'a': 0.42857142857142855, 'b': 0.6428571428571428}
    """
    return _scaled({name: sum(shape[:2]) / math.prod(shape[:2]) for name, shape in shapes.items()}, shapes, density)


def erk(shapes: Shapes, density: float) -> dict[str, float]:
    """Return densities proportional to sum(shape) / prod(shape), Erdős-Rényi-Kernel.

    Reference: RigL, Evci et al., 2020, arXiv 1911.11134.

    >>> erk({"conv": (8, 4, 3, 3), "fc": (4, 8)}, 0.5)
    {'conv': 0.4444444444444444, 'fc': 1.0}
    """
    return _scaled({name: sum(shape) / math.prod(shape) for name, shape in shapes.items()}, shapes, density)


def _scaled(raw: Mapping[str, float], shapes: Shapes, density: float) -> dict[str, float]:
    """Return min(1, eps * raw), eps solved for the budget: who would exceed 1 is dense, eps solved again."""
    weights = {name: math.prod(shape) for name, shape in shapes.items()}
    dense: set[str] = set()
    while len(dense) < len(raw):
        budget = density * sum(weights.values()) - sum(weights[name] for name in dense)
        eps = budget / sum(raw[name] * weights[name] for name in raw if name not in dense)
        above = {name for name in raw if name not in dense and eps * raw[name] > 1.0}
        if not above:
            return {name: 1.0 if name in dense else eps * raw[name] for name in raw}
        dense |= above
    return dict.fromkeys(raw, 1.0)


DISTRIBUTIONS: dict[str, Distribution] = {"uniform": uniform, "ER": er, "ERK": erk}


def active_counts(shapes: Shapes, density: float, method: str | Distribution = "ERK") -> dict[str, int]:
    """Return how many weights of each layer are active: whole numbers that sum to exactly `round(density * total)`.

    The shares of the distribution are rounded by largest remainder: every layer gets its share to within one, and at
    least one. Only where the ones given to tiny layers exceed the budget do the largest layers pay more than one.

    Args:
        shapes: The shape of every masked weight by name.
        density: The share of all weights that is kept, in (0, 1].
        method: A key of `DISTRIBUTIONS` or a function `(shapes, density) -> densities`.

    Raises:
        ValueError: The method is unknown; its densities are not one per layer in [0, 1] or miss the budget; or the
            budget is less than one weight per layer.

    >>> active_counts({"a": (4, 3), "b": (2, 4)}, 0.45, method="uniform")
    {'a': 5, 'b': 4}
    """
    distribution = choose(method, DISTRIBUTIONS, "method")
    densities = distribution(shapes, density)
    weights = {name: math.prod(shape) for name, shape in shapes.items()}
    total = round(density * sum(weights.values()))
    _check(densities, weights, density, total)

    shares = {name: densities[name] * weights[name] for name in weights}
    counts = {name: min(weights[name], max(1, math.floor(share))) for name, share in shares.items()}
    while (left := total - sum(counts.values())) != 0:
        step = 1 if left > 0 else -1
        able = [name for name in counts if 1 <= counts[name] + step <= weights[name]]
        able.sort(key=lambda name: step * (shares[name] - counts[name]), reverse=True)
        for name in able[: abs(left)]:
            counts[name] += step
    return counts


def _check(densities: Mapping[str, float], weights: Mapping[str, int], density: float, total: int) -> None:
    if set(densities) != set(weights):
        missing, extra = sorted(set(weights) - set(densities)), sorted(set(densities) - set(weights))
        raise ValueError(f"method must give one density per layer; missing: {missing}; not masked: {extra}")
    for name, share in densities.items():
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"method gave {name} the density {share}; allowed is 0 to 1")
    kept = sum(densities[name] * weights[name] for name in weights)
    if abs(kept - total) > len(weights):
        raise ValueError(
            f"method keeps {kept:,.0f} weights, but density {density:.6g} of {sum(weights.values()):,} is {total:,}; "
            "scale its densities to the budget"
        )
    if total < len(weights):
        raise ValueError(
            f"density {density:.6g} keeps {total:,} of {sum(weights.values()):,} weights, and each of {len(weights)} "
            "layers needs at least 1; lower the sparsity or exclude layers"
        )
