"""Fan-in initialisation: each output's active weights make up for its missing inputs."""

import math
from typing import Any

import pytest
import torch
from helpers.toys import mlp, train
from timm.layers import CondConv2d, StdConv2d
from torch import Tensor, nn

import itop_prune
from itop_prune.methods.initialization import fan_in_factors

both = pytest.mark.parametrize("storage", ["mask", "sparse"])


def test_factors_by_hand() -> None:
    """Of 2 outputs with 2 inputs and kernels of 2, 4 weights each: 1 and 0 are active."""
    one, two = torch.tensor([2]), torch.tensor([2, 7])
    assert fan_in_factors(one, (2, 2, 2), (1, 2)).tolist() == [2.0]
    assert fan_in_factors(two, (2, 2, 2), (1, 2)).tolist() == [2.0, 2.0]
    assert fan_in_factors(two, (2, 2, 2), (0, 2)).square().tolist() == pytest.approx([2.0, 2.0])


def each_output_of(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """Bool for every output channel: the weights that it is made of, by autograd."""
    found = []
    for channel in range(layer(x).shape[1]):
        (gradient,) = torch.autograd.grad(layer(x)[:, channel].sum(), layer.weight)
        found.append(gradient != 0)
    return found


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(12, 5), (12,)),
    "conv": (nn.Conv2d(4, 6, 3), (4, 5, 5)),
    "conv, channels last": (nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last), (4, 5, 5)),
    "conv, groups": (nn.Conv1d(6, 4, 3, groups=2), (6, 9)),
    "conv, depthwise": (nn.Conv2d(4, 4, 3, groups=4), (4, 5, 5)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2), (4, 5, 5)),
    "transposed, groups": (nn.ConvTranspose1d(6, 4, 3, groups=2), (6, 9)),
}


@both
@pytest.mark.parametrize("kind", LAYERS)
def test_an_output_with_k_active_inputs_gets_sqrt_of_fan_in_over_k(kind: str, storage: str) -> None:
    layer, shape = LAYERS[kind]
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape))
    before, outputs = layer.weight.detach().clone(), each_output_of(layer, torch.rand(1, *shape))
    scores = torch.rand(before.shape, generator=torch.Generator().manual_seed(0))
    scores[outputs[0]] = -1.0  # the first output has no active input

    masks = itop_prune.apply(layer, 0.7, scores={"weight": scores}, init="fan_in", storage=storage)
    mask = masks["weight"].mask
    expected = torch.zeros_like(before)
    ks = []
    for own in outputs:
        ks.append(int((mask & own).sum()))
        factor = math.sqrt(int(own.sum()) / ks[-1]) if ks[-1] else 0.0
        expected[own & mask] = factor * before[own & mask]
    itop_prune.remove(layer)

    assert ks[0] == 0
    assert len(set(ks)) > 2
    torch.testing.assert_close(layer.weight.detach(), expected)


def rows(weight: Tensor) -> Tensor:
    return weight.flatten(1)


class Experts(nn.Module):
    """Three experts with 5 outputs and 8 inputs."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))


class Transposed(Experts):
    pass


MORE: dict[str, tuple[nn.Module, Any]] = {
    "attention": (nn.MultiheadAttention(8, 2), rows),
    "attention, other sizes": (nn.MultiheadAttention(8, 2, kdim=6, vdim=5), rows),
    "LSTM": (nn.LSTM(6, 5, num_layers=2, bidirectional=True), rows),
    "GRU cell": (nn.GRUCell(6, 5), rows),
    "mixed kernels": (CondConv2d(4, 6, 3, num_experts=3), lambda w: w.view(18, 36)),
    "experts": (Experts(3, 5, 8), lambda w: w.view(15, 8)),
    "experts, transposed": (Transposed(3, 8, 5), lambda w: w.mT.reshape(15, 8)),
}


@both
@pytest.mark.parametrize("kind", MORE)
def test_every_matrix_of_every_kind_of_layer_is_rescaled(
    kind: str, storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`by_output` shows a weight as a matrix with a row for each output."""
    monkeypatch.setitem(itop_prune.MASKABLE, Experts, {"weight": "experts out in"})
    monkeypatch.setitem(itop_prune.MASKABLE, Transposed, {"weight": "experts in out"})
    layer, by_output = MORE[kind]
    before = {name: weight.detach().clone() for name, weight in layer.named_parameters()}
    masks = itop_prune.apply(layer, 0.8, "uniform", init="fan_in", storage=storage)
    positions = {name: itop.mask for name, itop in masks.items()}
    itop_prune.remove(layer)

    assert positions
    for name, weight in layer.named_parameters():
        if name not in positions:
            assert torch.equal(weight, before[name])
            continue
        mask = by_output(positions[name])
        k = mask.sum(1, keepdim=True)
        factors = (mask.shape[1] / k.clamp(min=1)).sqrt()
        torch.testing.assert_close(by_output(weight), by_output(before[name]) * mask * factors)


