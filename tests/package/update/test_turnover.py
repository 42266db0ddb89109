"""How many leave and enter each layer, by hand: alone, over all layers, with a floor, redistributed."""

from typing import Any

import pytest
import torch
from itop_prune.update.new_masks import Layer, Rules
from torch import Tensor, nn

import itop_prune
from itop_prune import MaskScheduler
from itop_prune.update import turnover
from itop_prune.update.gradients import DenseGradients


def layers(**weights: list[float]) -> dict[str, Layer]:
    """Layers of one output each, active where a weight is not 0."""
    found = {}
    for name, values in weights.items():
        linear = nn.Linear(len(values), 1, bias=False)
        with torch.no_grad():
            linear.weight.copy_(torch.tensor([values]))
        itop = itop_prune.ITOP.apply(linear, "weight", torch.tensor([values]) != 0)
        found[name] = Layer(
            name, itop, itop.mask.clone(), DenseGradients({name: itop}, {"weight"}, 1, 1), (0, 0)
        )
    return found


def rules(
    prune: Any = "magnitude", redistribute: str = "none", scope: str = "global", floor: float = 0.0
) -> Rules:
    return Rules.of(prune, "random", redistribute, scope, floor)


TWO = {
    "a": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 0.0, 0.0],
    "b": [9.0, 10.0, 11.0, 12.0, 0.0, 0.0],
}


def test_over_all_layers_the_worst_leave_and_each_grows_what_it_lost() -> None:
    active = {"a": 8, "b": 4}
    leaving, entering = turnover.counts(
        rules(), layers(**TWO), active, active, rate=0.5, moves=False
    )
    assert (
        leaving == entering == {"a": 6, "b": 0}
    )  # ceil(0.5 * 8) + ceil(0.5 * 4), all smaller than b's


def test_on_the_way_to_sparse_the_cut_is_over_all_layers_and_the_exchange_within_each() -> None:
    """GraNet: from 12 to 8 active the four smallest leave, all of a; then each exchanges a quarter of what is left."""
    active, target = {"a": 8, "b": 4}, {"a": 5, "b": 3}
    leaving, entering = turnover.counts(
        rules(), layers(**TWO), active, target, rate=0.25, moves=True
    )
    assert leaving == {"a": 4 + 1, "b": 1}
    assert entering == {"a": 1, "b": 1}


def test_a_floor_is_rounded_up() -> None:
    active, target = {"a": 8, "b": 4}, {"a": 4, "b": 3}
    leaving, _ = turnover.counts(
        rules(floor=0.35), layers(**TWO), active, target, rate=0.0, moves=True
    )
    assert leaving == {
        "a": 4,
        "b": 1,
    }  # of the five smallest, all in a, one stays: at least 4 of its 10 (and 3 of 6)


@pytest.mark.parametrize("kind", [torch.uint8, torch.bool, torch.int32])
def test_scores_that_are_whole_numbers_are_ranked_as_numbers(kind: torch.dtype) -> None:
    def ranked(weight: Tensor) -> Tensor:
        return (weight > 8).to(kind)

    active, target = {"a": 8, "b": 4}, {"a": 5, "b": 3}
    leaving, _ = turnover.counts(rules(ranked), layers(**TWO), active, target, rate=0.0, moves=True)
    assert leaving == {"a": 4, "b": 0}


@pytest.mark.parametrize(("redistribute", "leaves"), [("none", 0), ("magnitude", 3)])
def test_a_dense_layer_gives_weights_away_only_where_layers_share(
    redistribute: str, leaves: int
) -> None:
    two = layers(a=[1.0, 2.0, 0.0, 0.0], b=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    active = {"a": 2, "b": 6}
    leaving, entering = turnover.counts(
        rules("magnitude", redistribute, "layer"), two, active, active, 0.5, moves=False
    )
    assert leaving == {"a": 1, "b": leaves}
    assert sum(entering.values()) == sum(leaving.values())


def test_a_floor_above_what_shall_be_active_is_refused() -> None:
    model = nn.Sequential(nn.Linear(20, 16), nn.Linear(16, 4))
    masks, optimizer = itop_prune.apply(model, 0.0), torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(
        ValueError, match=r"floor is 0\.2: it keeps 77 of 384 .* there shall be 38; lower it"
    ):
        MaskScheduler(
            masks,
            optimizer,
            total_steps=9,
            every=3,
            scope="global",
            floor=0.2,
            density="cubic",
            final_sparsity=0.9,
        )
    itop_prune.remove(model)
    with pytest.raises(ValueError, match=r"floor is 0\.5"):
        MaskScheduler(
            itop_prune.apply(model, 0.6),
            optimizer,
            total_steps=9,
            every=3,
            scope="global",
            floor=0.5,
        )


@pytest.mark.parametrize("redistribute", ["none", "magnitude", "nonzeros"])
def test_a_floor_holds_also_where_what_is_exchanged_grows_elsewhere(redistribute: str) -> None:
    active, target, found = {"a": 8, "b": 4}, {"a": 4, "b": 3}, layers(**TWO)
    chosen = rules(redistribute=redistribute, floor=0.35)
    leaving, entering = turnover.counts(chosen, found, active, target, rate=0.5, moves=True)
    after = {name: active[name] - leaving[name] + entering[name] for name in active}
    assert sum(after.values()) == 7
    assert after["a"] >= 4
    assert after["b"] >= 3


def test_a_layer_that_began_below_the_floor_is_not_lifted_to_it() -> None:
    active, target, found = {"a": 2, "b": 4}, {"a": 2, "b": 3}, layers(**TWO)
    chosen = rules(redistribute="magnitude", floor=0.35)
    leaving, entering = turnover.counts(chosen, found, active, target, rate=0.5, moves=True)
    after = {name: active[name] - leaving[name] + entering[name] for name in active}
    assert sum(after.values()) == 5
    assert after["a"] >= 2
