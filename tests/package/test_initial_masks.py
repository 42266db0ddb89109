"""Masks start as asked: how many, where, by which seed; the rest of the model stays what it was."""

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers.ids import as_text
from helpers.toys import batch, convnet, mlp
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import CondConv2d
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import itop_prune
from itop_prune import ITOP, count_active
from itop_prune.layers.handle import active_weights

WEIGHTS = ("0.weight", "2.weight", "4.weight")  # of `mlp`: 320, 192 and 48


def tensors(masks: dict[str, ITOP]) -> list[Tensor]:
    return [itop.mask for itop in masks.values()]


def all_equal(first: dict[str, ITOP], second: dict[str, ITOP]) -> bool:
    pairs = zip(tensors(first), tensors(second), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def apply_and_count(**arguments: Any) -> list[Callable[[nn.Module], Any]]:
    """Both functions that share these arguments."""
    return [
        lambda model: itop_prune.apply(model, **arguments),
        lambda model: count_active(model, **arguments),
    ]


def assert_refused(message: str, **arguments: Any) -> None:
    """Both functions raise the same error, and leave the model as it was."""
    for function in apply_and_count(**{"sparsity": 0.5, **arguments}):
        model = mlp()
        with pytest.raises(ValueError, match=message):
            function(model)
        assert itop_prune.find_masks(model) == {}


# --- how many ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ERK", "ER", "uniform", "magnitude"])
@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.9, 0.98])
def test_exactly_the_asked_share_stays_active(method: str, sparsity: float) -> None:
    masks = itop_prune.apply(mlp(), sparsity, method)
    assert sum(active_weights(masks).values()) == round((1.0 - sparsity) * 560)


def test_a_function_is_a_method() -> None:
    masks = itop_prune.apply(mlp(), 0.5, lambda shapes, density: dict.fromkeys(shapes, density))
    assert active_weights(masks) == {"0.weight": 160, "2.weight": 96, "4.weight": 24}


def test_scores_as_method_take_the_best_of_all_layers() -> None:
    scores = {"0.weight": torch.full((16, 20), 1.0), "2.weight": torch.full((12, 16), 2.0)}
    scores["4.weight"] = torch.full((4, 12), 3.0)
    masks = itop_prune.apply(mlp(), 0.5, scores)
    assert active_weights(masks) == {"0.weight": 40, "2.weight": 192, "4.weight": 48}


def test_the_budget_is_that_of_the_included_weights() -> None:
    for patterns in ({"include": ("0", "2.*")}, {"exclude": "4"}):
        masks = itop_prune.apply(mlp(), 0.5, **patterns)
        assert list(masks) == ["0.weight", "2.weight"]
        assert sum(active_weights(masks).values()) == 256


def test_fixed_densities_are_met_and_count_in_the_budget() -> None:
    """560 weights: the last layer dense, the first at a quarter; the other gets the rest of 280."""
    masks = itop_prune.apply(mlp(), 0.5, densities={"4": 1.0, "0.weight": 0.25})
    assert active_weights(masks) == {"0.weight": 80, "2.weight": 152, "4.weight": 48}


def test_of_two_patterns_that_match_the_first_decides() -> None:
    masks = itop_prune.apply(mlp(), 0.5, densities={"4*": 0.5, "[24]*": 0.25})
    assert (masks["4.weight"].active, masks["2.weight"].active) == (24, 48)


def test_sparsity_zero_masks_everything_and_changes_nothing() -> None:
    model, (x, _) = mlp(), batch(0, 20)
    before = model(x)
    masks = itop_prune.apply(model, 0)
    assert all(itop.mask.all() for itop in masks.values())
    assert torch.equal(model(x), before)


def test_numbers_of_numpy_are_those_of_python() -> None:
    expected = itop_prune.apply(mlp(), 0.5, seed=3)
    for seed in (np.int64(3), np.uint8(3)):
        assert all_equal(itop_prune.apply(mlp(), np.float32(0.5), seed=seed), expected)


# --- counts alone --------------------------------------------------------------------------------