def deep(width: int = 128) -> nn.Sequential:
    return nn.Sequential(*(part for _ in range(8) for part in (nn.Linear(width, width), nn.ReLU())))


def deep_convolutions(width: int = 32) -> nn.Sequential:
    """Padded in circles: zeros at the border would let the dense variance fall too."""
    parts: list[nn.Module] = []
    for _ in range(6):
        parts += [nn.Conv2d(width, width, 3, padding=1, padding_mode="circular"), nn.ReLU()]
    return nn.Sequential(*parts)


def variances(model: nn.Sequential, x: Tensor) -> list[float]:
    """The variance after each matrix."""
    found = []
    for layer in model:
        x = layer(x)
        if not isinstance(layer, nn.ReLU):
            found.append(x.var().item())
    return found


@both
@pytest.mark.parametrize("build", [deep, deep_convolutions])
@torch.no_grad()
def test_activations_keep_their_variance_over_depth_where_without_it_they_vanish(
    build: Any, storage: str
) -> None:
    found = {}
    for init in ("keep", "fan_in"):
        torch.manual_seed(0)
        model = build()
        for layer in model:
            if not isinstance(layer, nn.ReLU):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
        x = torch.randn(32, model[0].weight.shape[1], *([8, 8] if build != deep else []))
        itop_prune.apply(model, 0.95, init=init, storage=storage)
        found[init] = variances(model, x)
    assert found["keep"][-1] < 1e-4
    assert all(0.5 < variance < 8.0 for variance in found["fan_in"])


def test_standardized_convolutions_compute_the_same() -> None:
    outputs = []
    for init in ("keep", "fan_in"):
        torch.manual_seed(0)
        layer = StdConv2d(8, 6, 3, eps=1e-12)
        itop_prune.apply(layer, 0.8, init=init)
        outputs.append(layer(torch.ones(1, 8, 5, 5)))
    torch.testing.assert_close(*outputs)


def test_the_parameter_stays_the_same_object_and_other_types_are_rounded_once() -> None:
    layer = nn.Linear(64, 8).bfloat16()
    parameter, before = layer.weight, layer.weight.detach().clone()
    itop = itop_prune.apply(layer, 0.9, init="fan_in")["weight"]
    assert layer.weight_orig is parameter
    factors = (64 / itop.mask.sum(1, keepdim=True)).sqrt()
    assert torch.equal(parameter, (before.float() * itop.mask * factors).bfloat16())


@both
def test_a_model_that_goes_on_from_a_state_is_not_rescaled_again(storage: str) -> None:
    def run(steps: range, saved: Any = None) -> tuple[Any, list[float]]:
        model = mlp()
        masks = itop_prune.apply(model, 0.7, init="fan_in", storage=storage)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        regrow = itop_prune.MaskScheduler(masks, optimizer, total_steps=6, every=2)
        parts = (model, optimizer, regrow)
        for part, state in zip(parts, saved or (), strict=False):
            part.load_state_dict(state)
        losses = train(model, optimizer, regrow, steps=steps)
        return [part.state_dict() for part in parts], losses

    whole, losses = run(range(6))
    half, _ = run(range(3))
    again, rest = run(range(3, 6), half)
    assert rest == losses[3:]
    assert all(torch.equal(again[0][name], tensor) for name, tensor in whole[0].items())


def test_scores_given_as_tensors_choose_positions_before_weights_are_rescaled() -> None:
    model = mlp()
    scores = {name: weight.detach().abs() for name, weight in model.named_parameters()}
    scores = {name: tensor for name, tensor in scores.items() if tensor.ndim > 1}
    masks = itop_prune.apply(model, 0.5, scores, scores=scores, init="fan_in")
    others = itop_prune.apply(mlp(), 0.5, "magnitude", scores="magnitude")
    for name, itop in masks.items():
        assert torch.equal(itop.mask, others[name].mask)
        assert not torch.equal(itop.weight, others[name].weight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"init": "fanin"}, r"unknown init 'fanin'; known are keep, fan_in \(nearest: 'fan_in'\)"),
        ({"init": None}, "unknown init None; known are keep, fan_in"),
        ({"scores": "magnitude"}, "scores is 'magnitude', which keeps weights for their values"),
        ({"method": "magnitude"}, "method is 'magnitude', which keeps .* or method"),
        ({"sparsity": None, "scores": "nonzero"}, "scores is 'nonzero', which keeps"),
    ],
)
def test_bad_values_are_refused_and_the_model_stays(arguments: Any, message: str) -> None:
    model = mlp()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        itop_prune.apply(model, **{"sparsity": 0.5, "init": "fan_in", **arguments})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_model_with_masks_is_not_rescaled() -> None:
    model = mlp()
    itop_prune.apply(model, 0.5, init="fan_in")
    before = model[0].weight.clone()
    with pytest.raises(ValueError, match="it has a mask already"):
        itop_prune.apply(model, 0.5, init="fan_in")
    assert torch.equal(model[0].weight, before)
