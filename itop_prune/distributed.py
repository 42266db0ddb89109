"""What the ranks of a data-parallel training must agree on. Without torch.distributed: one rank."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, distributed, nn

from itop_prune.messages import listed
from itop_prune.sharding import BITS, is_sharded, local, whole

CHUNK = 1 << 22
"""How many numbers a checksum takes in at a time."""


class RanksDiffer(RuntimeError):
    """Ranks hold different numbers; the message names them and is the same on all ranks."""


class UpdateInputs(NamedTuple):
    """What `inspect` found in the masked layers, equal on all ranks."""

    finite: bool
    """Whether all masked weights and all their gradients are finite, on every rank."""
    any_gradient: bool
    """Whether any masked weight has a nonzero gradient, on any rank."""
    has_gradient: dict[str, bool]
    """By name: whether any rank has a gradient."""
    zero_gradient: list[str]
    """Names of the layers whose gradient is 0 everywhere, on all ranks."""
    active: dict[str, int]
    """By name: how many weights are active."""


def world_size() -> int:
    """Count the ranks."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    return 1


def is_first() -> bool:
    """Tell whether this is the first of all ranks, which warns and prints for them."""
    return world_size() == 1 or distributed.get_rank() == 0


def inspect(
    parameters: Mapping[str, nn.Parameter],
    counts: Mapping[str, Tensor],
    dense: Mapping[str, Tensor | None] | None,
) -> UpdateInputs:
    """Inspect all masked layers, with one exchange between ranks and one transfer from the device.

    Args:
        parameters: The masked parameters by name, at least one.
        counts: How many of their weights are active, as tensors on their devices.
        dense: The dense gradients if growth needs them. A layer without one then has no gradient.
    """
    sparse = {name: parameter.grad for name, parameter in parameters.items()}
    gradients = sparse if dense is None else dense
    device = next(iter(counts.values())).device

    def largest(tensors: Mapping[str, Tensor | None]) -> Tensor:
        return torch.stack([_largest(tensor).to(device) for tensor in tensors.values()])

    stepped, dense_sizes = largest(sparse), largest(gradients)
    sizes = torch.stack([stepped, largest(parameters), dense_sizes])
    facts = [
        (~sizes.isfinite()).any().view(1),
        (stepped != 0).any().view(1),
        dense_sizes != 0,
        torch.tensor([gradients[name] is not None for name in counts], device=device),
        torch.stack([count.to(device) for count in counts.values()]),
    ]
    report = torch.cat(facts)  # whole numbers
    if world_size() > 1:
        distributed.all_reduce(report, distributed.ReduceOp.MAX)

    bad, any_gradient, *rest = report.tolist()
    count = len(counts)
    nonzero = dict(zip(counts, rest[:count], strict=True))
    present = dict(zip(counts, rest[count : 2 * count], strict=True))
    return UpdateInputs(
        finite=not bad,
        any_gradient=bool(any_gradient),
        has_gradient={name: bool(present[name]) for name in counts},
        zero_gradient=[name for name in counts if present[name] and not nonzero[name]],
        active=dict(zip(counts, rest[2 * count :], strict=True)),
    )


def _largest(tensor: Tensor | None) -> Tensor:
    """Compute the largest absolute value: finite if all are, 0 if all are or nothing is there."""
    part = None if tensor is None else local(tensor.detach())
    if part is None or not part.numel():
        return torch.zeros(())
    smallest, largest = part.aminmax()  # both are NaN if any value is
    return torch.maximum(-smallest, largest).float()


def check_equal_masks(masks: Mapping[str, Tensor]) -> None:
    """Compare the masks over the ranks before they are trained.

    Raises:
        RanksDiffer: Some differ; the message names them and says what to do.
    """
    check_equal(
        {f"mask of {name}": mask for name, mask in masks.items()},
        "call apply with one seed on all ranks, and where scores depend on the weights, on the "
        "same weights",
    )


def check_equal(tensors: Mapping[str, Tensor], advice: str) -> None:
    """Compare a checksum of every tensor over the ranks; sharded tensors are left out.

    Raises:
        RanksDiffer: Some differ; the message names them and ends with the advice.
    """
    tensors = {name: tensor for name, tensor in tensors.items() if not is_sharded(tensor)}
    if world_size() == 1 or not tensors:
        return

    device = next(iter(tensors.values())).device
    lowest = torch.stack([checksum(tensor).to(device) for tensor in tensors.values()])
    if distributed.get_backend() == "nccl":  # it exchanges tensors on GPUs only
        lowest = lowest.cuda()
    highest = lowest.clone()
    distributed.all_reduce(lowest, distributed.ReduceOp.MIN)
    distributed.all_reduce(highest, distributed.ReduceOp.MAX)

    equal = (lowest == highest).tolist()
    differing = [name for name, same in zip(tensors, equal, strict=True) if not same]
    if differing:
        raise RanksDiffer(f"ranks hold different {listed(differing)}; {advice}")


def checksum(tensor: Tensor) -> Tensor:
    """Compute a number that depends on every bit and its position; integers may overflow."""
    bits = tensor.detach().flatten().view(BITS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for start in range(0, len(bits), CHUNK):
        part = bits[start : start + CHUNK].long()
        weight = torch.arange(start, start + len(part), device=bits.device)
        weight = weight * 6364136223846793005 + 1442695040888963407
        weight = (weight ^ (weight >> 29)) * 7046029254386353131  # not linear in the position
        total += ((part + 1) * (weight ^ (weight >> 32))).sum()
    return total


def mean(gradient: Tensor) -> Tensor:
    """Average a gradient over the ranks, whole."""
    if is_sharded(gradient):  # FSDP2 has averaged it already
        return whole(gradient)
    if world_size() > 1:
        distributed.all_reduce(gradient)
        gradient /= world_size()
    return gradient
