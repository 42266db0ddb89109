"""Masks are placed as asked, found again, and baked in; everything else of the model stays what it was."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from toys import batch, convnet, mlp, train

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
    assert sum(active(itop_prune.apply(mlp(), sparsity, method)).values()) == round((1.0 - sparsity) * 560)


@settings(deadline=None, max_examples=40)
@given(sparsity=st.floats(0.0, 0.99))
def test_counts_are_those_of_the_distribution(sparsity: float) -> None:
    model = mlp()
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.ndim == 2}
    counts = itop_prune.distributions.active_counts(shapes, 1.0 - sparsity, "ERK")
    assert active(itop_prune.apply(model, sparsity)) == counts


def test_a_function_is_a_method() -> None:
    masks = itop_prune.apply(mlp(), 1.0 - 280 / 560, lambda shapes, density: dict.fromkeys(shapes, density))
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
    assert [id(parameter) for parameter in model.parameters()] == [id(parameter) for parameter in before]


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


def test_a_mask_is_a_bool_buffer_of_the_state_dict() -> None:
    model = mlp()
    itop_prune.apply(model, 0.7)
    assert model.state_dict()["2.weight_mask"].dtype is torch.bool


def test_masks_are_keyed_by_the_names_of_before() -> None:
    model = convnet()
    names = [name for name, parameter in model.named_parameters() if parameter.ndim > 1]
    assert list(itop_prune.apply(model, 0.7)) == names


def test_biases_and_norms_are_left_alone() -> None:
    model, twin = convnet(), convnet()
    itop_prune.apply(model, 0.7)
    state = model.state_dict()
    untouched = [name for name in twin.state_dict() if not name.endswith(".weight") or name == "1.weight"]
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
    with pytest.raises(ValueError, match=rf"sparsity is {sparsity!r}; allowed is a number in \[0, 1\)"):
        itop_prune.apply(mlp(), sparsity)


def test_an_unknown_method_is_answered_with_the_menu() -> None:
    with pytest.raises(
        ValueError, match=r"unknown method 'unifrom'; known are uniform, uniform\+, ER, ERK, ERK\+ \(nearest: 'uniform'"
    ):
        itop_prune.apply(mlp(), 0.5, "unifrom")


def test_fixed_densities_are_met_and_count_in_the_budget() -> None:
    """560 weights: the last layer dense, the first at a quarter; the one between gets the rest of 280."""
    masks = itop_prune.apply(mlp(), 0.5, densities={"4": 1.0, "0.weight": 0.25})
    assert {name: itop.active for name, itop in masks.items()} == {"0.weight": 80, "2.weight": 152, "4.weight": 48}


def test_of_two_patterns_that_match_the_first_decides() -> None:
    masks = itop_prune.apply(mlp(), 0.5, densities={"4*": 0.5, "[24]*": 0.25})
    assert (masks["4.weight"].active, masks["2.weight"].active) == (24, 48)


def test_what_is_excluded_does_not_count_in_the_budget() -> None:
    masks = itop_prune.apply(mlp(), 0.5, exclude="4")
    assert sum(itop.active for itop in masks.values()) == 256


def test_fixed_densities_above_the_budget_are_refused_and_nothing_is_masked() -> None:
    model = mlp()
    with pytest.raises(ValueError, match=r"the fixed densities keep 320 weights, and the budget is 56 of 560"):
        itop_prune.apply(model, 0.9, densities={"0": 1.0})
    assert not itop_prune.find_masks(model)


@pytest.mark.parametrize("density", [-0.1, 1.1, math.nan, "1", True])
def test_a_fixed_density_out_of_range_is_refused(density: object) -> None:
    with pytest.raises(ValueError, match=r"densities\['0'\] is .*; allowed is a number in \[0, 1\]"):
        itop_prune.apply(mlp(), 0.5, densities={"0": density})


def test_a_pattern_of_densities_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"densities pattern 'head' matches no weight; the weights are: 0\.weight"):
        itop_prune.apply(mlp(), 0.5, densities={"head": 1.0})


def test_unknown_scores_are_answered_with_the_menu() -> None:
    with pytest.raises(ValueError, match=r"unknown scores 'magnitud'; known are random, magnitude \(nearest: 'magn"):
        itop_prune.apply(mlp(), 0.5, scores="magnitud")


def test_a_sparsity_that_leaves_a_layer_empty_is_refused() -> None:
    with pytest.raises(ValueError, match="keeps 1 of 560 weights, and each of 3 layers needs at least 1"):
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
    with pytest.raises(ValueError, match=r"scores for 2\.weight must be a tensor of shape \(12, 16\); given: only"):
        itop_prune.apply(mlp(), 0.75, scores={"0.weight": torch.rand(16, 20)})


def test_given_scores_must_have_the_shape_of_the_weight() -> None:
    with pytest.raises(ValueError, match=r"scores for 0\.weight .*\(16, 20\); given: Tensor of shape \(20, 16\)"):
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
    first, second = tensors(itop_prune.apply(nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10)), 0.5))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("scores", ["random", "magnitude"])
def test_the_global_generator_is_untouched(scores: str) -> None:
    model = mlp()
    before = torch.get_rng_state()
    itop_prune.apply(model, 0.5, scores=scores)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_channels_last_convolution_keeps_its_memory_format() -> None:
    model = convnet().to(memory_format=torch.channels_last)
    itop = itop_prune.apply(model, 0.7)["3.weight"]
    assert itop.parameter.is_contiguous(memory_format=torch.channels_last)
    assert itop.mask.is_contiguous(memory_format=torch.channels_last)


def test_masks_do_not_depend_on_the_memory_format() -> None:
    last = convnet().to(memory_format=torch.channels_last)
    assert all_equal(tensors(itop_prune.apply(convnet(), 0.7)), tensors(itop_prune.apply(last, 0.7)))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_attention_computes_with_its_masked_weights(mode: str) -> None:
    attention, twin = nn.MultiheadAttention(8, 2, batch_first=True), nn.MultiheadAttention(8, 2, batch_first=True)
    masks = itop_prune.apply(attention, 0.6)
    assert list(masks) == ["in_proj_weight", "out_proj.weight"]
    twin.load_state_dict(itop_prune.dense_state_dict(attention))
    x = torch.randn(2, 5, 8)
    with torch.set_grad_enabled(mode == "train"):
        outputs = [layer.train(mode == "train")(x, x, x)[0] for layer in (attention, twin)]
    assert torch.allclose(*outputs, atol=1e-6)


def test_attention_reacts_to_a_change_of_its_parameter() -> None:
    attention, x = nn.MultiheadAttention(8, 2), torch.randn(5, 2, 8)
    masks = itop_prune.apply(attention, 0.6)
    before = attention(x, x, x)[0]
    with torch.no_grad():
        masks["in_proj_weight"].parameter.mul_(2.0)
    assert not torch.allclose(attention(x, x, x)[0], before)


def test_a_frozen_weight_is_masked_and_stays_frozen() -> None:
    model = mlp()
    model[0].weight.requires_grad_(False)
    itop = itop_prune.apply(model, 0.5)["0.weight"]
    assert not itop.parameter.requires_grad
    assert not itop.parameter[~itop.mask].any()


def break_by_method(model: nn.Module) -> None:
    itop_prune.apply(model, 0.5, lambda shapes, density: {})


def break_by_scores(model: nn.Module) -> None:
    itop_prune.apply(model, 0.5, scores={"0.weight": torch.rand(16, 20), "2.weight": torch.rand(12, 16)})


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


@pytest.mark.parametrize("attempt", [break_by_method, break_by_scores, break_by_nan, break_by_tie, break_by_pattern])
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


def test_torch_says_the_model_is_pruned() -> None:
    model = mlp()
    itop_prune.apply(model, 0.5)
    assert prune.is_pruned(model)


def test_the_method_is_the_forward_pre_hook_that_torch_prune_looks_for() -> None:
    """It can be found as torch finds it: `prune.remove` only works where a hook of that kind names the tensor."""
    layer = nn.Linear(6, 4)
    itop = itop_prune.apply(layer, 0.5)["weight"]
    assert isinstance(itop, prune.BasePruningMethod)
    prune.remove(layer, "weight")
    assert not prune.is_pruned(layer)


def test_prune_remove_bakes_the_mask_in() -> None:
    layer = nn.Linear(6, 4)
    itop_prune.apply(layer, 0.5)
    with torch.no_grad():
        layer.weight_orig.fill_(2.0)
    mask = layer.weight_mask
    prune.remove(layer, "weight")
    assert torch.equal(layer.weight, 2.0 * mask)
    assert list(layer.state_dict()) == ["weight", "bias"]


def test_prune_remove_keeps_the_parameter_object() -> None:
    layer = nn.Linear(6, 4)
    parameter = layer.weight
    itop_prune.apply(layer, 0.5)
    prune.remove(layer, "weight")
    assert layer.weight is parameter


def test_remove_gives_names_classes_and_order_back() -> None:
    model, dense = convnet(), convnet()
    itop_prune.apply(model, 0.7)
    itop_prune.remove(model)
    assert list(model.state_dict()) == list(dense.state_dict())
    assert [type(module) for module in model] == [type(module) for module in dense]


def test_remove_keeps_the_outputs() -> None:
    model, x = convnet().eval(), batch(0, 3, 8, 8)[0]
    itop_prune.apply(model, 0.7)
    before = model(x)
    itop_prune.remove(model)
    assert torch.equal(model(x), before)


def test_remove_leaves_no_mask_to_be_found() -> None:
    model = convnet()
    itop_prune.apply(model, 0.7)
    itop_prune.remove(model)
    assert itop_prune.find_masks(model) == {}
    assert not prune.is_pruned(model)


def test_remove_of_a_dense_model_does_nothing() -> None:
    model = mlp()
    itop_prune.remove(model)
    assert list(model.state_dict()) == list(mlp().state_dict())


def test_a_removed_model_can_be_masked_again() -> None:
    model = mlp()
    itop_prune.apply(model, 0.5)
    itop_prune.remove(model)
    assert sum(active(itop_prune.apply(model, 0.75)).values()) == 140


def test_an_optimizer_goes_on_after_remove() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    itop_prune.apply(model, 0.5)
    train(model, optimizer, steps=range(2))
    itop_prune.remove(model)
    before = model[0].weight.detach().clone()
    train(model, optimizer, steps=range(1))
    assert not torch.equal(model[0].weight, before)


def test_find_masks_gives_what_apply_gave() -> None:
    model = convnet()
    masks = itop_prune.apply(model, 0.7)
    assert itop_prune.find_masks(model) == masks


def test_find_masks_of_an_averaged_model_are_those_of_the_copy() -> None:
    model = mlp()
    masks = itop_prune.apply(model, 0.5)
    found = itop_prune.find_masks(torch.optim.swa_utils.AveragedModel(model))
    assert list(found) == list(masks)
    assert not any(found[name].mask is itop.mask for name, itop in masks.items())


def test_a_weight_stays_sparse_while_it_trains() -> None:
    model = mlp()
    masks = itop_prune.apply(model, 0.5)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01), steps=range(5))
    assert not any(itop.parameter[~itop.mask].any() for itop in masks.values())


def test_a_given_mask_is_applied_as_it_is() -> None:
    layer, mask = nn.Linear(6, 4), torch.rand(4, 6) < 0.5
    assert torch.equal(ITOP.apply(layer, "weight", mask).mask, mask)


def test_a_given_mask_is_copied() -> None:
    layer, mask = nn.Linear(6, 4), torch.ones(4, 6, dtype=torch.bool)
    ITOP.apply(layer, "weight", mask)
    mask.fill_(False)
    assert layer.weight_mask.all()


def test_a_given_mask_may_be_of_numbers() -> None:
    layer = nn.Linear(3, 1)
    itop = ITOP.apply(layer, "weight", torch.tensor([[1.0, 0.0, 2.0]]))
    assert itop.mask.tolist() == [[True, False, True]]


def test_a_given_mask_of_another_shape_is_refused() -> None:
    layer = nn.Linear(6, 4)
    with pytest.raises(ValueError, match=r"mask of weight has shape \(6, 4\), the parameter shape \(4, 6\)"):
        ITOP.apply(layer, "weight", torch.ones(6, 4))
    assert type(layer) is nn.Linear


def test_a_given_mask_of_a_bias_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mask of bias has shape \(4,\), the parameter no tensor"):
        ITOP.apply(nn.Linear(6, 4, bias=False), "bias", torch.ones(4))


def test_a_placed_mask_is_false_everywhere_and_leaves_the_parameter_to_what_is_loaded() -> None:
    layer = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    parameter, before = layer.weight, layer.weight.detach().clone()
    itop = ITOP.place(layer, "weight")
    assert itop_prune.find_masks(layer) == {"weight": itop}
    assert itop.parameter is parameter
    assert torch.equal(itop.parameter, before)
    assert not itop.mask.any()
    assert itop.mask.stride() == before.stride()


def test_a_given_mask_on_a_masked_weight_is_refused() -> None:
    layer = nn.Linear(6, 4)
    ITOP.apply(layer, "weight", torch.ones(4, 6))
    with pytest.raises(ValueError, match=r"weight of Linear can't be masked: it has a mask already"):
        ITOP.apply(layer, "weight", torch.ones(4, 6))


def test_the_repr_counts() -> None:
    masks = itop_prune.apply(nn.Linear(100, 40), 0.7)
    assert repr(masks["weight"]) == "ITOP(Linear.weight, 1,200 of 4,000 active)"


@pytest.mark.parametrize("scores", ["random", "magnitude"])
def test_on_the_meta_device_there_are_the_counts_of_a_real_model(scores: str) -> None:
    real, meta = convnet(), convnet().to("meta")
    expected = {name: itop.active for name, itop in itop_prune.apply(real, 0.7).items()}
    masks = itop_prune.apply(meta, 0.7, scores=scores)
    assert {name: itop.active for name, itop in masks.items()} == expected
    assert all(itop.mask.is_meta for itop in masks.values())
    assert repr(masks["7.weight"]) == f"ITOP(Linear.weight, {expected['7.weight']} of 64 active)"
    assert itop_prune.summarize(meta) == itop_prune.summarize(real)
    assert {name: itop.active for name, itop in itop_prune.find_masks(copy.deepcopy(meta)).items()} == expected


def test_what_was_planned_on_the_meta_device_goes_with_the_mask() -> None:
    model = mlp().to("meta")
    itop_prune.apply(model, 0.5)
    itop_prune.remove(model)
    model.to_empty(device="cpu")
    masks = itop_prune.apply(model, 0.75, "uniform")
    assert sum(itop.active for itop in masks.values()) == 140
    assert model(torch.zeros(3, 20)).shape == (3, 4)


def test_masks_of_the_meta_device_are_not_trained() -> None:
    model = mlp().to("meta")
    masks = itop_prune.apply(model, 0.7)
    assert model(torch.empty(3, 20, device="meta")).shape == (3, 4)  # a look ahead works
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match=r"was made on the meta device.*build the model on a real device"):
        itop_prune.MaskScheduler(masks, optimizer, total_steps=10, every=5)


def test_masks_moved_from_the_meta_device_without_positions_do_not_even_compute() -> None:
    model = mlp().to("meta")
    masks = itop_prune.apply(model, 0.7)
    model.to_empty(device="cpu")
    model.load_state_dict(mlp().state_dict())  # dense weights bring no positions
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for use in (
        lambda: itop_prune.MaskScheduler(masks, optimizer, total_steps=10, every=5),
        lambda: model(torch.ones(3, 20)),
        lambda: copy.deepcopy(model)(torch.ones(3, 20)),
    ):
        with pytest.raises(RuntimeError, match="was made on the meta device"):
            use()


@pytest.mark.parametrize("how", ["assign", "to_empty", "load"])
def test_a_model_of_the_meta_device_that_got_its_positions_from_a_state_dict_is_trained(how: str) -> None:
    model, saved = mlp().to("meta"), mlp()
    itop_prune.apply(saved, 0.8)
    masks = itop_prune.apply(model, 0.7)
    if how != "assign":
        model.to_empty(device="cpu")
    if how == "load":
        itop_prune.load(model, saved.state_dict())
    else:
        model.load_state_dict(saved.state_dict(), assign=how == "assign")
    assert itop_prune.summarize(model).active == 112
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    regrow = itop_prune.MaskScheduler(masks, optimizer, total_steps=10, every=5)
    train(model, optimizer, regrow)
    assert regrow.updates == 2


def test_compute_mask_is_the_mask_within_the_default() -> None:
    layer = nn.Linear(6, 4)
    itop = itop_prune.apply(layer, 0.5)["weight"]
    default = torch.zeros(4, 6)
    default[:2] = 1.0
    expected = itop.mask.clone()
    expected[2:] = False
    assert torch.equal(itop.compute_mask(layer.weight, default), expected)


def test_a_function_is_no_scores() -> None:
    with pytest.raises(ValueError, match="known are random, magnitude"):
        itop_prune.apply(mlp(), 0.5, scores=torch.abs)


def test_ddp_keeps_what_the_user_told_it_to_ignore() -> None:
    model = mlp()
    model.register_buffer("attn_mask", torch.ones(2))
    key = "_ddp_params_and_buffers_to_ignore"
    setattr(model, key, ["attn_mask"])
    itop_prune.apply(model, 0.5, include="0")
    assert getattr(model, key) == ["0.weight_mask", "attn_mask"]
    itop_prune.remove(model)
    assert getattr(model, key) == ["attn_mask"]
