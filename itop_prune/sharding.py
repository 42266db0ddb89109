"""Tensors of which every rank holds a part (FSDP2's DTensors): seen whole where masks are decided, written in parts.

Masks themselves are whole on every rank: a byte per weight, and no exchange before a forward.
"""

from typing import Any

from torch import Tensor


def is_sharded(tensor: Any) -> bool:
    """Return whether a rank holds only a part of the tensor; told by what it can do, for the import takes long."""
    return isinstance(tensor, Tensor) and hasattr(tensor, "full_tensor")


def whole(tensor: Any) -> Tensor:
    """Return the tensor whole on every rank: all of them must ask."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def local(tensor: Any) -> Tensor:
    """Return the part that this rank holds, the same memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def like(tensor: Tensor, other: Any) -> Tensor:
    """Return a tensor that is whole on every rank laid out as another one of its shape is; nothing is sent."""
    if not is_sharded(other):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)
