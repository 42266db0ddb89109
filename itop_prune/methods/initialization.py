"""Initialization: what becomes of the present weights when a layer gets its first mask."""

import math
from typing import Literal

import torch
from torch import Tensor

from itop_prune.messages import nearest

Init = Literal["keep", "fan_in"]
INITS = ("keep", "fan_in")

KEPT = ("magnitude", "nonzero")
"""Scores that keep weights for their values."""


def fan_in_factors(
    positions: Tensor, shape: tuple[int, ...], input_dims: tuple[int, ...]
) -> Tensor:
    """Compute sqrt(fan_in / k) for each active weight, with k of its output's fan_in inputs active.

    A layer draws weights of the variance gain / fan_in. Times the factor of their output they have
    gain / k. The output then has the variance that it has in the dense layer.

    Args:
        positions: (active,), in the flattened weight, none of them twice.
        shape: Of the weight.
        input_dims: The dimensions along which the inputs of one output lie.

    Returns:
        (active,), float32.

    Reference: Evci et al., "Gradient Flow in Sparse Neural Networks and How Lottery Tickets Win",
    2022, arXiv 2010.03533. There weights are drawn anew, with the variance gain / k.

    >>> positions = torch.tensor([0, 4, 5, 6, 7])
    >>> fan_in_factors(positions, (3, 4), input_dims=(1,)).tolist()
    [2.0, 1.0, 1.0, 1.0, 1.0]
    """
    output, outputs, step = torch.zeros_like(positions, dtype=torch.int64), 1, 1
    for dim in reversed(range(len(shape))):
        if dim not in input_dims:
            output += positions.long() // step % shape[dim] * outputs
            outputs *= shape[dim]
        step *= shape[dim]
    active = torch.bincount(output, minlength=outputs).index_select(0, output)
    fan_in = math.prod(shape[dim] for dim in input_dims)
    return (fan_in / active).sqrt()


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
