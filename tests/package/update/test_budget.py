"""How many leave and enter: sums exact, bounds kept, by hand and over random layers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from itop_prune.update import budget

layers = st.lists(
    st.tuples(st.integers(1, 60), st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=6
)


def counts(drawn: list) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """Weights, and two counts of 1 to all of them."""
    weights = {str(i): size for i, (size, _, _) in enumerate(drawn)}
    one, other = (
        {str(i): 1 + round(entry[which] * (entry[0] - 1)) for i, entry in enumerate(drawn)}
        for which in (1, 2)
    )
    return weights, one, other


@given(drawn=layers, factor=st.floats(0, 1))
def test_targets_go_from_the_first_to_the_last(drawn: list, factor: float) -> None:
    weights, first, last = counts(drawn)
    found = budget.targets(first, last, weights, factor)
    exact = {name: last[name] + (first[name] - last[name]) * factor for name in weights}
    assert sum(found.values()) == round(sum(exact.values()))
    assert all(
        1 <= found[name] <= weights[name] and abs(found[name] - exact[name]) <= 1
        for name in weights
    )
    assert budget.targets(first, last, weights, 1.0) == first
    assert budget.targets(first, last, weights, 0.0) == last


@given(drawn=layers, place=st.floats(0, 1))
def test_another_total_in_the_same_proportion(drawn: list, place: float) -> None:
    weights, active, _ = counts(drawn)
    total = len(weights) + round(place * (sum(weights.values()) - len(weights)))
    found = budget.in_total(active, total, weights)
    assert sum(found.values()) == total
    assert all(1 <= found[name] <= weights[name] for name in weights)
    assert budget.in_total(active, sum(active.values()), weights) == active


@given(drawn=layers, rate=st.floats(0, 1))
def test_what_is_pruned_can_be_pruned_and_what_grows_has_room(drawn: list, rate: float) -> None:
    weights, active, target = counts(drawn)
    leaving = budget.to_prune(active, target, weights, rate)
    assert all(0 <= leaving[name] <= active[name] for name in weights)
    kept = {name: active[name] - leaving[name] for name in weights}
    assert all(0 <= target[name] - kept[name] <= weights[name] - kept[name] for name in weights)


@given(drawn=layers, place=st.floats(0, 1), raw=st.lists(st.floats(0, 1e6), min_size=6, max_size=6))
def test_growth_is_shared_exactly_within_the_room(
    drawn: list, place: float, raw: list[float]
) -> None:
    weights, kept, _ = counts(drawn)
    room = {name: weights[name] - kept[name] for name in weights}
    total = round(place * sum(room.values()))
    found = budget.to_grow(kept, total, weights, {str(i): value for i, value in enumerate(raw)})
    assert sum(found.values()) == total
    assert all(0 <= found[name] <= room[name] for name in weights)


def test_a_layer_that_kept_nothing_gets_one() -> None:
    assert budget.to_grow({"a": 0, "b": 5}, 4, {"a": 10, "b": 10}, {"a": 0.0, "b": 1.0}) == {
        "a": 1,
        "b": 3,
    }


def test_millions_that_nobody_asked_for_go_where_there_is_room_at_once() -> None:
    room = {"a": 1_000, "b": 25_000_000, "c": 75_000_000}
    found = budget.to_grow(dict.fromkeys(room, 0), 40_001_000, room, {"a": 1.0, "b": 0.0, "c": 0.0})
    assert found == {"a": 1_000, "b": 10_000_000, "c": 30_000_000}


def test_a_layer_that_has_lost_everything_comes_back_on_the_way() -> None:
    assert budget.targets({"a": 0, "b": 8}, {"a": 5, "b": 4}, {"a": 10, "b": 10}, 1.0) == {
        "a": 1,
        "b": 7,
    }


def test_where_nothing_is_said_room_decides() -> None:
    assert budget.to_grow({"a": 4, "b": 8}, 4, {"a": 10, "b": 10}, {"a": 0.0, "b": 0.0}) == {
        "a": 3,
        "b": 1,
    }


@pytest.mark.parametrize(("rate", "leaving"), [(0.0, 0), (0.01, 1), (0.5, 5), (1.0, 10)])
def test_the_share_to_be_exchanged_is_rounded_up(rate: float, leaving: int) -> None:
    assert budget.to_prune({"a": 10}, {"a": 10}, {"a": 20}, rate) == {"a": leaving}


def test_a_layer_gets_what_it_must_have_at_least() -> None:
    kept, weights, raw = {"a": 1, "b": 5}, {"a": 10, "b": 10}, {"a": 0.0, "b": 1.0}
    assert budget.to_grow(kept, 4, weights, raw) == {"a": 0, "b": 4}
    assert budget.to_grow(kept, 4, weights, raw, {"a": 3, "b": 3}) == {"a": 2, "b": 2}


@pytest.mark.parametrize(
    ("rate", "leaving"), [(0.07, 7), (0.14, 14), (0.28, 28), (0.55, 55), (0.56, 56), (0.071, 8)]
)
def test_a_product_that_is_whole_but_for_rounding_is_whole(rate: float, leaving: int) -> None:
    assert budget.to_prune({"a": 100}, {"a": 100}, {"a": 200}, rate) == {"a": leaving}
