"""Initialization: what becomes of the present weights when a layer gets its first mask."""

from typing import Literal

import torch
from torch import Tensor

from itop_prune.messages import nearest

Init = Literal["keep", "fan_in"]
INITS = ("keep", "fan_in")

KEPT = ("magnitude", "nonzero")
"""Scores that keep weights for their values."""


def fan_in_factors(mask: Tensor, input_dims: tuple[int, ...]) -> Tensor:
    """Compute sqrt(fan_in / k) for each output, with k of its fan_in inputs active.

    A layer draws weights of the variance gain / fan_in. Times the factor of their output they have
    gain / k. The output then has the variance that it has in the dense layer.

    Args:
        mask: Bool, of any shape.
        input_dims: The dimensions along which the inputs of one output lie.

    Returns:
        float32, of the mask's shape with 1 in the place of each input dimension. 1 where an output
        has no active input.

    Reference: Evci et al., "Gradient Flow in Sparse Neural Networks and How Lottery Tickets Win",
    2022, arXiv 2010.03533. There weights are drawn anew, with the variance gain / k.

    >>> mask = torch.tensor([[True, False, False, False], [True] * 4, [False] * 4])
    >>> fan_in_factors(mask, input_dims=(1,)).tolist()
    [[2.0], [1.0], [1.0]]
    """
    active = mask.sum(input_dims, keepdim=True)
    fan_in = mask.numel() // max(1, active.numel())
    factors = (fan_in / active.clamp(min=1)).sqrt()
    return torch.where(active > 0, factors, 1.0)


def check_init(init: object, scores: object, method: object) -> None:
    """Refuse an unknown name, and "fan_in" where the masks keep weights for their values.

    Raises:
        ValueError: As above.
    """
    if init not in INITS:
        raise ValueError(
            f"unknown init {init!r}; known are {', '.join(INITS)}{nearest(init, INITS)}"
        )
    if init == "keep":
        return
    for argument, value in {"scores": scores, "method": method}.items():
        if isinstance(value, str) and value in KEPT:
            raise ValueError(
                f"{argument} is {value!r}, which keeps weights for their values, and "
                f"init={init!r} would change them: leave init out, or {argument}"
            )
