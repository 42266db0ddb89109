"""Numbers that a user gives, checked: what was seen, what is allowed."""

from collections.abc import Callable
from numbers import Integral, Real
from typing import TypeGuard

from torch import Tensor

from itop_prune.methods.lookup import describe


def check_steps(total_steps: int, every: int) -> None:
    """Refuse counts of steps that are not whole numbers from 1."""
    for name, steps in {"total_steps": total_steps, "every": every}.items():
        if not is_count(steps):
            raise ValueError(
                f"{name} is {steps!r}; allowed are whole numbers from 1: it counts optimizer steps"
            )


def check_rates(stop: float, rate: float, min_rate: float, may_rest: bool) -> None:
    """Refuse shares that are out of range, and a rate of 0 where nothing else would move."""
    if not is_number(stop) or not 0.0 < stop <= 1.0:
        raise ValueError(f"stop is {stop!r}; allowed is a number in (0, 1]")
    if not is_number(rate) or not 0.0 <= rate <= 1.0 or (rate == 0.0 and not may_rest):
        raise ValueError(
            f"rate is {rate!r}; allowed is a number in (0, 1], or 0 with final_sparsity"
        )
    if not is_number(min_rate) or not 0.0 <= min_rate <= rate:
        raise ValueError(
            f"min_rate is {min_rate!r}; allowed is a number in [0, rate], and rate is {rate}"
        )


def check_scores(
    scores: object, mask: Tensor, criterion: Callable[..., object], where: str = ""
) -> None:
    """Refuse scores that are not one number per position of a mask, on its device."""
    if not isinstance(scores, Tensor) or scores.shape != mask.shape or scores.device != mask.device:
        seen = (
            f"{tuple(scores.shape)} on {scores.device}"
            if isinstance(scores, Tensor)
            else repr(scores)
        )
        raise ValueError(
            f"{describe(criterion)} gave {seen}{where}; it must give one score per weight, "
            f"{tuple(mask.shape)} on {mask.device}"
        )


def is_count(value: object) -> bool:
    """Return whether a value is a whole number from 1, and no bool."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def is_number(value: object) -> TypeGuard[float]:
    """Return whether a value is a real number, NumPy's among them, and no bool."""
    return isinstance(value, Real) and not isinstance(value, bool)


def checked_seed(seed: object) -> int:
    """Return a seed as a plain whole number.

    Raises:
        ValueError: It is none.
    """
    if not isinstance(seed, Integral) or isinstance(seed, bool):
        raise ValueError(f"seed is {seed!r}; allowed is a whole number")
    return int(seed)
