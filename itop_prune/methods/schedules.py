"""Schedules: progress in [0, 1] -> factor in [0, 1], by which a number falls to its last value.

The rate is `min_rate + (rate - min_rate) * factor`, with progress counted in steps up to `stop`.
The density is `last + (first - last) * factor`, with progress counted up to the last update. There
it is the last density whatever the factor.
"""

import functools
import math
from collections.abc import Callable, Mapping
from numbers import Real

from itop_prune.messages import describe
from itop_prune.methods.lookup import lookup
from itop_prune.methods.validation import is_number

Schedule = Callable[[float], float]


def factor(schedule: Schedule, progress: float) -> float:
    """Ask a schedule for its factor, and check it.

    Raises:
        ValueError: It is not a number in [0, 1].

    >>> factor(linear, 0.25)
    0.75
    """
    value = schedule(progress)
    if not isinstance(value, Real) or not -1e-9 <= float(value) <= 1.0 + 1e-9:
        raise ValueError(
            f"the schedule {describe(schedule)} gave {value!r} at progress {progress:g}; it must "
            "give a number in [0, 1]"
        )
    return min(1.0, max(0.0, float(value)))


def constant(progress: float) -> float:
    """Stay at 1 (SET: Mocanu et al., 2018, arXiv 1707.04780).

    >>> constant(0.5)
    1.0
    """
    return 1.0


def linear(progress: float) -> float:
    """Fall evenly: 1 - progress (RigL's appendix: Evci et al., 2020, arXiv 1911.11134).

    >>> linear(0.25)
    0.75
    """
    return 1.0 - progress


def cosine(progress: float) -> float:
    """Fall slowly, fast, slowly: (1 + cos(pi * progress)) / 2.

    Reference: Dettmers & Zettlemoyer, 2019, arXiv 1907.04840.

    >>> [round(cosine(p), 3) for p in (0.0, 0.25, 0.5, 1.0)]
    [1.0, 0.854, 0.5, 0.0]
    """
    return (1.0 + math.cos(math.pi * progress)) / 2.0


def exponential(progress: float, last: float = 0.01) -> float:
    """Lose the same share in equal times, down to `last`: last ** progress. Ours.

    >>> [round(exponential(p), 3) for p in (0.0, 0.5, 1.0)]
    [1.0, 0.1, 0.01]
    """
    return last**progress


def cubic(progress: float) -> float:
    """Fall fast while much is left: (1 - progress) ** 3.

    Reference: GMP, Zhu & Gupta, 2017, arXiv 1710.01878.

    >>> cubic(0.5)
    0.125
    """
    return power(3)(progress)


def power(exponent: float) -> Schedule:
    """Make the schedule (1 - progress) ** exponent; 1 is linear, 3 is cubic. Ours.

    Below 1 the factor falls late, above 1 early. `{"power": 1.5}` names it in a recipe.

    Raises:
        ValueError: The exponent is not a finite number above 0.

    >>> power(1.5)(0.75)
    0.125
    """
    if not is_number(exponent) or not 0.0 < exponent < math.inf:
        raise ValueError(
            f"the power of a schedule is {exponent!r}; allowed is a number above 0, such as 1.5"
        )
    schedule = functools.partial(_power, exponent=float(exponent))
    schedule.__name__ = f"power({exponent:g})"  # type: ignore[attr-defined]
    return schedule


def _power(progress: float, exponent: float) -> float:
    return (1.0 - progress) ** exponent


def alternating(progress: float, cycles: int = 4) -> float:
    """Alternate between 1 and 0 in equal phases, 0 last.

    The paper's first dense and last sparse phase are longer than the others. Here all are equal.
    For another number of cycles: `functools.partial(alternating, cycles=8)`.

    Reference: AC/DC, Peste et al., 2021, arXiv 2106.12379.

    >>> [alternating(p, cycles=2) for p in (0.0, 0.25, 0.5, 0.75, 1.0)]
    [1.0, 0.0, 1.0, 0.0, 0.0]
    """
    phase = min(2 * cycles - 1, math.floor(2 * cycles * progress + 1e-9))
    return float(phase % 2 == 0)


SCHEDULES: dict[str, Schedule] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "exponential": exponential,
    "cubic": cubic,
    "alternating": alternating,
}


def find(schedule: str | Schedule | Mapping[str, float], argument: str) -> Schedule:
    """Look up a schedule, and try it at the beginning, the middle and the end.

    Args:
        schedule: A key of `SCHEDULES`, {"power": p}, or a function of progress in [0, 1].
        argument: Its name, for a message.

    Raises:
        ValueError: The name or the power is not allowed, or the function leaves [0, 1].

    >>> find({"power": 2}, "density")(0.5)
    0.25
    """
    if isinstance(schedule, Mapping) and schedule.keys() == {"power"}:
        schedule = power(schedule["power"])
    found = lookup(schedule, SCHEDULES, argument, '; or {"power": 1.5}, or a function of progress')
    for progress in (0.0, 0.5, 1.0):
        factor(found, progress)
    return found
