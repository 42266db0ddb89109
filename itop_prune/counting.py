"""Numbers of many tensors, for which the host waits once: how many weights are active in each mask, and others."""

from collections.abc import Hashable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from itop_prune import topology
from itop_prune.ranking import ones

Key = TypeVar("Key", bound=Hashable)


def active_in(mask: Tensor) -> Tensor:
    """Return how many positions are active, on the mask's device: elsewhere than on a CPU a sum is one kernel less.

    >>> active_in(torch.tensor([[True, False], [True, True]]))
    tensor(3)
    """
    return ones(mask) if mask.device.type in topology.ANSWERS_AT_ONCE else mask.sum()


def count_each(masks: Mapping[str, Tensor]) -> dict[str, int]:
    """Return how many positions of each mask are active; the host waits for the device once.

    >>> count_each({"a": torch.tensor([True, False]), "b": torch.tensor([False])})
    {'a': 1, 'b': 0}
    """
    return fetched({name: active_in(mask) for name, mask in masks.items()})


def fetched(tensors: Mapping[Key, Tensor]) -> dict[Key, Any]:
    """Return the values of tensors of one shape, wherever they lie; the host waits for the device once.

    >>> fetched({"a": torch.tensor([1, 2]), "b": torch.tensor([3, 4])})
    {'a': [1, 2], 'b': [3, 4]}
    """
    if not tensors:
        return {}
    device = next(iter(tensors.values())).device
    return dict(
        zip(
            tensors,
            torch.stack([tensor.to(device) for tensor in tensors.values()]).tolist(),
            strict=True,
        )
    )