def last_dense(shapes: dict[str, tuple[int, ...]], density: float) -> dict[str, float]:
    """A user's own distribution: all of the last layer, and as much of the others as is left."""
    rest = (density * 560 - 48) / (560 - 48)
    return {name: 1.0 if name == "4.weight" else rest for name in shapes}


SCORES = {"0.weight": torch.rand(16, 20), "2.weight": torch.rand(12, 16)}
SCORES["4.weight"] = torch.rand(4, 12)


@pytest.mark.parametrize(
    "arguments",
    [
        *({"method": method} for method in ("ERK", "ERK+", "ER", "uniform")),
        {"method": "uniform+", "sparsity": 0.3},
        {"method": "magnitude"},
        {"method": last_dense},
        {"method": SCORES},
        {"densities": {"4": 1.0, "0": 0.25}},
        {"method": "uniform", "densities": {"[02]*": 0.35}},
        {"include": ("0", "2.*")},
        {"exclude": "0", "method": "ER"},
        {"sparsity": 0.5, "pattern": "2:4"},
        {"sparsity": 0.75, "pattern": "1:4", "exclude": "4"},
    ],
    ids=as_text,
)
def test_counts_are_those_that_apply_leaves(arguments: dict[str, Any]) -> None:
    arguments = {"sparsity": 0.6, **arguments}
    model = mlp()
    counts = count_active(model, **arguments)
    masks = itop_prune.apply(model, **arguments)
    assert counts == active_weights(masks)
    assert list(counts) == list(masks)
    total = sum(itop.mask.numel() for itop in masks.values())
    assert sum(counts.values()) == round((1.0 - arguments["sparsity"]) * total)


@settings(deadline=None, max_examples=40)
@given(sparsity=st.floats(0.0, 0.99), method=st.sampled_from(["ERK", "ER", "uniform"]))
def test_counts_sum_exactly_and_are_those_of_the_distribution(sparsity: float, method: str) -> None:
    model = mlp()
    counts = count_active(model, sparsity, method)
    shapes = {name: tuple(model.get_parameter(name).shape) for name in WEIGHTS}
    assert counts == itop_prune.distributions.active_counts(shapes, 1.0 - sparsity, method)
    assert sum(counts.values()) == round((1.0 - sparsity) * 560)


def test_counting_leaves_the_model_and_the_global_generator_untouched() -> None:
    model = convnet()
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    count_active(model, 0.7, "magnitude")
    assert [type(layer) for layer in model] == [type(layer) for layer in convnet()]
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize(
    "arguments",
    [
        {"sparsity": 0.7},
        {"sparsity": 0.7, "method": "uniform", "densities": {"7": 1.0}, "exclude": "0"},
        {"sparsity": 0.5, "pattern": "2:4", "exclude": "0"},
    ],
    ids=str,
)
def test_on_the_meta_device_there_are_the_counts_of_a_real_model(arguments: dict) -> None:
    meta = convnet().to("meta")
    assert count_active(meta, **arguments) == count_active(convnet(), **arguments)
    assert itop_prune.find_masks(meta) == {}


def test_several_kernels_in_one_weight_count_as_they_do_in_training() -> None:
    model = nn.ModuleList([CondConv2d(8, 16, 3, num_experts=2), nn.Linear(40, 20)])
    counts = count_active(model, 0.9)
    assert counts == active_weights(itop_prune.apply(model, 0.9))
    assert counts["0.weight"] != count_active(nn.Linear(1152, 2), 0.9)["weight"]


@pytest.mark.parametrize("scores", ["random", "magnitude", "nonzero"])
def test_masks_on_the_meta_device_are_refused_and_counts_are_named(scores: str) -> None:
    model = convnet().to("meta")
    message = r"0\.weight is on the meta device, .*; call itop_prune\.count_active for the counts"
    with pytest.raises(ValueError, match=message):
        itop_prune.apply(model, None if scores == "nonzero" else 0.7, scores=scores)
    with pytest.raises(ValueError, match=message):
        count_active(model, 0.7, "magnitude")
    assert itop_prune.find_masks(model) == {}


# --- where ---------------------------------------------------------------------------------------


def test_scores_by_magnitude_keep_the_largest() -> None:
    dense = dict(convnet().named_parameters())
    for name, itop in itop_prune.apply(convnet(), 0.7, "uniform", scores="magnitude").items():
        assert dense[name][itop.mask].abs().min() >= dense[name][~itop.mask].abs().max()


