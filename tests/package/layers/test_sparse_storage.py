"""Slots: who keeps one, who gets one, what is free, and parameters that get longer."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import itop_prune
from itop_prune.layers.sparse_storage import (
    Layout,
    dense,
    gather,
    layout_of,
    mask_of,
    position_type,
    reassign,
    resize,
)


def bits(text: str) -> Tensor:
    return torch.tensor([character == "1" for character in text])


def moved(positions: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return reassign(positions, mask_of(positions, tuple(mask.shape)), mask)


def slots(*positions: int) -> Tensor:
    return torch.tensor(positions, dtype=torch.int32)


@pytest.mark.parametrize(
    ("before", "mask", "after", "stayed"),
    [
        ((5, 0, 3), "011100", [1, 2, 3], "001"),
        ((5, 0, 3), "100101", [5, 0, 3], "111"),
        ((5, 0, 3), "000000", [-1, -1, -1], "000"),
        ((5, 0, 3), "000100", [-1, -1, 3], "001"),
        ((-1, 0, -1), "110001", [1, 0, 5], "010"),
        ((-1, -1, 4), "000010", [-1, -1, 4], "001"),
    ],
    ids=["exchanged", "as it was", "emptied", "sparser", "denser again", "free ones stay free"],
)
def test_those_that_enter_get_the_free_slots_in_rising_order(
    before: tuple[int, ...], mask: str, after: list[int], stayed: str
) -> None:
    positions = slots(*before)
    found, kept = moved(positions, bits(mask))
    assert found.dtype == positions.dtype
    assert found.tolist() == after
    assert torch.equal(kept, bits(stayed))
    assert positions.tolist() == list(before)


def test_too_few_slots_become_a_quarter_more_than_needed_but_never_more_than_there_are_places() -> (
    None
):
    mask = torch.zeros(100, dtype=torch.bool)
    mask[10:50] = True
    found, kept = moved(slots(60, 20, 10), mask)
    assert found.tolist()[:3] == [11, 20, 10]
    assert kept.tolist() == [False, True, True, *[False] * 47]
    assert (len(found), int((found >= 0).sum())) == (50, 40)

    found, _ = moved(slots(1), torch.ones(6, dtype=torch.bool))
    assert sorted(found.tolist()) == list(range(6))


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 40), st.integers(0, 40), st.integers(0, 2**31))
def test_after_any_update_each_active_weight_has_one_slot_and_those_that_stay_keep_theirs(
    size: int, free: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    before, after = (torch.rand(2, size, generator=generator) < 0.4).unbind()
    held = F.pad(before.nonzero().squeeze(1).int(), (0, free), value=-1)
    held = held[torch.randperm(len(held), generator=generator)]

    found, kept = moved(held, after)
    used = found[found >= 0]
    assert sorted(used.tolist()) == after.nonzero().squeeze(1).tolist()
    assert len(found) >= len(held)
    assert int(kept.sum()) == int((before & after).sum())
    assert torch.equal(found[: len(held)][kept[: len(held)]], held[kept[: len(held)]])


def test_free_slots_are_nowhere_in_the_weight_and_get_no_gradient() -> None:
    values = torch.tensor([[5.0, 9.0, 7.0]])
    positions, layout = slots(3, -1, 0), Layout((2, 2))
    assert dense(values, positions, layout).tolist() == [[7.0, 0.0], [0.0, 5.0]]
    assert mask_of(positions, (2, 2)).tolist() == [[True, False], [False, True]]
    gradient = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert gather(gradient, positions).tolist() == [[4.0, 0.0, 1.0]]
    gradient[0, 0] = torch.nan  # of the place that a clamped -1 would read
    assert gather(gradient, positions)[0, 1] == 0.0


def test_positions_are_counted_row_by_row_in_any_memory_format() -> None:
    weight = torch.arange(24.0).view(2, 3, 2, 2)
    last = weight.to(memory_format=torch.channels_last)
    positions = slots(23, 4, 0)
    assert gather(last, positions).tolist() == [[23.0, 4.0, 0.0]]
    found = dense(torch.ones(1, 3), positions, layout_of(last))
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert found.flatten().nonzero().squeeze(1).tolist() == [0, 4, 23]


def test_large_weights_have_wide_positions() -> None:
    assert position_type(2**31 - 1) == torch.int32
    assert position_type(2**31) == torch.int64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_parameter_gets_longer_as_the_same_object_while_its_last_graph_is_alive(
    dtype: torch.dtype,
) -> None:
    parameter = nn.Parameter(torch.tensor([[1.0, 2.0]], dtype=dtype))
    loss = parameter.square().sum()
    loss.backward()
    resize(parameter, 4)
    assert parameter.dtype == dtype
    assert parameter.tolist() == [[1.0, 2.0, 0.0, 0.0]]
    assert parameter.grad.tolist() == [[2.0, 4.0, 0.0, 0.0]]
    parameter.sum().backward()
    assert parameter.grad.tolist() == [[3.0, 5.0, 1.0, 1.0]]
    assert loss.item() == 5.0


def test_a_layer_that_grows_beyond_its_slots_goes_on_with_its_optimizer() -> None:
    layer = nn.Linear(10, 4)
    itop = itop_prune.apply(layer, 0.9, storage="sparse")["weight"]
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    parameter, old, weight = itop.parameter, itop.mask, itop.weight
    more = old.clone()
    more[0] = True
    stayed = itop.write_mask(itop.mask, more)
    assert itop.parameter is parameter
    assert parameter.shape == stayed.shape == (1, len(itop.positions))
    assert torch.equal(itop.mask, more)
    assert torch.equal(itop.weight, weight)
    assert int(stayed.sum()) == int(old.sum())

    layer(torch.ones(2, 10)).sum().backward()
    optimizer.step()
    assert torch.equal(itop.weight != 0, more)
    assert not parameter[~itop.used].any()
    other = copy.deepcopy(layer)
    assert torch.equal(other.weight, layer.weight)
