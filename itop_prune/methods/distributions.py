"""Distributions: how one budget of active weights is shared out over the layers. Plain numbers.

A distribution is a function `(shapes, density) -> densities`. It gets the shape of every masked
weight by name, in model order, and the share of all of them that is kept, in (0, 1]. It returns the
share kept in each, in [0, 1]. A distribution with a third parameter `fixed` gets the densities that
the user fixed, and must keep them. For the others `with_fixed` does that.
"""

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from numbers import Real

from itop_prune.messages import describe
from itop_prune.methods.lookup import lookup

Shapes = Mapping[str, tuple[int, ...]]
Distribution = Callable[[Shapes, float], dict[str, float]]
NOTHING: Mapping[str, float] = {}


def uniform(shapes: Shapes, density: float) -> dict[str, float]:
    """Give every layer the same density.

    Reference: Zhu & Gupta, "To prune, or not to prune", 2017, arXiv 1710.01878.

    >>> uniform({"a": (4, 3), "b": (2, 4)}, 0.5)
    {'a': 0.5, 'b': 0.5}
    """
    return dict.fromkeys(shapes, density)


def uniform_plus(
    shapes: Shapes, density: float, fixed: Mapping[str, float] = NOTHING
) -> dict[str, float]:
    """Keep the first layer dense and the last at least 0.2; give the others the same density.

    First and last are those of the masked layers. The user may have `fixed` some of them.

    Reference: Gale et al., "The State of Sparsity in Deep Neural Networks", 2019, arXiv 1902.09574.

    >>> uniform_plus({"first": (2, 5), "middle": (10, 10), "last": (4, 10)}, 0.2)
    {'first': 1.0, 'middle': 0.12, 'last': 0.2}
    """
    if len(shapes) == 1:
        return with_fixed(fixed, uniform)(shapes, density)

    first, *_, last = shapes
    densities = with_fixed({first: 1.0, **fixed}, uniform)(shapes, density)
    if last in fixed or densities[last] >= 0.2:
        return densities
    return with_fixed({first: 1.0, last: 0.2, **fixed}, uniform)(shapes, density)


def er(shapes: Shapes, density: float) -> dict[str, float]:
    """Share in proportion to (out + in) / (out * in), Erdős-Rényi.

    Reference: SET, Mocanu et al., 2018, arXiv 1707.04780.

    >>> er({"a": (8, 8), "b": (4, 8)}, 0.5)
    {'a': 0.42857142857142855, 'b': 0.6428571428571428}
    """
    raw = {name: sum(shape[:2]) / math.prod(shape[:2]) for name, shape in shapes.items()}
    return _in_proportion(raw, shapes, density)


def erk(shapes: Shapes, density: float, power: float = 1.0) -> dict[str, float]:
    """Share in proportion to (sum(shape) / prod(shape)) ** power, Erdős-Rényi-Kernel.

    Power 0 is uniform. For another power: `functools.partial(erk, power=0.5)`.

    Reference: RigL, Evci et al., 2020, arXiv 1911.11134; the power: their code.

    >>> erk({"conv": (8, 4, 3, 3), "fc": (4, 8)}, 0.5)
    {'conv': 0.4444444444444444, 'fc': 1.0}
    """
    raw = {name: (sum(shape) / math.prod(shape)) ** power for name, shape in shapes.items()}
    return _in_proportion(raw, shapes, density)


def erk_plus(
    shapes: Shapes, density: float, fixed: Mapping[str, float] = NOTHING
) -> dict[str, float]:
    """Share by ERK with a dense last layer, the last of the masked ones, at the same budget.

    Reference: Liu et al., "The Unreasonable Effectiveness of Random Pruning", 2022, arXiv
    2202.02643.

    >>> erk_plus({"conv": (8, 4, 3, 3), "fc": (8, 8), "head": (2, 8)}, 0.25)
    {'conv': 0.13970588235294118, 'fc': 0.5588235294117647, 'head': 1.0}
    """
    last = {list(shapes)[-1]: 1.0} if len(shapes) > 1 else {}
    return with_fixed({**last, **fixed}, erk)(shapes, density)