def test_given_scores_keep_the_largest() -> None:
    scores = {"0.weight": torch.arange(320.0).view(16, 20)}
    masks = itop_prune.apply(mlp(), 0.75, scores=scores, include="0")
    assert torch.equal(masks["0.weight"].mask, scores["0.weight"] >= 240)


def pruned(seed: int = 0) -> nn.Sequential:
    """The `mlp` as a pruned checkpoint has it: with zeros, and nothing else in the middle layer."""
    model = mlp(seed)
    with torch.no_grad():
        model[0].weight[::2, 3] = 0
        model[2].weight.zero_()
        model[4].weight[1] = -0.0
    return model


@pytest.mark.parametrize("storage", ["mask", "sparse"])
def test_nonzero_takes_the_masks_from_the_zeros_exactly(storage: str) -> None:
    model, dense, (x, _) = pruned(), pruned(), batch(0, 20)
    masks = itop_prune.apply(model, scores="nonzero", storage=storage)
    assert active_weights(masks) == {"0.weight": 312, "2.weight": 0, "4.weight": 36}
    for name, itop in masks.items():
        assert torch.equal(itop.mask, dense.get_parameter(name) != 0)
        assert torch.equal(itop.weight, dense.get_parameter(name))
    assert torch.allclose(model(x), dense(x), atol=1e-6)


def test_nonzero_without_a_zero_warns() -> None:
    with pytest.warns(UserWarning, match="found no zero, .*load the pruned weights before apply"):
        masks = itop_prune.apply(mlp(), scores="nonzero")
    assert all(itop.mask.all() for itop in masks.values())


def test_nonzero_keeps_a_pattern_that_the_zeros_hold_and_refuses_another() -> None:
    model = mlp()
    itop_prune.apply(model, 0.5, pattern="2:4")
    itop_prune.remove(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"zeros of 0\.weight, .* do not hold the pattern 1:4"):
        itop_prune.apply(model, scores="nonzero", pattern="1:4")
    assert itop_prune.find_masks(model) == {}
    masks = itop_prune.apply(model, scores="nonzero", pattern="2:4")
    assert [itop.pattern for itop in masks.values()] == [(2, 4)] * 3
    assert all(torch.equal(itop.weight, before[name]) for name, itop in masks.items())


def test_random_positions_spread_over_the_whole_weight() -> None:
    mask = itop_prune.apply(nn.Linear(200, 200), 0.9)["weight"].mask
    # Hypergeometric: 20 active of 200 in a row or column, standard deviation 4.1.
    for dim in (0, 1):
        assert (mask.sum(dim) - 20).abs().max() < 6 * 4.1


def test_positions_depend_on_seed_and_name_and_on_nothing_else() -> None:
    expected = itop_prune.apply(convnet(), 0.7, "uniform", seed=3)
    other_weights = convnet(seed=1).to(memory_format=torch.channels_last)
    assert all_equal(itop_prune.apply(other_weights, 0.7, "uniform", seed=3), expected)

    other = itop_prune.apply(convnet(), 0.7, "uniform", seed=4)
    pairs = zip(tensors(other), tensors(expected), strict=True)
    assert not any(torch.equal(a, b) for a, b in pairs)

    two = itop_prune.apply(nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10)), 0.5)
    assert not torch.equal(*tensors(two))


@pytest.mark.parametrize("scores", ["random", "magnitude"])
def test_the_global_generator_is_untouched(scores: str) -> None:
    model = mlp()
    before = torch.get_rng_state()
    itop_prune.apply(model, 0.5, scores=scores)
    assert torch.equal(torch.get_rng_state(), before)


# --- what happens to the model -------------------------------------------------------------------


def test_masked_parameters_stay_where_they_are_and_are_zero_off_the_mask() -> None:
    model, dense = convnet(), convnet()
    before = [(id(parameter), parameter.data_ptr()) for parameter in model.parameters()]
    masks = itop_prune.apply(model, 0.7)
    after = [(id(parameter), parameter.data_ptr()) for parameter in model.parameters()]
    assert after == before
    for name, itop in masks.items():
        assert torch.equal(itop.parameter, dense.get_parameter(name) * itop.mask)


