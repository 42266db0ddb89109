"""What growth by gradient needs of a dense gradient: active weights, and the largest of the others.

An update grows in a layer at most as many weights as it has active ones, unless weights move
between layers or the density rises. Those that it may choose are the largest inactive ones, and
what it has just pruned. So the rest of the gradient can go as soon as it arrives.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from itop_prune import topology
from itop_prune.layers import sparse_storage
from itop_prune.layers.sparse_storage import Layout, position_type


class LargestGradients(NamedTuple):
    """The part of a dense gradient that an update can choose from; the rest counts as 0."""

    values: Tensor
    """(1, kept), float32."""
    positions: Tensor
    """(kept,), in the flattened weight."""
    layout: Layout
    """Of the weight."""

    def dense(self) -> Tensor:
        """Make the dense tensor, 0 where nothing was kept."""
        return sparse_storage.dense(self.values, self.positions, self.layout)


def keep_largest(gradient: Tensor, mask: Tensor) -> LargestGradients:
    """Keep the gradient of active weights, and as many of the largest others.

    Others that tie for the last places stay too, so an update draws among the same ones. What is
    not finite stays, so an update sees it.

    Args:
        gradient: Dense, float32.
        mask: Bool, of its shape, True = active.

    >>> gradient = torch.tensor([0.1, -5.0, 0.0, 3.0, -3.0, 0.2])
    >>> mask = torch.tensor([True, False, True, False, False, False])
    >>> keep_largest(gradient, mask).dense()
    tensor([ 0.1000, -5.0000,  0.0000,  3.0000, -3.0000,  0.0000])
    """
    sizes = gradient.abs().nan_to_num_(nan=torch.inf)
    active = topology.count_true(mask)
    chosen = topology.select(sizes, ~mask, min(active, mask.numel() - active))
    if chosen.any():
        smallest = sizes[chosen].amin()
        chosen |= (sizes >= smallest) & (sizes > 0)
    positions = topology.true_positions((chosen | mask).flatten())
    values = gradient.flatten().index_select(0, positions).unsqueeze(0)
    kept = positions.to(position_type(mask.numel()))
    return LargestGradients(values, kept, sparse_storage.layout_of(gradient))
