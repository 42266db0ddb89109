"""How many leave and enter each layer, and what criteria get and give, by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import itop_prune
from itop_prune import MaskScheduler, update
from itop_prune.gradients import DenseGradients
from itop_prune.update import Layer, Rules


def layers(**weights: list[float]) -> dict[str, Layer]:
    """Layers of one output each, active where a weight is not 0."""
    found = {}
    for name, values in weights.items():
        linear = nn.Linear(len(values), 1, bias=False)
        with torch.no_grad():
            linear.weight.copy_(torch.tensor([values]))
        itop = itop_prune.ITOP.apply(linear, "weight", torch.tensor([values]) != 0)
        found[name] = Layer(name, itop, itop.mask.clone(), DenseGradients({name: itop}, {"weight"}, 1, 1), (0, 0))
    return found


def rules(prune: Any = "magnitude", redistribute: str = "none", scope: str = "global", floor: float = 0.0) -> Rules:
    return Rules.of(prune, "random", redistribute, scope, floor)


TWO = {"a": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 0.0, 0.0], "b": [9.0, 10.0, 11.0, 12.0, 0.0, 0.0]}


def test_over_all_layers_the_worst_leave_and_each_grows_what_it_lost() -> None:
    active = {"a": 8, "b": 4}
    leaving, entering = update.counts(rules(), layers(**TWO), active, active, rate=0.5, moves=False)
    assert leaving == entering == {"a": 6, "b": 0}  # ceil(0.5 * 8) + ceil(0.5 * 4), all smaller than b's


def test_on_the_way_to_sparse_the_cut_is_over_all_layers_and_the_exchange_within_each() -> None:
    """GraNet: from 12 to 8 active the four smallest leave, all of a; then each exchanges a quarter of what is left."""
    active, target = {"a": 8, "b": 4}, {"a": 5, "b": 3}
    leaving, entering = update.counts(rules(), layers(**TWO), active, target, rate=0.25, moves=True)
    assert leaving == {"a": 4 + 1, "b": 1}
    assert entering == {"a": 1, "b": 1}


def test_a_floor_is_rounded_up() -> None:
    active, target = {"a": 8, "b": 4}, {"a": 4, "b": 3}
    leaving, _ = update.counts(rules(floor=0.35), layers(**TWO), active, target, rate=0.0, moves=True)
    assert leaving == {"a": 4, "b": 1}  # of the five smallest, all in a, one stays: at least 4 of its 10 (and 3 of 6)


@pytest.mark.parametrize("kind", [torch.uint8, torch.bool, torch.int32])
def test_scores_that_are_whole_numbers_are_ranked_as_numbers(kind: torch.dtype) -> None:
    def ranked(weight: Tensor) -> Tensor:
        return (weight > 8).to(kind)

    active, target = {"a": 8, "b": 4}, {"a": 5, "b": 3}
    leaving, _ = update.counts(rules(ranked), layers(**TWO), active, target, rate=0.0, moves=True)
    assert leaving == {"a": 4, "b": 0}


@pytest.mark.parametrize(("redistribute", "leaves"), [("none", 0), ("magnitude", 3)])
def test_a_dense_layer_gives_weights_away_only_where_layers_share(redistribute: str, leaves: int) -> None:
    two = layers(a=[1.0, 2.0, 0.0, 0.0], b=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    active = {"a": 2, "b": 6}
    leaving, entering = update.counts(rules("magnitude", redistribute, "layer"), two, active, active, 0.5, moves=False)
    assert leaving == {"a": 1, "b": leaves}
    assert sum(entering.values()) == sum(leaving.values())


def test_a_floor_above_what_shall_be_active_is_refused() -> None:
    model = nn.Sequential(nn.Linear(20, 16), nn.Linear(16, 4))
    masks, optimizer = itop_prune.apply(model, 0.0), torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"floor is 0\.2: it keeps 77 of 384 .* there shall be 38; lower it"):
        MaskScheduler(
            masks, optimizer, total_steps=9, every=3, scope="global", floor=0.2, density="cubic", final_sparsity=0.9
        )
    itop_prune.remove(model)
    with pytest.raises(ValueError, match=r"floor is 0\.5"):
        MaskScheduler(itop_prune.apply(model, 0.6), optimizer, total_steps=9, every=3, scope="global", floor=0.5)


def test_a_criterion_that_fails_is_named_with_the_layer() -> None:
    def broken(weight: Tensor) -> Tensor:
        return weight + torch.ones(7)

    with pytest.raises(RuntimeError, match="broken failed for a: The size of tensor"):
        update.counts(rules(broken), layers(**TWO), {"a": 8, "b": 4}, {"a": 8, "b": 4}, 0.5, moves=False)


def test_a_criterion_that_writes_into_what_it_is_given_is_refused() -> None:
    def writing(mask: Tensor) -> Tensor:
        return mask.logical_not_()

    with pytest.raises(RuntimeError, match="writing wrote into mask of a; a criterion may only read"):
        update.counts(rules(writing), layers(**TWO), {"a": 8, "b": 4}, {"a": 8, "b": 4}, 0.5, moves=False)
