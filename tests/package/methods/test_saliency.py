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


def scores_of(name: str, model: nn.Module | None = None) -> dict[str, Tensor]:
    model = mlp() if model is None else model
    return (
        synflow(model, (20,), 0.3)
        if name == "synflow"
        else SALIENCY[name](model, BATCHES, F.cross_entropy)
    )


def test_snip_is_the_weight_times_the_mean_gradient_of_all_batches() -> None:
    model = mlp()
    sum(F.cross_entropy(model(x), y) / 3 for x, y in BATCHES).backward()
    expected = {
        name: (p * p.grad).abs().detach()
        for name, p in model.named_parameters()
        if name.endswith("weight")
    }
    found = snip(model, BATCHES, F.cross_entropy)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


def test_grasp_is_the_weight_times_hessian_times_gradient() -> None:
    """Of a loss whose Hessian is written down: (w x)^2 / 2 with x = (1, 2, 0) has g = (w x) x, H = x x^T, Hg = 5 g."""
    layer = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -3.0, 7.0]]))
    x = torch.tensor([[1.0, 2.0, 0.0]])
    found = grasp(layer, [(x, x)], lambda output, _: output.square().sum() / 2)
    assert found["weight"].tolist() == [[1.0 * 5 * -5 * 1, -3.0 * 5 * -5 * 2, 0.0]]


def test_grasp_takes_the_gradient_and_the_hessian_of_the_mean_loss() -> None:
    model = mlp()
    weights = [p for name, p in model.named_parameters() if name.endswith("weight")]
    loss = sum(F.cross_entropy(model(x), y) / 3 for x, y in BATCHES)
    gradients = torch.autograd.grad(loss, weights, create_graph=True)
    product = torch.autograd.grad(sum((g * g.detach()).sum() for g in gradients), weights)
    expected = [(w * p).detach() for w, p in zip(weights, product, strict=True)]
    for found, wanted in zip(
        grasp(model, iter(BATCHES), F.cross_entropy).values(), expected, strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)


def path_network() -> nn.Sequential:
    network = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([[1.0, -2.0], [0.5, 0.0]]))
        network[2].weight.copy_(torch.tensor([[-4.0, 2.0]]))
    return network


def test_synflow_is_what_flows_through_a_weight_when_all_are_positive() -> None:
    """Paths of 1 * 4, 2 * 4 and 0.5 * 2: a weight of the second layer carries the sum of its two; the most is 12."""
    found = synflow(path_network(), (2,), 1.0)
    torch.testing.assert_close(found["0.weight"], torch.tensor([[4.0, 8.0], [1.0, 0.0]]) / 12)
    torch.testing.assert_close(found["2.weight"], torch.tensor([[12.0, 1.0]]) / 12)


def test_synflow_in_rounds_drops_what_each_density_leaves_out() -> None:
    """A quarter of six weights in two rounds: after the first one half of them is left, and only these carry flow."""
    found = synflow(path_network(), (2,), density=0.25, iterations=2)
    torch.testing.assert_close(found["0.weight"], torch.tensor([[4.0, 8.0], [0.0, 0.0]]) / 12)
    torch.testing.assert_close(found["2.weight"], torch.tensor([[12.0, 0.0]]) / 12)


def test_synflow_empties_no_layer_in_the_rounds_that_it_takes() -> None:
    """Seven layers, the first four times as wide, at 98 %: in one round all but one weight of the wide ones go."""
    torch.manual_seed(0)
    widths = [64, 256, 64, 64, 64, 64, 64, 4]
    layers = [
        part
        for one, next_ in itertools.pairwise(widths)
        for part in (nn.Linear(one, next_), nn.ReLU())
    ]
    least = []
    for options in ({}, {"iterations": 1}):
        found = synflow(nn.Sequential(*layers), (64,), 0.02, **options)
        masks = itop_prune.apply(
            copy.deepcopy(nn.Sequential(*layers)), 0.98, method=found, scores=found
        )
        least.append(min(itop.active for itop in masks.values()))
    assert least[0] >= 20
    assert least[1] <= 5


def test_synflow_of_a_deep_network_does_not_overflow() -> None:
    layers = [nn.Linear(400, 400) for _ in range(60)]
    found = synflow(nn.Sequential(*layers), (400,), 0.1, iterations=1)
    assert all(tensor.isfinite().all() and tensor.max() > 0 for tensor in found.values())


def test_synflow_of_small_weights_does_not_underflow() -> None:
    """60 layers of weights of 0.01: R is about 1e-65, and every layer carries all of it."""
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
    with pytest.raises(
        ValueError, match=r"the flow through the network is 0 in every weight.*look at the weights"
    ):
        synflow(model, (2,), 0.5)


def test_synflow_leaves_buffers_that_hold_no_numbers_of_floats_alone() -> None:
    model = path_network()
    expected = synflow(path_network(), (2,), 0.5)
    model.register_buffer("seen", torch.tensor([True, False]))
    model.register_buffer("steps", torch.tensor(3))
    for name, tensor in synflow(model, (2,), 0.5).items():
        assert torch.equal(tensor, expected[name])