def with_fixed(fixed: Mapping[str, float], distribution: Distribution) -> Distribution:
    """Give some layers fixed densities, and let a distribution share the rest over the others.

    Args:
        fixed: Densities in [0, 1] by name; they count in the budget.
        distribution: Of the others, at the density that keeps the budget.

    Raises:
        ValueError: In the distribution that is returned: the fixed densities exceed the budget, or
            leave more than the other layers can hold.

    >>> with_fixed({"head": 1.0}, uniform)({"fc": (5, 8), "head": (1, 8)}, 0.5)
    {'fc': 0.4, 'head': 1.0}
    """
    if "fixed" in inspect.signature(distribution).parameters:
        return functools.partial(distribution, **{"fixed": fixed})

    def shared(shapes: Shapes, density: float) -> dict[str, float]:
        weights = {name: math.prod(shape) for name, shape in shapes.items()}
        budget = density * sum(weights.values())
        taken = sum(share * weights[name] for name, share in fixed.items())

        others = {name: shape for name, shape in shapes.items() if name not in fixed}
        room = sum(weights[name] for name in others)
        left = (budget - taken) / room if room else 0.0
        exact = room > 0 or abs(budget - taken) <= 0.5
        if not -1e-9 <= left <= 1.0 + 1e-9 or not exact:
            raise ValueError(
                f"the fixed densities keep {taken:,.0f} weights, and the budget is {budget:,.0f} "
                f"of {sum(weights.values()):,}: the other layers hold {room:,}; fix others, or "
                "change the sparsity"
            )

        shares = distribution(others, min(1.0, max(0.0, left))) if others else {}
        if not isinstance(shares, Mapping):
            return shares  # `active_counts` says what is wrong with it
        return {name: fixed[name] if name in fixed else shares[name] for name in shapes}

    shared.__name__ = describe(distribution)
    return shared


def _in_proportion(raw: Mapping[str, float], shapes: Shapes, density: float) -> dict[str, float]:
    weights = {name: math.prod(shape) for name, shape in shapes.items()}
    return scaled(raw, weights, density * sum(weights.values()))


def scaled(raw: Mapping[str, float], room: Mapping[str, int], budget: float) -> dict[str, float]:
    """Compute `min(1, eps * raw)`, the share of each layer's room, with eps solved for the budget.

    Args:
        raw: A number from 0 by name. If only layers with 0 have room left, they share by their
            room.
        room: How many places a layer has.
        budget: How many places to fill, 0 to all of them.

    >>> scaled({"a": 1.0, "b": 3.0}, {"a": 10, "b": 10}, budget=14)
    {'a': 0.4, 'b': 1.0}
    """
    full: set[str] = set()
    while len(full) < len(raw):
        left = budget - sum(room[name] for name in full)
        wanted = sum(raw[name] * room[name] for name in raw if name not in full)
        if left > 0 and wanted < 1e-200:
            raw = dict.fromkeys(raw, 1.0)
            wanted = sum(room[name] for name in raw if name not in full)

        eps = left / wanted if wanted else 0.0
        above = {name for name in raw if name not in full and eps * raw[name] > 1.0}
        if not above:
            return {name: 1.0 if name in full else eps * raw[name] for name in raw}
        full |= above
    return dict.fromkeys(raw, 1.0)


DISTRIBUTIONS: dict[str, Distribution] = {
    "uniform": uniform,
    "uniform+": uniform_plus,
    "ER": er,
    "ERK": erk,
    "ERK+": erk_plus,
}