def test_masks_are_keyed_by_the_names_of_before_and_parameters_are_called_orig() -> None:
    model = mlp()
    assert tuple(itop_prune.apply(model, 0.7)) == WEIGHTS
    names = ["0.weight_orig", "0.bias", "2.weight_orig", "2.bias", "4.weight_orig", "4.bias"]
    assert [name for name, _ in model.named_parameters()] == names


def test_biases_norms_and_what_is_excluded_are_left_alone() -> None:
    model, twin = convnet(), convnet()
    masks = itop_prune.apply(model, 0.7, exclude="7")
    assert list(masks) == ["0.weight", "3.weight"]
    assert type(model[7]) is nn.Linear
    state = model.state_dict()
    for name, tensor in twin.state_dict().items():
        assert name in masks or torch.equal(state[name], tensor)


def test_a_frozen_weight_is_masked_and_stays_frozen() -> None:
    model = mlp()
    model[0].weight.requires_grad_(False)
    itop = itop_prune.apply(model, 0.5)["0.weight"]
    assert not itop.parameter.requires_grad
    assert not itop.parameter[~itop.mask].any()


def test_a_second_apply_on_other_layers_has_its_own_budget_and_leaves_the_first_masks() -> None:
    model = mlp()
    first = itop_prune.apply(model, 0.5, include="0")
    before = first["0.weight"].mask.clone()
    second = itop_prune.apply(model, 0.75, include=("2", "4"))
    assert torch.equal(first["0.weight"].mask, before)
    assert sum(active_weights(second).values()) == 60
    assert tuple(itop_prune.find_masks(model)) == WEIGHTS


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1, 1.5, math.nan, math.inf, "0.9", None, True])
def test_a_bad_sparsity_is_refused_with_the_range(sparsity: object) -> None:
    message = rf"sparsity is {sparsity!r}; allowed is a number in \[0, 1\)"
    assert_refused(message, sparsity=sparsity)


@pytest.mark.parametrize("method", ["unifrom", None, 0.5, ["ERK"]])
def test_an_unknown_method_is_answered_with_the_menu(method: Any) -> None:
    known = r"known are uniform, uniform\+, ER, ERK, ERK\+, magnitude"
    own = "; or scores by name, such as itop_prune.saliency makes$"
    assert_refused(rf"unknown method {method!r}; {known}.*{own}".replace("[", r"\["), method=method)


def test_the_nearest_method_is_named() -> None:
    assert_refused(r"unknown method 'unifrom'.*\(nearest: 'uniform'\)", method="unifrom")


@pytest.mark.parametrize(
    ("densities", "message"),
    [
        *((bad, r"densities is .*; allowed are shares by pattern") for bad in (["4"], "4", 0.5, 0)),
        *(
            ({"0": bad}, r"densities\['0'\] is .*; allowed is a number in \[0, 1\]")
            for bad in (-0.1, 1.1, math.nan, "1", True)
        ),
        ({"0": 1.0}, "the fixed densities keep 320 weights, and the budget is 56 of 560"),
        ({"head": 1.0}, r"densities pattern 'head' matches no weight; the weights are: 0\.weight"),
    ],
    ids=str,
)
def test_bad_densities_are_refused(densities: Any, message: str) -> None:
    assert_refused(message, sparsity=0.9, densities=densities)


def test_a_sparsity_that_leaves_a_layer_empty_is_refused() -> None:
    assert_refused("keeps 1 of 560 weights, and each of 3 layers needs at least 1", sparsity=0.999)


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    assert_refused("include pattern '5' matches no weight", include=("0", "5"))


def test_a_method_that_forgets_a_layer_is_refused() -> None:
    assert_refused("<lambda>", method=lambda shapes, density: {})


