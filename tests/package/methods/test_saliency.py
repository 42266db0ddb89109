"""Scores before training: each against its formula worked out by hand, and nothing left behind."""

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from helpers.toys import batch, convnet, mlp
from timm.layers import set_fused_attn
from torch import Tensor, nn
from torch.nn import functional as F

import itop_prune
from itop_prune.methods.saliency import SALIENCY, grasp, ratios, snip, synflow

BATCHES = [batch(step, 20) for step in range(3)]
every_score = pytest.mark.parametrize("name", SALIENCY)


def scores_of(name: str, model: nn.Module | None = None) -> dict[str, Tensor]:
    model = mlp() if model is None else model
    if name == "synflow":
        return synflow(model, (20,), 0.3)
    return SALIENCY[name](model, BATCHES, F.cross_entropy)


def weights_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if name.endswith("weight")}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, **tolerance)


# --- SNIP and GraSP ------------------------------------------------------------------------------


def test_snip_is_the_weight_times_the_mean_gradient_of_all_batches() -> None:
    model = mlp()
    sum(F.cross_entropy(model(x), y) / 3 for x, y in BATCHES).backward()
    expected = {name: (p * p.grad).abs().detach() for name, p in weights_of(model).items()}
    assert_close(snip(model, BATCHES, F.cross_entropy), expected)


def test_grasp_is_the_weight_times_hessian_times_gradient() -> None:
    """The loss (w x)^2 / 2 with x = (1, 2, 0) has g = (w x) x, H = x x^T, Hg = 5 g."""
    layer = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -3.0, 7.0]]))
    x = torch.tensor([[1.0, 2.0, 0.0]])
    found = grasp(layer, [(x, x)], lambda output, _: output.square().sum() / 2)
    assert found["weight"].tolist() == [[1.0 * 5 * -5 * 1, -3.0 * 5 * -5 * 2, 0.0]]


def test_grasp_takes_the_gradient_and_the_hessian_of_the_mean_loss() -> None:
    model = mlp()
    weights = weights_of(model)
    loss = sum(F.cross_entropy(model(x), y) / 3 for x, y in BATCHES)
    gradients = torch.autograd.grad(loss, weights.values(), create_graph=True)
    products = torch.autograd.grad(sum((g * g.detach()).sum() for g in gradients), weights.values())
    pairs = zip(weights.items(), products, strict=True)
    expected = {name: (w * product).detach() for (name, w), product in pairs}
    found = grasp(model, iter(BATCHES), F.cross_entropy)
    assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_grasp_of_a_loss_that_is_linear_in_the_weights_is_zero() -> None:
    """Its Hessian is 0, and autograd has no graph of it."""
    layer = nn.Linear(3, 1, bias=False)
    found = grasp(layer, [(torch.ones(1, 3), torch.zeros(1))], lambda output, _: output.sum())
    assert found["weight"].tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("function", [snip, grasp])
def test_batches_whose_loss_is_constant_count_in_the_mean(function: Callable) -> None:
    def some(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target) if len(output) == 8 else target.double().sum()

    x, y = batch(0, 20)
    found = function(mlp(), [(x, y), (x[:4], y[:4])], some)
    factor = 0.5 if function is snip else 0.25  # g is halved, and so is H
    expected = function(mlp(), [(x, y)], F.cross_entropy)
    assert_close(found, {name: factor * tensor for name, tensor in expected.items()})


def test_snip_sums_bfloat16_gradients_in_float32() -> None:
    """A sum of 1 and 200 times 2^-8 in bfloat16 would stay at 1; its next number is 1 + 2^-7."""
    layer = nn.Linear(1, 1, bias=False).bfloat16()
    nn.init.ones_(layer.weight)
    inputs = [1.0, *[2.0**-8] * 200]
    batches = [(torch.tensor([[x]]).bfloat16(), torch.zeros(1)) for x in inputs]
    found = snip(layer, batches, lambda out, _: out.sum())
    assert found["weight"].item() == pytest.approx((1.0 + 200 * 2.0**-8) / 201)


