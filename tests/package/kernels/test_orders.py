"""Orders: each active weight once in both directions, sorted, and nothing outside of the matrix."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from itop_prune.kernels.orders import Direction, make_order


@st.composite
def matrices(draw: st.DrawFn) -> tuple[NDArray[np.integer], int, int]:
    """Positions in any order, some slots free, and how many outputs and inputs there are."""
    outputs, inputs = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    places = draw(st.lists(st.integers(0, outputs * inputs - 1), unique=True))
    free = [-1] * draw(st.integers(0, 3))
    dtype = draw(st.sampled_from([np.int32, np.int64]))
    return np.array(draw(st.permutations(places + free)), dtype), outputs, inputs


def listed(direction: Direction) -> list[tuple[int, int, int]]:
    """All weights as (group, other, slot)."""
    groups = np.repeat(np.arange(len(direction.starts) - 1), np.diff(direction.starts))
    return list(zip(groups.tolist(), *(part.tolist() for part in direction[1:]), strict=True))


@given(matrices())
def test_both_directions_hold_each_active_weight_once_and_sorted(
    matrix: tuple[NDArray[np.integer], int, int],
) -> None:
    positions, outputs, inputs = matrix
    order = make_order(positions, outputs, inputs)
    weights = [
        (*divmod(int(place), inputs), slot) for slot, place in enumerate(positions) if place >= 0
    ]
    assert listed(order.by_output) == sorted(weights)
    assert listed(order.by_input) == sorted((i, o, slot) for o, i, slot in weights)
    assert (order.outputs, order.inputs, order.active) == (outputs, inputs, len(weights))
    for part in (*order.by_output, *order.by_input):
        assert part.dtype == np.int32
        assert part.flags["C_CONTIGUOUS"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([0, 6], r"position 6 is outside of a weight of 6; allowed are -1 to 5; load the model"),
        ([-2, 5], r"position -2 is outside of a weight of 6; allowed are -1 to 5; load the model"),
        ([4, -1, 0, 4], r"position 4 has two slots; allowed is one; load the model again"),
    ],
)
def test_positions_outside_and_positions_with_two_slots_are_refused(
    wrong: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_order(np.array(wrong, np.int32), 2, 3)