def active_counts(
    shapes: Shapes,
    density: float,
    method: str | Distribution = "ERK",
    fixed: Mapping[str, float] = NOTHING,
) -> dict[str, int]:
    """Count the active weights of each layer; the counts sum to exactly `round(density * total)`.

    The shares of the distribution are rounded by largest remainder. Every layer gets its share to
    within one, and at least one. Only if these minimums exceed the budget do the largest layers
    lose more than one. The other layers absorb the rounding of several fixed densities.

    Args:
        shapes: The shape of every masked weight by name.
        density: The share of all weights that is kept, in (0, 1].
        method: A key of `DISTRIBUTIONS` or a function `(shapes, density) -> densities`.
        fixed: Densities of some layers, in [0, 1]. These layers keep exactly theirs, rounded.

    Raises:
        ValueError: The method is unknown; its densities are not one per layer in [0, 1] or miss the
            budget; or the budget is less than one weight per layer.

    >>> active_counts({"a": (4, 3), "b": (2, 4)}, 0.45, method="uniform")
    {'a': 5, 'b': 4}
    """
    distribution = lookup(method, DISTRIBUTIONS, "method")
    densities = (with_fixed(fixed, distribution) if fixed else distribution)(shapes, density)

    weights = {name: math.prod(shape) for name, shape in shapes.items()}
    total = round(density * sum(weights.values()))
    _check(describe(distribution), densities, weights, density, total)

    shares = {name: densities[name] * weights[name] for name in weights}
    own = {name: max(1, round(share * weights[name])) for name, share in fixed.items()}
    return apportion(shares, total, dict.fromkeys(weights, 1) | own, weights | own)


def apportion(
    shares: Mapping[str, float], total: int, least: Mapping[str, int], most: Mapping[str, int]
) -> dict[str, int]:
    """Round shares to whole numbers that sum to `total`, by largest remainder within bounds.

    If the minimums exceed the total, the largest layers give up weights first; they lose the
    smallest fraction.

    Args:
        shares: The exact share of each; they sum to about `total`.
        total: From the sum of `least` to the sum of `most`.
        least: Lower bounds.
        most: Upper bounds.

    Raises:
        ValueError: The total is out of these bounds.

    >>> least, most = {"a": 0, "b": 0, "c": 1}, {"a": 9, "b": 9, "c": 9}
    >>> apportion({"a": 2.6, "b": 2.3, "c": 0.1}, 5, least, most)
    {'a': 2, 'b': 2, 'c': 1}
    """
    if not sum(least.values()) <= total <= sum(most.values()):
        raise ValueError(
            f"{total:,} active weights can't be shared out: the layers take "
            f"{sum(least.values()):,} to {sum(most.values()):,}; change the sparsity, the fixed "
            "densities or the floor"
        )

    counts = {}
    for name, share in shares.items():
        counts[name] = min(most[name], max(least[name], math.floor(share)))

    while (left := total - sum(counts.values())) != 0:
        step = 1 if left > 0 else -1
        able = [name for name in counts if least[name] <= counts[name] + step <= most[name]]
        if step > 0:  # the largest remainder first
            able.sort(key=lambda name: shares[name] - counts[name], reverse=True)
        else:  # the smallest relative loss first
            able.sort(
                key=lambda name: (counts[name] - 1 - shares[name]) / max(shares[name], 1.0),
                reverse=True,
            )
        for name in able[: abs(left)]:
            counts[name] += step
    return counts


def _check(
    method: str, densities: object, weights: Mapping[str, int], density: float, total: int
) -> None:
    """Refuse densities that are not one per layer in [0, 1], or that miss the budget."""
    if not isinstance(densities, Mapping):
        raise ValueError(
            f"{method} gave {densities!r}; a method must give one density per layer, by name"
        )
    if set(densities) != set(weights):
        missing = sorted(set(weights) - set(densities))
        extra = sorted(set(densities) - set(weights))
        raise ValueError(
            f"{method} must give one density per layer; missing: {missing}; not masked: {extra}"
        )
    for name, share in densities.items():
        if not isinstance(share, Real) or not 0.0 <= float(share) <= 1.0:
            raise ValueError(
                f"{method} gave {name} the density {share}; allowed is a number from 0 to 1"
            )

    kept = sum(densities[name] * weights[name] for name in weights)
    if abs(kept - total) > len(weights):
        raise ValueError(
            f"{method} keeps {kept:,.0f} weights, but density {density:.6g} of "
            f"{sum(weights.values()):,} is {total:,}; scale its densities to the budget"
        )
    if total < len(weights):
        raise ValueError(
            f"density {density:.6g} keeps {total:,} of {sum(weights.values()):,} weights, and each "
            f"of {len(weights)} layers needs at least 1; lower the sparsity or exclude layers"
        )