def test_grasp_sees_through_fused_attention() -> None:
    """Torch's fused kernels have no second derivative; attention written out has."""
    torch.manual_seed(0)
    create = timm.create_model
    model = create("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=4)
    batches = [(torch.randn(4, 3, 32, 32), torch.arange(4))]
    found = grasp(model, batches, F.cross_entropy)
    set_fused_attn(False)
    try:
        plain = create("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=4)
    finally:
        set_fused_attn(True)
    plain.load_state_dict(model.state_dict())
    assert_close(found, grasp(plain, batches, F.cross_entropy), rtol=1e-3, atol=1e-7)


def test_a_model_without_second_derivatives_is_an_error_with_what_to_take() -> None:
    model = nn.Sequential(nn.Linear(20, 8), nn.Hardsigmoid(), nn.Linear(8, 4))
    message = r"GraSP needs second derivatives, which .* Sequential: .*; score it by snip"
    with pytest.raises(RuntimeError, match=message):
        grasp(model, BATCHES, F.cross_entropy)


def test_a_compiled_model_is_scored_as_the_plain_one() -> None:
    model = mlp()
    found = grasp(torch.compile(model, backend="eager"), BATCHES, F.cross_entropy)
    assert_close(found, grasp(model, BATCHES, F.cross_entropy), rtol=0.0, atol=0.0)


# --- SynFlow -------------------------------------------------------------------------------------


def path_network() -> nn.Sequential:
    network = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([[1.0, -2.0], [0.5, 0.0]]))
        network[2].weight.copy_(torch.tensor([[-4.0, 2.0]]))
    return network


def test_synflow_is_what_flows_through_a_weight_when_all_are_positive() -> None:
    """Paths of 1 * 4, 2 * 4 and 0.5 * 2: the second layer carries sums of two; the most is 12."""
    found = synflow(path_network(), (2,), 1.0)
    torch.testing.assert_close(found["0.weight"], torch.tensor([[4.0, 8.0], [1.0, 0.0]]) / 12)
    torch.testing.assert_close(found["2.weight"], torch.tensor([[12.0, 1.0]]) / 12)


def test_synflow_in_rounds_drops_what_each_density_leaves_out() -> None:
    """A quarter of six weights in two rounds: the half left by the first carries the flow."""
    found = synflow(path_network(), (2,), density=0.25, iterations=2)
    torch.testing.assert_close(found["0.weight"], torch.tensor([[4.0, 8.0], [0.0, 0.0]]) / 12)
    torch.testing.assert_close(found["2.weight"], torch.tensor([[12.0, 0.0]]) / 12)


def test_synflow_empties_no_layer_in_the_rounds_that_it_takes() -> None:
    """Seven layers at 98 %: one round would leave one weight in the wide ones."""
    torch.manual_seed(0)
    widths = [64, 256, 64, 64, 64, 64, 64, 4]
    layers = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    least = []
    for options in ({}, {"iterations": 1}):
        model = copy.deepcopy(nn.Sequential(*layers))
        found = synflow(model, (64,), 0.02, **options)
        masks = itop_prune.apply(model, 0.98, method=found, scores=found)
        least.append(min(itop.active for itop in masks.values()))
    assert least[0] >= 20
    assert least[1] <= 5


def test_synflow_of_a_deep_network_neither_overflows_nor_underflows() -> None:
    """60 layers of weights of 0.01: R is about 1e-65, and every layer carries all of it."""
    wide = nn.Sequential(*[nn.Linear(400, 400) for _ in range(60)])
    found = synflow(wide, (400,), 0.1, iterations=1)
    assert all(tensor.isfinite().all() and tensor.max() > 0 for tensor in found.values())

    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(10, 10, bias=False) for _ in range(60)])
    for layer in model:
        nn.init.normal_(layer.weight, std=0.01)
    found = synflow(model, (10,), 0.5, iterations=1)
    assert max(float(tensor.max()) for tensor in found.values()) == 1.0
    torch.testing.assert_close(found["0.weight"].sum(), found["59.weight"].sum())
    assert all((tensor > 0).all() for tensor in found.values())


def test_synflow_of_a_network_that_nothing_flows_through_is_refused() -> None:
    model = path_network()
    nn.init.zeros_(model[2].weight)
    message = r"the flow through the network is 0 in every weight.*look at the weights"
    with pytest.raises(ValueError, match=message):
        synflow(model, (2,), 0.5)


def test_synflow_leaves_other_buffers_alone_and_uses_norms_in_evaluation() -> None:
    model = path_network()
    model.register_buffer("seen", torch.tensor([True, False]))
    model.register_buffer("steps", torch.tensor(3))
    expected = synflow(path_network(), (2,), 0.5)
    assert_close(synflow(model, (2,), 0.5), expected, rtol=0.0, atol=0.0)
    model = convnet()
    model[1].running_mean.fill_(-2.0)
    assert all(tensor.isfinite().all() for tensor in synflow(model, (3, 8, 8), 0.5).values())


# --- every score ---------------------------------------------------------------------------------


@every_score
def test_scores_are_the_same_where_gradients_are_switched_off_and_for_frozen_weights(
    name: str,
) -> None:
    model = mlp()
    expected = scores_of(name, model)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert_close(scores_of(name, model), expected, rtol=0.0, atol=0.0)
    model[0].weight.requires_grad_(False)
    assert_close(scores_of(name, model), expected)


@every_score
def test_scores_of_a_bfloat16_model_are_float32_and_near_those_of_float32(name: str) -> None:
    rounded = mlp().bfloat16()
    exact = copy.deepcopy(rounded).float()
    if name == "synflow":
        found, expected = (synflow(model, (20,), 0.3) for model in (rounded, exact))
    else:
        inputs = [(x.bfloat16(), y) for x, y in BATCHES]
        found = SALIENCY[name](rounded, inputs, F.cross_entropy)
        expected = SALIENCY[name](exact, [(x.float(), y) for x, y in inputs], F.cross_entropy)
    for key, tensor in expected.items():
        assert found[key].dtype == torch.float32
        assert torch.corrcoef(torch.stack([found[key].flatten(), tensor.flatten()]))[0, 1] > 0.95


