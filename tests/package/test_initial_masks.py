"""Masks are placed as asked: how many, where, and by which seed; everything else of the model stays what it was."""

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers.toys import batch, convnet, mlp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import itop_prune
from itop_prune import ITOP


def active(masks: dict[str, ITOP]) -> dict[str, int]:
    return {name: int(itop.mask.sum()) for name, itop in masks.items()}


def tensors(masks: dict[str, ITOP]) -> list[Tensor]:
    return [itop.mask for itop in masks.values()]


def all_equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("method", ["ERK", "ER", "uniform"])
@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.9, 0.98])
def test_exactly_the_asked_share_stays_active(method: str, sparsity: float) -> None:
    assert sum(active(itop_prune.apply(mlp(), sparsity, method)).values()) == round(
        (1.0 - sparsity) * 560
    )


@settings(deadline=None, max_examples=40)
@given(sparsity=st.floats(0.0, 0.99))
def test_counts_are_those_of_the_distribution(sparsity: float) -> None:
    model = mlp()
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.ndim == 2}
    counts = itop_prune.distributions.active_counts(shapes, 1.0 - sparsity, "ERK")
    assert active(itop_prune.apply(model, sparsity)) == counts


def test_a_function_is_a_method() -> None:
    masks = itop_prune.apply(
        mlp(), 1.0 - 280 / 560, lambda shapes, density: dict.fromkeys(shapes, density)
    )
    assert active(masks) == {"0.weight": 160, "2.weight": 96, "4.weight": 24}


def test_parameters_are_zero_off_the_mask() -> None:
    for itop in itop_prune.apply(convnet(), 0.7).values():
        assert not itop.parameter[~itop.mask].any()


def test_parameters_keep_their_values_on_the_mask() -> None:
    dense = dict(convnet().named_parameters())
    for name, itop in itop_prune.apply(convnet(), 0.7).items():
        assert torch.equal(itop.parameter, dense[name] * itop.mask)


def test_parameters_are_the_same_objects_in_the_same_order() -> None:
    model = convnet()
    before = list(model.parameters())
    itop_prune.apply(model, 0.7)
    assert [id(parameter) for parameter in model.parameters()] == [
        id(parameter) for parameter in before
    ]


def test_parameters_keep_their_storage() -> None:
    model = convnet()
    before = [parameter.data_ptr() for parameter in model.parameters()]
    itop_prune.apply(model, 0.7)
    assert [parameter.data_ptr() for parameter in model.parameters()] == before


def test_a_masked_parameter_is_called_orig() -> None:
    model = mlp()
    itop_prune.apply(model, 0.7)
    names = ["0.weight_orig", "0.bias", "2.weight_orig", "2.bias", "4.weight_orig", "4.bias"]
    assert [name for name, _ in model.named_parameters()] == names


def test_masks_are_keyed_by_the_names_of_before() -> None:
    model = convnet()
    names = [name for name, parameter in model.named_parameters() if parameter.ndim > 1]
    assert list(itop_prune.apply(model, 0.7)) == names


def test_biases_and_norms_are_left_alone() -> None:
    model, twin = convnet(), convnet()
    itop_prune.apply(model, 0.7)
    state = model.state_dict()
    untouched = [
        name for name in twin.state_dict() if not name.endswith(".weight") or name == "1.weight"
    ]
    assert all(torch.equal(state[name], twin.state_dict()[name]) for name in untouched)


def test_the_budget_is_that_of_the_included_weights() -> None:
    masks = itop_prune.apply(mlp(), 0.5, include=("0", "2.*"))
    assert list(masks) == ["0.weight", "2.weight"]
    assert sum(active(masks).values()) == 256


def test_what_is_excluded_stays_dense() -> None:
    model, dense = mlp(), mlp()
    itop_prune.apply(model, 0.5, exclude="4")
    assert type(model[4]) is nn.Linear
    assert torch.equal(model[4].weight, dense[4].weight)


def test_sparsity_zero_masks_everything_and_changes_nothing() -> None:
    model, x = mlp(), batch(0, 20)[0]
    before = model(x)
    masks = itop_prune.apply(model, 0)
    assert all(itop.mask.all() for itop in masks.values())
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1, 1.5, math.nan, math.inf, "0.9", None, True])
def test_a_bad_sparsity_is_refused_with_the_range(sparsity: object) -> None:
    with pytest.raises(
        ValueError, match=rf"sparsity is {sparsity!r}; allowed is a number in \[0, 1\)"
    ):
        itop_prune.apply(mlp(), sparsity)


def test_an_unknown_method_is_answered_with_the_menu() -> None:
    with pytest.raises(
        ValueError,
        match=r"unknown method 'unifrom'; known are uniform, uniform\+, ER, ERK, ERK\+, magnitude, N:M "
        r"\(nearest: 'uniform'\); or scores by name, such as itop_prune.saliency makes$",
    ):
        itop_prune.apply(mlp(), 0.5, "unifrom")


