"""One layer at an update: what criteria are given, what is refused of them, and the new mask."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from itop_prune import ITOP
from itop_prune.update.gradients import DenseGradients
from itop_prune.update.layer_update import LayerUpdate
from itop_prune.update.rules import Rules


def layer_update(stream: tuple[object, ...] = (0, 0), pattern: Any = None) -> LayerUpdate:
    """A layer of eight weights, 1 to 8, of which the first two of each four are active."""
    layer = nn.Linear(8, 1, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(1.0, 9.0).view(1, 8))
    itop = ITOP.apply(layer, "weight", torch.tensor([[1, 1, 0, 0, 1, 1, 0, 0]]), pattern)
    gradients = DenseGradients({"fc": itop}, {"weight"}, 1, 1)
    return LayerUpdate("fc", itop, {"fc": itop.mask.clone()}, gradients, stream)


def rules(prune: Any = "magnitude", grow: Any = "random") -> Rules:
    return Rules.of(prune, grow, "none", "layer", 0.0)


def new_mask(layer: LayerUpdate, rules: Rules, count: int) -> Tensor:
    return layer.new_mask(rules, layer.itop.mask, count, count)


def backwards(mask: Tensor) -> Tensor:
    return torch.arange(8.0, 0.0, -1.0).view(1, 8)


@pytest.mark.parametrize(
    ("pattern", "expected"), [(None, "11111100"), ((2, 4), "11001100")], ids=["free", "2:4"]
)
def test_the_lowest_leave_and_the_highest_enter(pattern: Any, expected: str) -> None:
    layer = layer_update(pattern=pattern)
    before = layer.itop.mask.clone(), layer.itop.parameter.detach().clone()
    mask = layer.new_mask(
        rules(grow=backwards), layer.itop.mask, n_prune=2, n_grow=2 if pattern else 4
    )
    assert "".join(str(int(bit)) for bit in mask[0]) == expected
    assert torch.equal(layer.itop.mask, before[0])  # it changes nothing itself
    assert torch.equal(layer.itop.parameter, before[1])


@pytest.mark.parametrize("pattern", [None, (2, 4)], ids=["free", "2:4"])
@pytest.mark.parametrize("role", ["prune", "grow"])
def test_a_criterion_that_gives_nan_is_named_with_its_layer(role: str, pattern: Any) -> None:
    def broken(weight: Tensor) -> Tensor:
        return weight * math.nan

    options: dict[str, Any] = {role: broken}
    with pytest.raises(ValueError, match=r"^broken gave NaN for fc; scores must be numbers$"):
        new_mask(layer_update(pattern=pattern), rules(**options), 2)


def test_a_criterion_gets_tensors_of_float32_and_the_mask_that_growth_sees_is_pruned() -> None:
    seen: dict[str, Tensor] = {}

    def mine(weight: Tensor, mask: Tensor, explored: Tensor, strength: float = 2.0) -> Tensor:
        seen.update(weight=weight, mask=mask, explored=explored)
        return weight * strength

    layer = layer_update()
    new_mask(layer, rules(grow=mine), 1)
    dtypes = {name: tensor.dtype for name, tensor in seen.items()}
    assert dtypes == {"weight": torch.float32, "mask": torch.bool, "explored": torch.bool}
    assert seen["weight"].tolist() == [[1.0, 2.0, 0.0, 0.0, 5.0, 6.0, 0.0, 0.0]]
    assert seen["mask"].tolist() == [[False, True, False, False, True, True, False, False]]


def fails(weight: Tensor) -> Tensor:
    return weight + torch.ones(7)


def writes(mask: Tensor) -> Tensor:
    return mask.logical_not_()


@pytest.mark.parametrize(
    ("criterion", "error", "message"),
    [
        (fails, RuntimeError, "fails failed for fc: The size of tensor"),
        (writes, RuntimeError, "writes wrote into mask of fc; a criterion may only read"),
        (lambda weight: weight.sum(), ValueError, r"gave \(\) on cpu for fc; it must give one"),
        (lambda weight: weight.T, ValueError, r"gave \(8, 1\) on cpu for fc; .* \(1, 8\) on cpu"),
        (lambda weight: 3.0, ValueError, "<lambda> gave 3.0 for fc; it must give one score per"),
        (lambda weight: weight.to("meta"), ValueError, r"\(1, 8\) on meta for fc"),
    ],
)
@pytest.mark.parametrize("role", ["prune", "grow"])
def test_a_criterion_that_does_not_do_its_part_is_refused_by_name(
    role: str, criterion: Callable, error: type, message: str
) -> None:
    options: dict[str, Any] = {role: criterion}
    with pytest.raises(error, match=message):
        new_mask(layer_update(), rules(**options), 1)


def test_random_streams_differ_by_run_update_layer_and_use() -> None:
    def draw(layer: LayerUpdate, *stream: str) -> float:
        return torch.rand(1, generator=layer.generator(*stream)).item()

    one = layer_update()
    others = [layer_update((1, 0)), layer_update((0, 1)), one._replace(name="other")]
    draws = [draw(one), draw(one, "ties"), draw(one, "prune"), *(draw(other) for other in others)]
    assert len(set(draws)) == 6
    assert draw(one, "ties") == draw(layer_update(), "ties")


def test_mean_sizes_are_of_active_weights() -> None:
    assert layer_update().mean_magnitude("magnitude") == (1 + 2 + 5 + 6) / 4