@pytest.mark.parametrize("name", SALIENCY)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_scores_are_the_same_where_gradients_are_switched_off(name: str, mode: Callable) -> None:
    model = mlp()
    expected = scores_of(name, model)
    with mode():
        found = scores_of(name, model)
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def test_grasp_of_a_loss_that_is_linear_in_the_weights_is_zero() -> None:
    """Its Hessian is 0, and autograd has no graph of it."""
    layer = nn.Linear(3, 1, bias=False)
    found = grasp(layer, [(torch.ones(1, 3), torch.zeros(1))], lambda output, _: output.sum())
    assert found["weight"].tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("function", [snip, grasp])
@pytest.mark.parametrize("loss", [lambda x, y: y.float().sum(), lambda x, y: (x * 0).sum()])
def test_a_loss_that_ranks_no_weight_is_refused(function: Callable, loss: Callable) -> None:
    with pytest.raises(
        ValueError, match="the gradient of the loss is 0 in every weight, which ranks none; look at"
    ):
        function(mlp(), BATCHES, loss)


@pytest.mark.parametrize("function", [snip, grasp])
def test_batches_whose_loss_is_constant_count_in_the_mean(function: Callable) -> None:
    def some(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target) if len(output) == 8 else target.double().sum()

    x, y = batch(0, 20)
    found = function(mlp(), [(x, y), (x[:4], y[:4])], some)
    factor = 0.5 if function is snip else 0.25  # g is halved, and so is H
    for name, expected in function(mlp(), [(x, y)], F.cross_entropy).items():
        torch.testing.assert_close(found[name], factor * expected)


@pytest.mark.parametrize("name", SALIENCY)
def test_scores_of_a_bfloat16_model_are_float32_and_near_those_of_float32(name: str) -> None:
    rounded = mlp().bfloat16()
    if name == "synflow":
        found, expected = (
            synflow(model, (20,), 0.3) for model in (rounded, copy.deepcopy(rounded).float())
        )
    else:
        inputs = [(x.bfloat16(), y) for x, y in BATCHES]
        found = SALIENCY[name](rounded, inputs, F.cross_entropy)
        batches = [(x.float(), y) for x, y in inputs]
        expected = SALIENCY[name](copy.deepcopy(rounded).float(), batches, F.cross_entropy)
    for key, tensor in expected.items():
        assert found[key].dtype == torch.float32
        assert torch.corrcoef(torch.stack([found[key].flatten(), tensor.flatten()]))[0, 1] > 0.95


def test_snip_sums_bfloat16_gradients_in_float32() -> None:
    """By hand: 1 and 200 times 2^-8; a sum in bfloat16 would stay at 1, whose next number is 1 + 2^-7."""
    layer = nn.Linear(1, 1, bias=False).bfloat16()
    nn.init.ones_(layer.weight)
    inputs = [1.0, *[2.0**-8] * 200]
    found = snip(
        layer,
        [(torch.tensor([[x]]).bfloat16(), torch.zeros(1)) for x in inputs],
        lambda out, _: out.sum(),
    )
    assert found["weight"].item() == pytest.approx((1.0 + 200 * 2.0**-8) / 201)


def test_synflow_uses_norms_in_evaluation() -> None:
    model = convnet()
    model[1].running_mean.fill_(-2.0)
    assert all(tensor.isfinite().all() for tensor in synflow(model, (3, 8, 8), 0.5).values())


@pytest.mark.parametrize("name", SALIENCY)
def test_the_model_and_the_generators_are_left_as_they_were(name: str) -> None:
    model = nn.Sequential(mlp(), nn.BatchNorm1d(4), nn.Dropout(0.5)).train()
    before, generator = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    scores_of(name, model)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), generator)
    assert model.training


@pytest.mark.parametrize("name", SALIENCY)
def test_scores_are_of_every_weight_that_apply_masks(name: str) -> None:
    model = mlp()
    found = scores_of(name, model)
    masks = itop_prune.apply(model, 0.5, scores=found)
    assert list(found) == list(masks)


@pytest.mark.parametrize("name", SALIENCY)
def test_a_frozen_weight_is_scored_too(name: str) -> None:
    model = mlp()
    model[0].weight.requires_grad_(False)
    torch.testing.assert_close(scores_of(name, model), scores_of(name))


@pytest.mark.parametrize("name", SALIENCY)
def test_the_best_of_all_layers_are_chosen(name: str) -> None:
    model = mlp()
    found = scores_of(name, model)
    masks = itop_prune.apply(model, 0.7, method=found, scores=found)
    kept = torch.cat([found[n][itop.mask] for n, itop in masks.items()])
    left = torch.cat([found[n][~itop.mask] for n, itop in masks.items()])
    assert len(kept) == 168
    assert kept.min() >= left.max()