def test_fixed_densities_are_met_and_count_in_the_budget() -> None:
    """560 weights: the last layer dense, the first at a quarter; the one between gets the rest of 280."""
    masks = itop_prune.apply(mlp(), 0.5, densities={"4": 1.0, "0.weight": 0.25})
    assert {name: itop.active for name, itop in masks.items()} == {
        "0.weight": 80,
        "2.weight": 152,
        "4.weight": 48,
    }


def test_of_two_patterns_that_match_the_first_decides() -> None:
    masks = itop_prune.apply(mlp(), 0.5, densities={"4*": 0.5, "[24]*": 0.25})
    assert (masks["4.weight"].active, masks["2.weight"].active) == (24, 48)


def test_what_is_excluded_does_not_count_in_the_budget() -> None:
    masks = itop_prune.apply(mlp(), 0.5, exclude="4")
    assert sum(itop.active for itop in masks.values()) == 256


@pytest.mark.parametrize("densities", [["4"], "4", 0.5, [], 0])
def test_densities_that_are_no_mapping_are_refused(densities: Any) -> None:
    with pytest.raises(
        ValueError,
        match=r"densities is .*; allowed are shares by pattern, such as \{'head': 1\.0\}",
    ):
        itop_prune.apply(mlp(), 0.5, densities=densities)


def test_numbers_of_numpy_are_those_of_python() -> None:
    expected = tensors(itop_prune.apply(mlp(), 0.5, seed=3))
    for seed in (np.int64(3), np.uint8(3)):
        assert all_equal(tensors(itop_prune.apply(mlp(), np.float32(0.5), seed=seed)), expected)


@pytest.mark.parametrize("seed", [1.5, "x", None])
def test_a_seed_that_is_no_whole_number_is_refused_and_nothing_is_masked(seed: Any) -> None:
    model = mlp()
    with pytest.raises(ValueError, match=r"seed is .*; allowed is a whole number"):
        itop_prune.apply(model, 0.5, seed=seed)
    assert itop_prune.find_masks(model) == {}


def test_fixed_densities_above_the_budget_are_refused_and_nothing_is_masked() -> None:
    model = mlp()
    with pytest.raises(
        ValueError, match=r"the fixed densities keep 320 weights, and the budget is 56 of 560"
    ):
        itop_prune.apply(model, 0.9, densities={"0": 1.0})
    assert not itop_prune.find_masks(model)


@pytest.mark.parametrize("density", [-0.1, 1.1, math.nan, "1", True])
def test_a_fixed_density_out_of_range_is_refused(density: object) -> None:
    with pytest.raises(
        ValueError, match=r"densities\['0'\] is .*; allowed is a number in \[0, 1\]"
    ):
        itop_prune.apply(mlp(), 0.5, densities={"0": density})


def test_a_pattern_of_densities_that_matches_nothing_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"densities pattern 'head' matches no weight; the weights are: 0\.weight"
    ):
        itop_prune.apply(mlp(), 0.5, densities={"head": 1.0})


def test_unknown_scores_are_answered_with_the_menu() -> None:
    with pytest.raises(
        ValueError, match=r"unknown scores 'magnitud'; known are random, magnitude \(nearest: 'magn"
    ):
        itop_prune.apply(mlp(), 0.5, scores="magnitud")


def test_a_sparsity_that_leaves_a_layer_empty_is_refused() -> None:
    with pytest.raises(
        ValueError, match="keeps 1 of 560 weights, and each of 3 layers needs at least 1"
    ):
        itop_prune.apply(mlp(), 0.999)


def test_scores_by_magnitude_keep_the_largest() -> None:
    dense = dict(convnet().named_parameters())
    for name, itop in itop_prune.apply(convnet(), 0.7, "uniform", scores="magnitude").items():
        assert dense[name][itop.mask].abs().min() >= dense[name][~itop.mask].abs().max()


def test_given_scores_keep_the_largest() -> None:
    scores = {"0.weight": torch.arange(320.0).view(16, 20)}
    masks = itop_prune.apply(mlp(), 0.75, scores=scores, include="0")
    assert torch.equal(masks["0.weight"].mask, scores["0.weight"] >= 240)


def test_given_scores_must_hold_every_masked_weight() -> None:
    with pytest.raises(
        ValueError, match=r"scores for 2\.weight must be a tensor of shape \(12, 16\); given: only"
    ):
        itop_prune.apply(mlp(), 0.75, scores={"0.weight": torch.rand(16, 20)})


def test_given_scores_must_have_the_shape_of_the_weight() -> None:
    with pytest.raises(
        ValueError, match=r"scores for 0\.weight .*\(16, 20\); given: Tensor of shape \(20, 16\)"
    ):
        itop_prune.apply(mlp(), 0.75, scores={"0.weight": torch.rand(20, 16)}, include="0")