@every_score
def test_the_model_and_the_generators_are_left_as_they_were(name: str) -> None:
    model = nn.Sequential(mlp(), nn.BatchNorm1d(4), nn.Dropout(0.5)).train()
    before, generator = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    scores_of(name, model)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), generator)
    assert model.training


# --- masks by scores -----------------------------------------------------------------------------


@every_score
def test_the_best_of_all_layers_are_chosen(name: str) -> None:
    model = mlp()
    found = scores_of(name, model)
    masks = itop_prune.apply(model, 0.7, method=found, scores=found)
    assert list(found) == list(masks)
    kept = torch.cat([found[n][itop.mask] for n, itop in masks.items()])
    left = torch.cat([found[n][~itop.mask] for n, itop in masks.items()])
    assert len(kept) == 168
    assert kept.min() >= left.max()


def test_layer_ratios_alone_put_the_positions_at_random() -> None:
    found = scores_of("snip")
    chosen = itop_prune.apply(mlp(), 0.7, method=found, scores=found)
    drawn = itop_prune.apply(mlp(), 0.7, method=found)
    other = itop_prune.apply(mlp(), 0.7, method=found, seed=1)
    counts = [itop.active for itop in chosen.values()]
    for masks in (drawn, other):
        assert [itop.active for itop in masks.values()] == counts
    assert not torch.equal(drawn["0.weight"].mask, chosen["0.weight"].mask)
    assert not torch.equal(drawn["0.weight"].mask, other["0.weight"].mask)


def test_magnitude_as_a_method_ranks_all_layers_together() -> None:
    model = mlp()
    sizes = {name: p.detach().abs().clone() for name, p in weights_of(model).items()}
    masks = itop_prune.apply(model, 0.7, method="magnitude", scores="magnitude")
    expected = itop_prune.apply(mlp(), 0.7, method=sizes, scores=sizes)
    assert all(torch.equal(itop.mask, expected[name].mask) for name, itop in masks.items())


def test_ratios_share_places_that_tie() -> None:
    found = {"a": torch.tensor([9.0, 0.0, 0.0, 0.0]), "b": torch.zeros(4)}
    expected = {"a": (1 + 3 * 3 / 7) / 4, "b": (3 * 4 / 7) / 4}
    assert ratios(found)({"a": (4,), "b": (4,)}, 0.5) == pytest.approx(expected)


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: snip(model, [], F.cross_entropy), "there is no batch"),
        (lambda model: grasp(nn.ReLU(), BATCHES, F.cross_entropy), "ReLU has nothing to score"),
        (
            lambda model: snip(model, BATCHES, lambda x, y: x.sum() * math.inf),
            "gradient of 0.weight.* is not finite",
        ),
        (lambda model: synflow(model, (20,), density=0.0), "density is 0.0"),
        (lambda model: synflow(model, (20,), 0.5, iterations=0), "iterations 0"),
        *(
            (
                lambda model, function=function, loss=loss: function(model, BATCHES, loss),
                "the gradient of the loss is 0 in every weight, which ranks none; look at",
            )
            for function in (snip, grasp)
            for loss in (lambda x, y: y.float().sum(), lambda x, y: (x * 0).sum())
        ),
    ],
)
def test_what_can_not_be_scored_says_so(call: Callable[[nn.Module], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(mlp())


def test_a_masked_model_is_refused() -> None:
    model = mlp()
    itop_prune.apply(model, 0.5)
    with pytest.raises(ValueError, match=r"0\.weight has a mask already; score the dense model"):
        scores_of("snip", model)


@pytest.mark.parametrize("argument", ["scores", "method"])
@pytest.mark.parametrize(
    ("given", "seen"),
    [
        ({"0.weight": torch.zeros(2)}, ""),
        ({"other": torch.zeros(16, 20)}, ""),
        ({"0.weight": torch.zeros(16, 20).numpy()}, r".*; given: ndarray of shape \(16, 20\)"),
    ],
)
def test_scores_that_do_not_fit_are_refused_by_name(
    argument: str, given: dict[str, Any], seen: str
) -> None:
    message = rf"scores for 0\.weight must be a tensor of shape \(16, 20\){seen}"
    with pytest.raises(ValueError, match=message):
        itop_prune.apply(mlp(), 0.5, **{argument: given})


@pytest.mark.parametrize("argument", ["scores", "method"])
def test_scores_that_are_nan_are_refused_with_the_name_of_the_layer(argument: str) -> None:
    """Also where the best are enough without looking at the bad one."""
    found, model = scores_of("snip"), mlp()
    found["2.weight"][0, 0] = math.nan
    message = r"^scores for 2\.weight hold NaN; scores must be numbers: look at"
    with pytest.raises(ValueError, match=message):
        itop_prune.apply(model, 0.5, **{argument: found})
    with torch.no_grad():
        model[2].weight[0, 0] = math.nan
    message = r"^magnitude gave NaN for 2\.weight; scores must be numbers: look at"
    with pytest.raises(ValueError, match=message):
        itop_prune.apply(model, 0.5, **{argument: "magnitude"})
    assert itop_prune.find_masks(model) == {}