NAN = {**SCORES, "4.weight": torch.full((4, 12), math.nan)}
PARTIAL = {"0.weight": SCORES["0.weight"]}
TURNED = {**SCORES, "0.weight": SCORES["0.weight"].T}


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (PARTIAL, r"scores for 2\.weight must be a tensor of shape \(12, 16\); given: only"),
        (TURNED, r"scores for 0\.weight .*\(16, 20\); given: Tensor of shape \(20, 16\)"),
        ({**SCORES, "2.weight": 1.0}, r"scores for 2\.weight .*; given: float of shape \(\)"),
        (NAN, r"scores for 4\.weight hold NaN; scores must be numbers"),
    ],
    ids=["only one", "turned", "no tensor", "NaN"],
)
def test_scores_must_be_numbers_of_the_shape_of_every_masked_weight(
    scores: dict, message: str
) -> None:
    assert_refused(message, method=scores)
    model = mlp()
    with pytest.raises(ValueError, match=message):
        itop_prune.apply(model, 0.5, scores=scores)
    assert itop_prune.find_masks(model) == {}


def test_weights_that_are_nan_have_no_magnitude() -> None:
    model = mlp()
    with torch.no_grad():
        model[2].weight[0, 0] = math.nan
    for arguments in ({"scores": "magnitude"}, {"method": "magnitude"}):
        with pytest.raises(ValueError, match=r"magnitude gave NaN for 2\.weight"):
            itop_prune.apply(model, 0.5, **arguments)
    assert itop_prune.find_masks(model) == {}


@pytest.mark.parametrize("scores", ["magnitud", torch.abs, None])
def test_unknown_scores_are_answered_with_the_menu(scores: Any) -> None:
    with pytest.raises(ValueError, match=r"unknown scores .*; known are random, magnitude"):
        itop_prune.apply(mlp(), 0.5, scores=scores)


@pytest.mark.parametrize(
    "arguments", [{"sparsity": 0.5}, {"method": "uniform"}, {"densities": {"0": 1.0}}], ids=str
)
def test_a_budget_beside_nonzero_is_refused(arguments: dict[str, Any]) -> None:
    model, (name, *_) = mlp(), arguments
    with pytest.raises(ValueError, match=rf"{name} is .*: leave {name} out, or take"):
        itop_prune.apply(model, scores="nonzero", **arguments)
    assert itop_prune.find_masks(model) == {}


def test_without_nonzero_a_sparsity_is_needed() -> None:
    with pytest.raises(ValueError, match=r"sparsity is None; .* Only scores='nonzero' needs none"):
        itop_prune.apply(mlp(), scores="magnitude")


@pytest.mark.parametrize("seed", [1.5, "x", None, True])
def test_a_seed_that_is_no_whole_number_is_refused(seed: Any) -> None:
    model = mlp()
    with pytest.raises(ValueError, match=r"seed is .*; allowed is a whole number"):
        itop_prune.apply(model, 0.5, seed=seed)
    assert itop_prune.find_masks(model) == {}


def tie(model: nn.Module) -> None:
    model[4].register_parameter("again", model[4].weight)


def normalize(model: nn.Module) -> None:
    parametrizations.weight_norm(model[4])


def drop(model: nn.Module) -> None:
    itop_prune.apply(model, 0.5, include="4")


@pytest.mark.parametrize("change", [tie, normalize, drop])
def test_one_layer_that_can_not_be_masked_leaves_all_layers_untouched(change: Callable) -> None:
    model = mlp()
    change(model)
    before = copy.deepcopy(model.state_dict())
    for function in apply_and_count(sparsity=0.5):
        with pytest.raises(ValueError, match=r"can't mask\n  4\.weight: "):
            function(model)
    assert type(model[0]) is nn.Linear
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_on_the_meta_device_scores_are_counted_and_magnitudes_refused() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    scores = {"0.weight": torch.rand(16, 8), "1.weight": torch.rand(4, 16)}
    counts = itop_prune.count_active(model, 0.8, scores)
    assert sum(counts.values()) == round(0.2 * 192)
    with pytest.raises(
        ValueError, match=r"0\.weight is on the meta device.*another method than magnitude"
    ):
        itop_prune.count_active(model, 0.8, "magnitude")


def test_a_number_that_yaml_made_of_a_pattern_is_answered_with_the_argument() -> None:
    with pytest.raises(ValueError, match=r'method is 124; .*write pattern="2:4"'):
        itop_prune.apply(nn.Linear(8, 8), 0.5, 124)  # type: ignore[arg-type]
