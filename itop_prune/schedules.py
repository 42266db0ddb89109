"""Schedules: progress in [0, 1] -> factor in [0, 1]. They say how the rate falls from its first value to its last."""

import math
from collections.abc import Callable

Schedule = Callable[[float], float]


def constant(progress: float) -> float:
    """Return 1: the rate never falls (SET)."""
    return 1.0


def linear(progress: float) -> float:
    """Return 1 - progress.

    >>> linear(0.25)
    0.75
    """
    return 1.0 - progress


def cosine(progress: float) -> float:
    """Return (1 + cos(pi * progress)) / 2: slow, fast, slow (Dettmers & Zettlemoyer, 2019, arXiv 1907.04840).

    >>> [round(cosine(p), 3) for p in (0.0, 0.25, 0.5, 1.0)]
    [1.0, 0.854, 0.5, 0.0]
    """
    return (1.0 + math.cos(math.pi * progress)) / 2.0


SCHEDULES: dict[str, Schedule] = {"constant": constant, "linear": linear, "cosine": cosine}
