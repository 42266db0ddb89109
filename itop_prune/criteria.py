"""Criteria: one score per weight. The smallest are pruned, the largest grow.

A criterion is a function whose parameter names say what it needs, each a tensor of the weight's shape (or a generator):

| name | what it is |
|---|---|
| `weight` | the parameter, float32 |
| `mask` | bool, True = active |
| `grad` | the dense gradient of this step, float32: sum over micro-batches, mean over ranks, scaled by a GradScaler |
| `explored` | bool, True = was active at least once |
| `generator` | a `torch.Generator` on the mask's device, equal on all ranks |

Asking for `grad` is all it takes to get it: the scheduler reads the signature and listens on the steps that need it.
"""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from itop_prune.menu import choose

Criterion = Callable[..., Tensor]

OFFERED = ("weight", "mask", "grad", "explored", "generator")


def magnitude(weight: Tensor) -> Tensor:
    """Return |w|: the smallest weights matter least (Zhu & Gupta, 2017, arXiv 1710.01878)."""
    return weight.abs()


def gradient(grad: Tensor) -> Tensor:
    """Return |dL/dw|, dense: where the loss would fall fastest (RigL: Evci et al., 2020, arXiv 1911.11134)."""
    return grad.abs()


def random(mask: Tensor, generator: torch.Generator) -> Tensor:
    """Return uniform numbers in [0, 1): all have the same chance (SET: Mocanu et al., 2018, arXiv 1707.04780)."""
    return torch.rand(mask.shape, generator=generator, device=mask.device)


CRITERIA: dict[str, Criterion] = {"magnitude": magnitude, "gradient": gradient, "random": random}


def find(criterion: str | Criterion, role: str) -> tuple[Criterion, tuple[str, ...]]:
    """Return the criterion behind a name or a function, and the names that it asks for.

    Args:
        criterion: A key of `CRITERIA`, or a function of some of `OFFERED`.
        role: "prune" or "grow", for the message.

    Raises:
        ValueError: The name is unknown, or the function asks for something that is not offered.
    """
    function = choose(criterion, CRITERIA, role)
    parameters = inspect.signature(function).parameters.values()
    needs = tuple(p.name for p in parameters if p.default is p.empty)  # one with a default is the function's own
    for name in needs:
        choose(name, dict.fromkeys(OFFERED), f"parameter of the {role} criterion {describe(function)}")
    return function, needs


def describe(function: Callable[..., object]) -> str:
    """Return the name of a function, for a `repr` or a message."""
    return getattr(function, "__name__", repr(function))