def test_random_positions_spread_over_the_whole_weight() -> None:
    mask = itop_prune.apply(nn.Linear(200, 200), 0.9)["weight"].mask
    # Hypergeometric: 20 active of 200 in a row or column, standard deviation 4.1.
    for dim in (0, 1):
        assert (mask.sum(dim) - 20).abs().max() < 6 * 4.1


def test_equal_seeds_give_equal_masks() -> None:
    assert all_equal(*(tensors(itop_prune.apply(mlp(weights), 0.5, seed=3)) for weights in (0, 1)))


def test_different_seeds_give_different_masks() -> None:
    first, second = (tensors(itop_prune.apply(mlp(), 0.5, "uniform", seed=seed)) for seed in (3, 4))
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_layers_of_one_shape_get_different_masks() -> None:
    first, second = tensors(
        itop_prune.apply(nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10)), 0.5)
    )
    assert not torch.equal(first, second)


@pytest.mark.parametrize("scores", ["random", "magnitude"])
def test_the_global_generator_is_untouched(scores: str) -> None:
    model = mlp()
    before = torch.get_rng_state()
    itop_prune.apply(model, 0.5, scores=scores)
    assert torch.equal(torch.get_rng_state(), before)


def test_masks_do_not_depend_on_the_memory_format() -> None:
    last = convnet().to(memory_format=torch.channels_last)
    assert all_equal(
        tensors(itop_prune.apply(convnet(), 0.7)), tensors(itop_prune.apply(last, 0.7))
    )


def test_a_frozen_weight_is_masked_and_stays_frozen() -> None:
    model = mlp()
    model[0].weight.requires_grad_(False)
    itop = itop_prune.apply(model, 0.5)["0.weight"]
    assert not itop.parameter.requires_grad
    assert not itop.parameter[~itop.mask].any()


def break_by_method(model: nn.Module) -> None:
    itop_prune.apply(model, 0.5, lambda shapes, density: {})


def break_by_scores(model: nn.Module) -> None:
    itop_prune.apply(
        model, 0.5, scores={"0.weight": torch.rand(16, 20), "2.weight": torch.rand(12, 16)}
    )


def break_by_nan(model: nn.Module) -> None:
    scores = {name: parameter.detach() for name, parameter in model.named_parameters()}
    itop_prune.apply(model, 0.5, scores={**scores, "4.weight": torch.full((4, 12), math.nan)})


def break_by_tie(model: nn.Module) -> None:
    model[4].register_parameter("again", model[4].weight)
    try:
        itop_prune.apply(model, 0.5)
    finally:
        del model[4].again


def break_by_pattern(model: nn.Module) -> None:
    itop_prune.apply(model, 0.5, include=("0", "5"))


@pytest.mark.parametrize(
    "attempt", [break_by_method, break_by_scores, break_by_nan, break_by_tie, break_by_pattern]
)
def test_a_failed_apply_leaves_the_model_untouched(attempt: Callable[[nn.Module], None]) -> None:
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError):
        attempt(model)
    assert [type(module) for module in model] == [type(module) for module in mlp()]
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_apply_refused_for_one_layer_leaves_all_layers_untouched() -> None:
    model = mlp()
    parametrizations.weight_norm(model[4])
    with pytest.raises(ValueError):
        itop_prune.apply(model, 0.5)
    assert type(model[0]) is nn.Linear
    assert itop_prune.find_masks(model) == {}


def test_a_second_apply_on_other_layers_leaves_the_first_masks() -> None:
    model = mlp()
    first = itop_prune.apply(model, 0.5, include="0")
    before = first["0.weight"].mask.clone()
    itop_prune.apply(model, 0.75, include=("2", "4"))
    assert torch.equal(first["0.weight"].mask, before)


def test_a_second_apply_on_other_layers_has_its_own_budget() -> None:
    model = mlp()
    itop_prune.apply(model, 0.5, include="0")
    second = itop_prune.apply(model, 0.75, include=("2", "4"))
    assert sum(active(second).values()) == 60
    assert list(itop_prune.find_masks(model)) == ["0.weight", "2.weight", "4.weight"]


@pytest.mark.parametrize("scores", ["random", "magnitude"])
def test_on_the_meta_device_there_are_the_counts_of_a_real_model(scores: str) -> None:
    real, meta = convnet(), convnet().to("meta")
    expected = {name: itop.active for name, itop in itop_prune.apply(real, 0.7).items()}
    masks = itop_prune.apply(meta, 0.7, scores=scores)
    assert {name: itop.active for name, itop in masks.items()} == expected
    assert all(itop.mask.is_meta for itop in masks.values())
    assert repr(masks["7.weight"]) == f"ITOP(Linear.weight, {expected['7.weight']} of 64 active)"
    assert itop_prune.summarize(meta) == itop_prune.summarize(real)
    assert {
        name: itop.active for name, itop in itop_prune.find_masks(copy.deepcopy(meta)).items()
    } == expected


def test_a_function_is_no_scores() -> None:
    with pytest.raises(ValueError, match="known are random, magnitude"):
        itop_prune.apply(mlp(), 0.5, scores=torch.abs)
