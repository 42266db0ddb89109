"""How many weights leave and enter each layer: by hand, and exact over random layers."""

from typing import Any

import pytest
import torch
from helpers.toys import mlp
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import itop_prune
from itop_prune import ITOP, MaskScheduler
from itop_prune.update.counts import (
    ceil_count,
    check_floor,
    counts_between,
    grow_counts,
    plan_changes,
    prune_counts,
    scale_counts,
)
from itop_prune.update.gradients import DenseGradients
from itop_prune.update.layer_update import LayerUpdate
from itop_prune.update.rules import Rules

# --- plain arithmetic ----------------------------------------------------------------------------

drawn_layers = st.lists(
    st.tuples(st.integers(1, 60), st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=6
)


def named(drawn: list) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """All weights of each layer, and two counts of 1 to all of them."""
    weights, one, other = {}, {}, {}
    for i, (size, first, second) in enumerate(drawn):
        weights[str(i)] = size
        one[str(i)] = 1 + round(first * (size - 1))
        other[str(i)] = 1 + round(second * (size - 1))
    return weights, one, other


@given(drawn=drawn_layers, factor=st.floats(0, 1))
def test_counts_go_from_the_first_to_the_last(drawn: list, factor: float) -> None:
    weights, first, last = named(drawn)
    found = counts_between(first, last, weights, factor)
    exact = {name: last[name] + (first[name] - last[name]) * factor for name in weights}
    assert sum(found.values()) == round(sum(exact.values()))
    for name, count in found.items():
        assert 1 <= count <= weights[name]
        assert abs(count - exact[name]) <= 1
    assert counts_between(first, last, weights, 1.0) == first
    assert counts_between(first, last, weights, 0.0) == last


def test_a_layer_that_lost_everything_comes_back_on_the_way() -> None:
    first, last, weights = {"a": 0, "b": 8}, {"a": 5, "b": 4}, {"a": 10, "b": 10}
    assert counts_between(first, last, weights, 1.0) == {"a": 1, "b": 7}


@given(drawn=drawn_layers, place=st.floats(0, 1))
def test_counts_scale_to_another_total(drawn: list, place: float) -> None:
    weights, active, _ = named(drawn)
    total = len(weights) + round(place * (sum(weights.values()) - len(weights)))
    found = scale_counts(active, total, weights)
    assert sum(found.values()) == total
    assert all(1 <= found[name] <= weights[name] for name in weights)
    assert scale_counts(active, sum(active.values()), weights) == active


@given(drawn=drawn_layers, rate=st.floats(0, 1))
def test_no_more_leave_than_are_active_and_no_more_enter_than_have_room(
    drawn: list, rate: float
) -> None:
    weights, active, target = named(drawn)
    leaving = prune_counts(active, target, weights, rate)
    for name in weights:
        assert max(0, active[name] - target[name]) <= leaving[name] <= active[name]
        assert active[name] - leaving[name] <= target[name]


@given(
    drawn=drawn_layers,
    place=st.floats(0, 1),
    proportions=st.lists(st.floats(0, 1e6), min_size=6, max_size=6),
)
def test_growth_is_shared_exactly_within_the_room(
    drawn: list, place: float, proportions: list[float]
) -> None:
    weights, kept, _ = named(drawn)
    room = {name: weights[name] - kept[name] for name in weights}
    total = round(place * sum(room.values()))
    found = grow_counts(kept, total, weights, {str(i): x for i, x in enumerate(proportions)})
    assert sum(found.values()) == total
    assert all(0 <= found[name] <= room[name] for name in weights)


@pytest.mark.parametrize(
    ("kept", "total", "proportions", "least", "expected"),
    [
        ((0, 5), 4, (0.0, 1.0), None, (1, 3)),  # a layer that kept nothing gets one
        ((4, 8), 4, (0.0, 0.0), None, (3, 1)),  # without proportions the room decides
        ((1, 5), 4, (0.0, 1.0), None, (0, 4)),
        ((1, 5), 4, (0.0, 1.0), (3, 3), (2, 2)),  # up to its least count first
    ],
)
def test_growth_by_hand(
    kept: tuple, total: int, proportions: tuple, least: Any, expected: tuple
) -> None:
    def by_name(numbers: Any) -> dict[str, Any]:
        return dict(zip("ab", numbers, strict=True))

    floor = by_name(least) if least else {}
    found = grow_counts(by_name(kept), total, {"a": 10, "b": 10}, by_name(proportions), floor)
    assert found == by_name(expected)


def test_millions_without_a_proportion_go_where_there_is_room() -> None:
    room = {"a": 1_000, "b": 25_000_000, "c": 75_000_000}
    found = grow_counts(dict.fromkeys(room, 0), 40_001_000, room, {"a": 1.0, "b": 0.0, "c": 0.0})
    assert found == {"a": 1_000, "b": 10_000_000, "c": 30_000_000}


@pytest.mark.parametrize(
    ("share", "of", "expected"),
    [(0.0, 10, 0), (0.01, 10, 1), (1.0, 10, 10), (0.07, 100, 7), (0.56, 100, 56), (0.071, 100, 8)],
)
def test_a_share_is_rounded_up_but_for_rounding_errors(
    share: float, of: int, expected: int
) -> None:
    assert ceil_count(share, of) == expected
    assert prune_counts({"a": of}, {"a": of}, {"a": 2 * of}, share) == {"a": expected}


# --- the plan of an update -----------------------------------------------------------------------


def layers(**weights: list[float]) -> dict[str, LayerUpdate]:
    """Layers of one output each, active where a weight is not 0."""
    found = {}
    for name, values in weights.items():
        linear = nn.Linear(len(values), 1, bias=False)
        with torch.no_grad():
            linear.weight.copy_(torch.tensor([values]))
        itop = ITOP.apply(linear, "weight", torch.tensor([values]) != 0)
        gradients = DenseGradients({name: itop}, {"weight"}, 1, 1)
        found[name] = LayerUpdate(name, itop, itop.mask.clone(), gradients, (0, 0))
    return found


def rules(
    prune: Any = "magnitude", redistribute: Any = "none", scope: str = "global", floor: float = 0.0
) -> Rules:
    return Rules.of(prune, "random", redistribute, scope, floor)


TWO = {
    "a": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 0.0, 0.0],
    "b": [9.0, 10.0, 11.0, 12.0, 0.0, 0.0],
}
ACTIVE = {"a": 8, "b": 4}


