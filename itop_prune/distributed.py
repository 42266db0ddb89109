"""What all ranks of a data-parallel training must agree on before masks move. Without torch.distributed: one rank."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, distributed, nn

from itop_prune import topology
from itop_prune.counting import active_in
from itop_prune.layers.maskable import unwrap
from itop_prune.layers.masked_layer import masked_names
from itop_prune.layers.sharding import BITS, is_sharded, local, whole
from itop_prune.methods.lookup import listed


class RanksDiffer(RuntimeError):
    """Ranks hold different numbers; the message names them and is the same on all ranks."""


class State(NamedTuple):
    """What one look at the device and all ranks found."""

    finite: bool
    """All masked weights and all their gradients, on every rank."""
    any_gradient: bool
    """Whether any masked weight has a gradient that is not 0, on any rank."""
    has_gradient: dict[str, bool]
    """On any rank, by name."""
    silent: list[str]
    """Names of those whose gradient is 0 everywhere, on all ranks."""
    active: dict[str, int]
    """Weights, by name."""


def world_size() -> int:
    """Return the number of ranks."""
    return (
        distributed.get_world_size()
        if distributed.is_available() and distributed.is_initialized()
        else 1
    )


def is_first() -> bool:
    """Return whether this is the first of all ranks, which speaks for them."""
    return world_size() == 1 or distributed.get_rank() == 0


def examine(
    parameters: Mapping[str, nn.Parameter],
    masks: Mapping[str, Tensor],
    dense: Mapping[str, Tensor | None] | None,
) -> State:
    """Look at all masked layers together: one exchange between ranks, one transfer from the device.

    Args: parameters: The masked parameters by name, at least one. masks: Their masks. dense: The
        dense gradients where growth needs them; a layer without one has no gradient then.
    """
    sparse = {name: parameter.grad for name, parameter in parameters.items()}
    gradients = sparse if dense is None else dense
    device = next(iter(masks.values())).device

    def sizes_of(tensors: Mapping[str, Tensor | None]) -> Tensor:
        parts = {
            n: local(tensor)
            for n, tensor in tensors.items()
            if tensor is not None and local(tensor).numel()
        }
        sizes = dict(zip(parts, _sizes(list(parts.values())), strict=True))
        nothing = torch.zeros((), device=device)
        return torch.stack([sizes.get(name, nothing).to(device, torch.float32) for name in tensors])

    stepped, heard = sizes_of(sparse), sizes_of(gradients)
    finite = torch.stack([stepped, sizes_of(parameters), heard]).isfinite().all()
    present = torch.tensor([gradients[name] is not None for name in masks]).to(
        device, non_blocking=True
    )
    active = torch.stack([active_in(mask).to(device) for mask in masks.values()])
    report = torch.cat([~finite.view(1), (stepped != 0).any().view(1), heard != 0, present, active])
    if world_size() > 1:
        distributed.all_reduce(report, distributed.ReduceOp.MAX)
    bad, any_gradient, *by_layer = report.tolist()
    spoke, has, counts = (
        by_layer[start : start + len(masks)] for start in range(0, len(by_layer), len(masks))
    )
    return State(
        finite=not bad,
        any_gradient=bool(any_gradient),
        has_gradient={name: bool(gradient) for name, gradient in zip(masks, has, strict=True)},
        silent=[
            name
            for name, told, gradient in zip(masks, spoke, has, strict=True)
            if gradient and not told
        ],
        active=dict(zip(masks, counts, strict=True)),
    )


def _sizes(tensors: list[Tensor]) -> list[Tensor]:
    """Return a number for each tensor that is 0 where all of it is 0, and finite where all of it is."""
    if {tensor.device.type for tensor in tensors} <= topology.ANSWERS_AT_ONCE:
        return list(map(_size, tensors))
    return list(
        torch._foreach_norm(tensors, math.inf)
    )  # of all together, as torch does where it clips gradients


def _size(tensor: Tensor) -> Tensor:
    """Return the sum of squares, which a CPU is fastest at, or where that overflows or underflows the largest size."""
    if tensor.dtype is torch.float32:
        flat = tensor.flatten()
        if 0.0 < (total := torch.dot(flat, flat)) < math.inf:
            return total
    return torch.maximum(-tensor.amin(), tensor.amax())


def check_equal_masks(masks: Mapping[str, Tensor]) -> None:
    """Compare the masks over the ranks before they are trained.

    Raises:
        RanksDiffer: Some differ, with their names and what to do.
    """
    check_equal(
        {f"mask of {name}": mask for name, mask in masks.items()},
        "call apply with one seed on all ranks, and where scores depend on the weights, on the same weights",
    )


def check_equal(tensors: Mapping[str, Tensor], advice: str) -> None:
    """Compare a checksum of every tensor over the ranks; of one that is sharded each holds its own part.

    Raises:
        RanksDiffer: Some differ, with their names and the advice.
    """
    tensors = {name: tensor for name, tensor in tensors.items() if not is_sharded(tensor)}
    if world_size() == 1 or not tensors:
        return
    device = next(iter(tensors.values())).device
    lowest = torch.stack([checksum(tensor).to(device) for tensor in tensors.values()])
    if distributed.get_backend() == "nccl":  # which can't exchange what is not on a GPU
        lowest = lowest.cuda()
    highest = lowest.clone()
    distributed.all_reduce(lowest, distributed.ReduceOp.MIN)
    distributed.all_reduce(highest, distributed.ReduceOp.MAX)
    equal = (lowest == highest).tolist()
    if differing := [name for name, same in zip(tensors, equal, strict=True) if not same]:
        raise RanksDiffer(f"ranks hold different {listed(differing)}; {advice}")


CHUNK = 1 << 22


def checksum(tensor: Tensor) -> Tensor:
    """Return a number that depends on every bit and its place; integers wrap around on purpose."""
    bits = tensor.detach().flatten().view(BITS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for start in range(0, len(bits), CHUNK):
        part = bits[start : start + CHUNK].long()
        place = (
            torch.arange(start, start + len(part), device=bits.device) * 6364136223846793005
            + 1442695040888963407
        )
        place = (
            place ^ (place >> 29)
        ) * 7046029254386353131  # or the sum would depend on the sum of places alone
        total += ((part + 1) * (place ^ (place >> 32))).sum()
    return total


def mean(gradient: Tensor | None, mask: Tensor) -> Tensor:
    """Return the mean of a gradient over the ranks; one that is None here, and not elsewhere, counts as zeros."""
    if is_sharded(gradient):  # FSDP2 has taken the mean
        return whole(gradient)
    if gradient is None:
        gradient = torch.zeros_like(mask, dtype=torch.float32)
    if world_size() > 1:
        distributed.all_reduce(gradient)
        gradient /= world_size()
    return gradient


def leave_out_of_ddp(model: nn.Module) -> None:
    """Tell DistributedDataParallel not to send the masks around with every forward: they are equal on all ranks."""
    model, key = (
        unwrap(model),
        "_ddp_params_and_buffers_to_ignore",
    )  # what DDP reads from the module that it is given
    layers = model.named_modules()
    names = {
        f"{prefix}.{name}_mask".lstrip(".")
        for prefix, layer in layers
        for name in masked_names(layer)
    }
    if others := set(getattr(model, key, ())):
        names |= others & {
            name for name, _ in (*model.named_parameters(), *model.named_buffers())
        }  # no removed masks
    if names:
        setattr(model, key, sorted(names))
    elif hasattr(model, key):
        delattr(model, key)