def test_layer_ratios_alone_put_the_positions_at_random() -> None:
    found = scores_of("snip")
    best, shuffled, again = mlp(), mlp(), mlp()
    chosen = itop_prune.apply(best, 0.7, method=found, scores=found)
    drawn = itop_prune.apply(shuffled, 0.7, method=found)
    other = itop_prune.apply(again, 0.7, method=found, seed=1)
    assert (
        [i.active for i in drawn.values()]
        == [i.active for i in chosen.values()]
        == [i.active for i in other.values()]
    )
    assert not torch.equal(drawn["0.weight"].mask, chosen["0.weight"].mask)
    assert not torch.equal(drawn["0.weight"].mask, other["0.weight"].mask)


def test_magnitude_as_a_method_ranks_all_layers_together() -> None:
    model = mlp()
    sizes = {
        name: p.detach().abs().clone()
        for name, p in model.named_parameters()
        if name.endswith("weight")
    }
    masks = itop_prune.apply(model, 0.7, method="magnitude", scores="magnitude")
    expected = itop_prune.apply(mlp(), 0.7, method=sizes, scores=sizes)
    assert all(torch.equal(itop.mask, expected[name].mask) for name, itop in masks.items())


def test_ratios_share_places_that_tie() -> None:
    found = {"a": torch.tensor([9.0, 0.0, 0.0, 0.0]), "b": torch.zeros(4)}
    assert ratios(found)({"a": (4,), "b": (4,)}, 0.5) == pytest.approx(
        {"a": (1 + 3 * 3 / 7) / 4, "b": (3 * 4 / 7) / 4}
    )


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
@pytest.mark.parametrize("given", [{"0.weight": torch.zeros(2)}, {"other": torch.zeros(16, 20)}])
def test_scores_that_do_not_fit_are_refused_by_name(
    argument: str, given: dict[str, Tensor]
) -> None:
    with pytest.raises(
        ValueError, match=r"scores for 0\.weight must be a tensor of shape \(16, 20\)"
    ):
        itop_prune.apply(mlp(), 0.5, **{argument: given})


@pytest.mark.parametrize("argument", ["scores", "method"])
def test_scores_that_are_nan_are_refused_with_the_name_of_the_layer(argument: str) -> None:
    """Also where the best are enough without looking at the bad one."""
    found = scores_of("snip")
    found["2.weight"][0, 0] = math.nan
    model = mlp()
    with pytest.raises(
        ValueError, match=r"^scores for 2\.weight hold NaN; scores must be numbers: look at"
    ):
        itop_prune.apply(model, 0.5, **{argument: found})
    assert itop_prune.find_masks(model) == {}


@pytest.mark.parametrize("argument", ["scores", "method"])
def test_magnitude_of_a_weight_that_is_nan_is_refused_with_the_names_of_both(argument: str) -> None:
    model = mlp()
    with torch.no_grad():
        model[2].weight[0, 0] = math.nan
    with pytest.raises(
        ValueError, match=r"^magnitude gave NaN for 2\.weight; scores must be numbers: look at"
    ):
        itop_prune.apply(model, 0.5, **{argument: "magnitude"})


@pytest.mark.parametrize("argument", ["scores", "method"])
def test_scores_that_are_arrays_are_refused_by_name(argument: str) -> None:
    found = {name: tensor.numpy() for name, tensor in scores_of("snip").items()}
    with pytest.raises(
        ValueError,
        match=r"scores for 0\.weight must be a tensor .*; given: ndarray of shape \(16, 20\)",
    ):
        itop_prune.apply(mlp(), 0.5, **{argument: found})


def test_the_name_of_a_method_by_scores_is_ratios() -> None:
    assert ratios({}).__name__ == "ratios"


def test_grasp_sees_through_fused_attention() -> None:
    """Torch's fused kernels have no second derivative; attention written out has."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=4)
    x, y = torch.randn(4, 3, 32, 32), torch.arange(4)
    found = grasp(model, [(x, y)], F.cross_entropy)
    set_fused_attn(False)
    try:
        plain = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=4)
    finally:
        set_fused_attn(True)
    plain.load_state_dict(model.state_dict())
    for name, expected in grasp(plain, [(x, y)], F.cross_entropy).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-7)


def test_a_model_without_second_derivatives_is_an_error_with_what_to_take() -> None:
    class Gate(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.hardsigmoid(x)

    model = nn.Sequential(nn.Linear(20, 8), Gate(), nn.Linear(8, 4))
    with pytest.raises(
        RuntimeError,
        match=r"GraSP needs second derivatives, which .* Sequential: .*; score it by snip",
    ):
        grasp(model, BATCHES, F.cross_entropy)


def test_a_compiled_model_is_scored_as_the_plain_one() -> None:
    model = mlp()
    for name, tensor in grasp(
        torch.compile(model, backend="eager"), BATCHES, F.cross_entropy
    ).items():
        assert torch.equal(tensor, grasp(model, BATCHES, F.cross_entropy)[name])