def test_in_each_layer_the_share_and_the_excess_leave_and_the_target_is_met() -> None:
    changes = plan_changes(
        rules(scope="layer"), layers(**TWO), ACTIVE, {"a": 9, "b": 2}, 0.25, density_moves=True
    )
    assert changes == {"a": (2, 3), "b": (3, 1)}


def test_over_all_layers_the_lowest_leave_and_each_grows_what_it_lost() -> None:
    """ceil(0.5 * 8) + ceil(0.5 * 4) leave, all of a: they are smaller than any of b."""
    changes = plan_changes(rules(), layers(**TWO), ACTIVE, ACTIVE, 0.5, density_moves=False)
    assert changes == {"a": (6, 6), "b": (0, 0)}


def test_on_the_way_to_sparse_only_the_cut_is_over_all_layers() -> None:
    """GraNet: the four smallest leave, all of a; then each exchanges a quarter of the rest."""
    changes = plan_changes(
        rules(), layers(**TWO), ACTIVE, {"a": 5, "b": 3}, 0.25, density_moves=True
    )
    assert changes == {"a": (4 + 1, 1), "b": (1, 1)}


def test_a_floor_is_rounded_up() -> None:
    """Of the five smallest, all in a, one stays: at least 4 of its 10 (and 3 of 6)."""
    target = {"a": 4, "b": 3}
    changes = plan_changes(rules(floor=0.35), layers(**TWO), ACTIVE, target, 0.0, True)
    assert changes == {"a": (4, 0), "b": (1, 0)}


@pytest.mark.parametrize("kind", [torch.uint8, torch.bool, torch.int32])
def test_scores_that_are_whole_numbers_rank_as_numbers(kind: torch.dtype) -> None:
    def ranked(weight: Tensor) -> Tensor:
        return (weight > 8).to(kind)

    changes = plan_changes(rules(ranked), layers(**TWO), ACTIVE, {"a": 5, "b": 3}, 0.0, True)
    assert changes == {"a": (4, 0), "b": (0, 0)}


@pytest.mark.parametrize(("redistribute", "leaves"), [("none", 0), ("magnitude", 3)])
def test_a_dense_layer_gives_weights_away_only_if_layers_share(
    redistribute: str, leaves: int
) -> None:
    two = layers(a=[1.0, 2.0, 0.0, 0.0], b=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    active = {"a": 2, "b": 6}
    changes = plan_changes(
        rules("magnitude", redistribute, "layer"), two, active, active, 0.5, density_moves=False
    )
    n_prune, n_grow = ([change[i] for change in changes.values()] for i in (0, 1))
    assert n_prune == [1, leaves]
    assert sum(n_grow) == sum(n_prune)


@pytest.mark.parametrize("redistribute", ["none", "magnitude", "nonzeros"])
@pytest.mark.parametrize(
    ("active", "target", "least"),
    [
        ({"a": 8, "b": 4}, {"a": 4, "b": 3}, {"a": 4, "b": 3}),
        ({"a": 2, "b": 4}, {"a": 2, "b": 3}, {"a": 2, "b": 3}),  # began below: is not lifted to it
    ],
)
def test_a_floor_holds_wherever_what_is_exchanged_grows(
    redistribute: str, active: dict[str, int], target: dict[str, int], least: dict[str, int]
) -> None:
    chosen = rules(redistribute=redistribute, floor=0.35)
    values = {name: values[: active[name]] for name, values in TWO.items()}
    padded = {name: [*values[name], *[0.0] * (len(TWO[name]) - active[name])] for name in TWO}
    changes = plan_changes(chosen, layers(**padded), active, target, 0.5, density_moves=True)
    after = {name: active[name] - n + m for name, (n, m) in changes.items()}
    assert sum(after.values()) == sum(target.values())
    assert all(after[name] >= least[name] for name in after)


def test_a_floor_above_the_smallest_count_is_refused() -> None:
    weights = {"a": 320, "b": 64}
    check_floor(rules(floor=0.2), weights, 77)
    message = r"floor is 0\.2: it keeps 77 of 384 .* at some time 76 are active; lower it"
    with pytest.raises(ValueError, match=message):
        check_floor(rules(floor=0.2), weights, 76)
    with pytest.raises(ValueError, match=r"floor is 0\.0: it keeps 2 of 384"):
        check_floor(rules(), weights, 1)
    check_floor(rules(scope="layer"), weights, 1)


@pytest.mark.parametrize(
    "options", [{"floor": 0.5}, {"floor": 0.2, "density": "cubic", "final_sparsity": 0.9}]
)
def test_a_scheduler_refuses_a_floor_that_it_can_not_keep(options: dict[str, Any]) -> None:
    model = mlp()
    masks, optimizer = itop_prune.apply(model, 0.6), torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"floor is 0\.\d: it keeps"):
        MaskScheduler(masks, optimizer, total_steps=9, every=3, scope="global", **options)
