"""What all ranks of a data-parallel training must agree on before masks move. Without torch.distributed: one rank."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from itop_prune.mask import ITOP


@dataclass(frozen=True)
class State:
    """What one look at the device and all ranks found."""

    finite: bool
    """All masked weights and all their gradients, on every rank."""
    has_gradient: dict[str, bool]
    """On any rank, by name."""
    active: dict[str, int]
    """Weights, by name."""


def count() -> int:
    """Return the number of ranks."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def inspect(masks: Mapping[str, ITOP], dense: Mapping[str, Tensor | None] | None) -> State:
    """Look at all masked layers together: one exchange between ranks, one transfer from the device.

    Args:
        masks: By name, at least one.
        dense: The dense gradients where growth needs them; a layer without one has no gradient then.
    """
    parameters = [itop.parameter for itop in masks.values()]
    sparse = {name: itop.parameter.grad for name, itop in masks.items()}
    gradients = sparse if dense is None else dense
    numbers = [tensor for tensor in (*parameters, *sparse.values(), *gradients.values()) if tensor is not None]
    device = numbers[0].device
    largest = torch.stack([torch.linalg.vector_norm(tensor, math.inf).double().to(device) for tensor in numbers])
    present = torch.tensor([gradients[name] is not None for name in masks], device=device)
    active = torch.stack([itop.mask.count_nonzero().to(device) for itop in masks.values()])
    report = torch.cat([~largest.isfinite().all().view(1), present, active])
    if count() > 1:
        distributed.all_reduce(report, distributed.ReduceOp.MAX)
    bad, *rest = report.tolist()
    has_gradient = dict(zip(masks, map(bool, rest[: len(masks)]), strict=True))
    return State(not bad, has_gradient, dict(zip(masks, rest[len(masks) :], strict=True)))


def check_equal(masks: Mapping[str, ITOP]) -> None:
    """Compare a checksum of every mask over the ranks.

    Raises:
        RuntimeError: Masks differ, with their names.
    """
    if count() == 1:
        return
    lowest = torch.stack([_checksum(itop.mask) for itop in masks.values()])
    highest = lowest.clone()
    distributed.all_reduce(lowest, distributed.ReduceOp.MIN)
    distributed.all_reduce(highest, distributed.ReduceOp.MAX)
    equal = (lowest == highest).tolist()
    if differing := [name for name, same in zip(masks, equal, strict=True) if not same]:
        raise RuntimeError(
            f"ranks hold different masks of {', '.join(differing[:5])}; call apply with one seed on all ranks, and "
            "where scores depend on the weights, on the same weights"
        )


def _checksum(mask: Tensor) -> Tensor:
    """Return a number that depends on which positions are active; integers wrap around on purpose."""
    return (mask.flatten().nonzero() * 6364136223846793005 + 1442695040888963407).pow(3).sum()


def mean(gradient: Tensor | None, mask: Tensor) -> Tensor:
    """Return the mean of a gradient over the ranks; one that is None here, and not elsewhere, counts as zeros."""
    if gradient is None:
        gradient = torch.zeros_like(mask, dtype=torch.float32)
    if count() > 1:
        distributed.all_reduce(gradient)
        gradient /= count()
    return gradient
