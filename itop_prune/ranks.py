"""What all ranks of a data-parallel training must agree on before masks move. Without torch.distributed: one rank."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn


@dataclass(frozen=True)
class State:
    """What one look at the device and all ranks found."""

    finite: bool
    """All masked weights and all their gradients, on every rank."""
    any_gradient: bool
    """Whether any masked weight has a gradient that is not 0, on any rank."""
    has_gradient: dict[str, bool]
    """On any rank, by name."""
    active: dict[str, int]
    """Weights, by name."""


def world_size() -> int:
    """Return the number of ranks."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def examine(
    parameters: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor], dense: Mapping[str, Tensor | None] | None
) -> State:
    """Look at all masked layers together: one exchange between ranks, one transfer from the device.

    Args:
        parameters: The masked parameters by name, at least one.
        masks: Their masks.
        dense: The dense gradients where growth needs them; a layer without one has no gradient then.
    """
    sparse = {name: parameter.grad for name, parameter in parameters.items()}
    gradients = sparse if dense is None else dense
    device = next(iter(masks.values())).device

    def largest(tensors: Iterable[Tensor | None]) -> Tensor:
        norms = [torch.linalg.vector_norm(t, math.inf).double().to(device) for t in tensors if t is not None]
        return torch.stack([torch.zeros((), dtype=torch.float64, device=device), *norms]).amax()

    stepped = largest(sparse.values())
    seen = torch.stack([stepped, largest(parameters.values()), largest(gradients.values())])
    present = torch.tensor([gradients[name] is not None for name in masks], device=device)
    active = torch.stack([mask.count_nonzero().to(device) for mask in masks.values()])
    report = torch.cat([~seen.isfinite().all().view(1), (stepped != 0).view(1), present, active])
    if world_size() > 1:
        distributed.all_reduce(report, distributed.ReduceOp.MAX)
    bad, any_gradient, *rest = report.tolist()
    has_gradient = dict(zip(masks, map(bool, rest[: len(masks)]), strict=True))
    return State(not bad, bool(any_gradient), has_gradient, dict(zip(masks, rest[len(masks) :], strict=True)))


def check_equal(masks: Mapping[str, Tensor]) -> None:
    """Compare a checksum of every mask over the ranks.

    Raises:
        RuntimeError: Masks differ, with their names.
    """
    if world_size() == 1:
        return
    lowest = torch.stack([_checksum(mask) for mask in masks.values()])
    if distributed.get_backend() == "nccl":  # which can't exchange what is not on a GPU
        lowest = lowest.cuda()
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
    if world_size() > 1:
        distributed.all_reduce(gradient)
        gradient /= world_size()
    return gradient
