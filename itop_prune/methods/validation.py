"""Checks of values that a user gives."""

from collections.abc import Callable
from numbers import Integral, Real
from typing import TypeGuard

import torch
from torch import Tensor

from itop_prune.messages import describe


def is_count(value: object) -> bool:
    """Tell whether a value is a whole number from 1, and no bool."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def is_number(value: object) -> TypeGuard[float]:
    """Tell whether a value is a real number, NumPy's too, and no bool."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_plain(value: object) -> TypeGuard[Tensor]:
    """Tell whether a value is a dense tensor with values."""
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return False
    return not (value.is_meta or value.is_quantized or value.is_nested)


def checked_seed(seed: object) -> int:
    """Convert a seed to a plain whole number.

    Raises:
        ValueError: It is none.
    """
    if not isinstance(seed, Integral) or isinstance(seed, bool):
        raise ValueError(f"seed is {seed!r}; allowed is a whole number")
    return int(seed)


def checked_device(device: object) -> torch.device:
    """Convert a device, or its name, to a device.

    Raises:
        ValueError: It is none.
    """
    try:
        found = torch.device(device)  # type: ignore[call-overload]
    except (RuntimeError, TypeError):
        found = torch.device("meta")
    if found.type == "meta":
        raise ValueError(f"device is {device!r}; allowed is one with memory, such as 'cpu'")
    return found


def check_scores(
    scores: object, mask: Tensor, criterion: Callable[..., object], where: str = ""
) -> None:
    """Refuse scores that are not one number per position of a mask, on its device."""
    right = isinstance(scores, Tensor) and scores.shape == mask.shape
    if not right or scores.device != mask.device:  # type: ignore[attr-defined]
        seen = repr(scores)
        if isinstance(scores, Tensor):
            seen = f"{tuple(scores.shape)} on {scores.device}"
        raise ValueError(
            f"{describe(criterion)} gave {seen}{where}; it must give one score per weight, "
            f"{tuple(mask.shape)} on {mask.device}"
        )
