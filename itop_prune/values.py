"""Numbers that a user gives, checked: what was seen, what is allowed."""

from collections.abc import Callable
from numbers import Integral

from torch import Tensor

from itop_prune.menu import describe


def check_steps(total_steps: int, every: int, gradient_steps: int) -> None:
    """Refuse counts of steps that are not whole numbers from 1, and more steps of gradients than between updates."""
    for name, steps in {"total_steps": total_steps, "every": every, "gradient_steps": gradient_steps}.items():
        if not isinstance(steps, Integral) or isinstance(steps, bool) or steps < 1:
            raise ValueError(f"{name} is {steps!r}; allowed are whole numbers from 1: it counts optimizer steps")
    if gradient_steps > every:
        raise ValueError(f"gradient_steps is {gradient_steps}; allowed is up to every, {every}: those before an update")


def check_shares(
    stop: float, rate: float, min_rate: float, final_sparsity: float | None, floor: float, scope: str
) -> None:
    """Refuse shares that are out of range, and a rate of 0 where nothing else would move."""
    if not is_number(stop) or not 0.0 < stop <= 1.0:
        raise ValueError(f"stop is {stop!r}; allowed is a number in (0, 1]")
    if final_sparsity is not None and (not is_number(final_sparsity) or not 0.0 <= final_sparsity < 1.0):
        raise ValueError(f"final_sparsity is {final_sparsity!r}; allowed is a number in [0, 1), or None")
    if not is_number(rate) or not 0.0 <= rate <= 1.0 or (rate == 0.0 and final_sparsity is None):
        raise ValueError(f"rate is {rate!r}; allowed is a number in (0, 1], or 0 with final_sparsity")
    if not is_number(min_rate) or not 0.0 <= min_rate <= rate:
        raise ValueError(f"min_rate is {min_rate!r}; allowed is a number in [0, rate], and rate is {rate}")
    if scope not in ("layer", "global"):
        raise ValueError(f"scope is {scope!r}; allowed are 'layer' and 'global'")
    if not is_number(floor) or not 0.0 <= floor < 1.0 or (floor and scope == "layer"):
        raise ValueError(f"floor is {floor!r}; allowed is a number in [0, 1), with scope='global'")


def check_scores(scores: object, mask: Tensor, criterion: Callable[..., object], where: str, needs: str) -> None:
    """Refuse scores that are not one number per position of a mask, on its device; `needs` says who needs them."""
    if not isinstance(scores, Tensor) or scores.shape != mask.shape or scores.device != mask.device:
        seen = f"{tuple(scores.shape)} on {scores.device}" if isinstance(scores, Tensor) else repr(scores)
        raise ValueError(
            f"{describe(criterion)} gave {seen}{where}; {needs} one score per weight, "
            f"{tuple(mask.shape)} on {mask.device}"
        )


def is_number(value: object) -> bool:
    """Return whether a value is an int or a float, and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
