"""Sharded tensors are read whole and written in parts; others pass as they are."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

from itop_prune.sharding import is_sharded, like, local, whole


def test_a_tensor_that_is_not_sharded_is_passed_on_as_it_is() -> None:
    tensor, mask = torch.randn(3, 4), torch.ones(3, 4, dtype=torch.bool)
    assert not is_sharded(tensor)
    assert whole(tensor) is local(tensor) is tensor
    assert like(mask, tensor) is mask


@pytest.mark.parametrize(
    "thing", [None, torch.fx.Graph().create_node("placeholder", "x"), "text"], ids=str
)
def test_what_is_no_tensor_is_not_sharded(thing: Any) -> None:
    assert not is_sharded(thing)


@pytest.fixture
def sharded() -> Iterator[Tensor]:
    """A tensor sharded over one process: parts and wholes are of one size, and of two kinds."""
    if not (distributed.is_available() and distributed.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        yield distribute_tensor(torch.arange(12.0).view(3, 4), mesh, [Shard(0)])
    finally:
        distributed.destroy_process_group()


def test_a_sharded_tensor_is_seen_whole_and_its_part_is_the_same_memory(sharded: Tensor) -> None:
    assert is_sharded(sharded)
    assert not is_sharded(whole(sharded))
    assert torch.equal(whole(sharded), torch.arange(12.0).view(3, 4))
    local(sharded).zero_()
    assert not whole(sharded).any()


def test_a_mask_is_sharded_as_a_tensor_is(sharded: Tensor) -> None:
    mask = torch.arange(12).view(3, 4) % 2 == 0
    part = like(mask, sharded)
    assert is_sharded(part)
    assert part.placements == sharded.placements
    assert torch.equal(local(part), mask)
    assert torch.equal(whole(sharded * part), torch.arange(12.0).view(3, 4) * mask)
