"""An optimizer must hold the weights and keep its statistics within reach; else it is refused."""

from collections import defaultdict
from collections.abc import Callable

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from helpers.toys import mlp, train
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

import itop_prune
from itop_prune.update.optimizer_state import (
    check_holds_parameters,
    check_statistics,
    has_any_gradient,
    statistics,
)


class Elsewhere(Optimizer):
    """SGD with momentum that keeps its statistics in a mapping of its own."""

    def __init__(self, parameters) -> None:
        super().__init__(parameters, {"lr": 0.1})
        self.momenta = {}

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            self.momenta[parameter] = 0.9 * self.momenta.get(parameter, 0.0) + parameter.grad
            parameter -= 0.1 * self.momenta[parameter]


class Quantized(SGD):
    """An optimizer with statistics in bytes."""

    def step(self, closure: Callable | None = None) -> None:
        super().step()
        for parameter in self.param_groups[0]["params"]:
            state = torch.full(parameter.shape, 127, dtype=torch.uint8)
            self.state[parameter]["state1"] = state


def masked() -> tuple[nn.Sequential, dict[str, itop_prune.ITOP]]:
    model = mlp()
    return model, itop_prune.apply(model, 0.5)


def schedule(masks: dict, optimizer: Optimizer) -> itop_prune.MaskScheduler:
    return itop_prune.MaskScheduler(masks, optimizer, total_steps=4, every=1)


# --- it holds the weights ------------------------------------------------------------------------


def test_an_optimizer_of_another_model_is_refused_by_the_scheduler() -> None:
    message = r"does not hold 0\.weight, 2\.weight, 4\.weight; build it from model\.param"
    with pytest.raises(ValueError, match=message):
        schedule(masked()[1], SGD(mlp().parameters(), lr=0.1))


def test_of_many_weights_that_are_not_held_the_first_are_named() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(8)))
    masks, optimizer = itop_prune.apply(model, 0.5), SGD(model[1].parameters(), lr=0.1)
    message = r"not hold 0\.weight, 2\.weight, 3\.weight, 4\.weight, 5\.weight and others; build it"
    with pytest.raises(ValueError, match=message):
        check_holds_parameters(optimizer, masks)


def test_weights_may_be_held_in_several_groups_and_frozen_ones_by_nobody() -> None:
    model, masks = masked()
    model[0].weight_orig.requires_grad_(False)
    groups = [{"params": layer.parameters()} for layer in model[1:]]
    check_holds_parameters(SGD(groups, lr=0.1), masks)


def test_a_parameter_that_something_flattened_is_refused() -> None:
    model, masks = masked()
    model[0].weight_orig.data = model[0].weight_orig.data.flatten()
    message = r"0.weight has the shape \(320,\), its mask \(16, 20\): FSDP1 and ZeRO-3 flatten"
    with pytest.raises(ValueError, match=message):
        schedule(masks, SGD(model.parameters()))


def test_a_parameter_on_another_device_than_its_mask_is_refused() -> None:
    model, masks = masked()
    model[0].weight_orig = nn.Parameter(model[0].weight_orig.detach().to("meta"))
    message = r"0.weight is on meta, its mask on cpu; .* leave out FSDP2's CPUOffloadPolicy"
    with pytest.raises(ValueError, match=message):
        schedule(masks, SGD(model.parameters(), lr=0.1))


def test_an_unfrozen_layer_that_is_not_held_is_refused_before_any_mask_moves() -> None:
    model, masks = masked()
    model[2].weight_orig.requires_grad_(False)
    optimizer = SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    regrow = schedule(masks, optimizer)
    model[2].weight_orig.requires_grad_(True)
    before = {name: itop.mask.clone() for name, itop in masks.items()}
    with pytest.raises(ValueError, match=r"does not hold 2\.weight"):
        train(model, optimizer, regrow, steps=range(1))
    assert all(torch.equal(itop.mask, before[name]) for name, itop in masks.items())


def test_any_gradient_of_any_parameter_counts() -> None:
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    assert not has_any_gradient(optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    assert not has_any_gradient(optimizer)
    model[2].bias.grad[3] = 1e-30
    assert has_any_gradient(optimizer)


# --- its statistics ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "count"),
    [
        (lambda parameters: SGD(parameters, lr=0.1), 0),
        (lambda parameters: SGD(parameters, lr=0.1, momentum=0.9), 1),
        (lambda parameters: AdamW(parameters), 2),
        (lambda parameters: AdamW(parameters, amsgrad=True), 3),
        (lambda parameters: torch.optim.Adagrad(parameters), 1),
    ],
    ids=["SGD", "momentum", "AdamW", "amsgrad", "Adagrad"],
)
def test_statistics_are_all_tensors_of_the_shape_of_the_weight(build: Callable, count: int) -> None:
    model, masks = masked()
    optimizer = build(model.parameters())
    train(model, optimizer, steps=range(1))
    found = statistics(optimizer, masks["0.weight"].parameter)
    assert [tensor.shape for tensor in found.values()] == [(16, 20)] * count


def test_looking_for_statistics_leaves_no_entry_behind() -> None:
    """`optimizer.state` is a defaultdict."""
    model, masks = masked()
    optimizer = AdamW(model.parameters())
    assert statistics(optimizer, masks["0.weight"].parameter) == {}
    assert len(optimizer.state) == 0


def test_rprop_is_refused_before_it_trains() -> None:
    """A grown weight would have the step size 0, and go on with the smallest one there is."""
    model, masks = masked()
    with pytest.raises(ValueError, match="Rprop keeps a step size of each weight"):
        schedule(masks, torch.optim.Rprop(model.parameters()))


def test_what_is_kept_of_a_weight_without_a_tensor_is_no_statistic() -> None:
    """Kron keeps the text of its products by weight."""
    model, masks = masked()
    optimizer = SGD(model.parameters(), lr=0.1)
    optimizer.texts = {itop.parameter: ("ab,bc->ac", [("bc", 1)]) for itop in masks.values()}
    check_statistics(optimizer, masks)
    optimizer.texts[masks["2.weight"].parameter] = ("ab", [torch.zeros(3)])
    with pytest.raises(ValueError, match="in its texts, out of reach"):
        check_statistics(optimizer, masks)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Elsewhere, "Elsewhere keeps statistics of weights in its momenta, out of reach"),
        (Quantized, r"Quantized keeps state1 of 0\.weight as torch\.uint8, where 0 may mean"),
    ],
)
def test_statistics_that_appear_in_training_are_refused_before_any_mask_moves(
    kind: Callable, message: str
) -> None:
    model, masks = masked()
    before = {name: itop.mask.clone() for name, itop in masks.items()}
    optimizer = kind(model.parameters())
    with pytest.raises(ValueError, match=message):
        train(model, optimizer, schedule(masks, optimizer))
    assert all(torch.equal(itop.mask, before[name]) for name, itop in masks.items())


def test_a_wrapper_may_share_the_state_but_not_have_one_of_its_own() -> None:
    model, masks = masked()
    outer = SGD(model.parameters(), lr=0.1)
    outer.inner = SGD(model.parameters(), lr=0.1, momentum=0.9)
    outer.state = outer.inner.state
    check_statistics(outer, masks)
    outer.state = defaultdict(dict)
    with pytest.raises(ValueError, match="SGD keeps statistics of weights in its inner"):
        check_statistics(outer, masks)


def test_the_wrapper_of_accelerate_moves_masks_and_zeroes_statistics() -> None:
    model, masks = masked()
    optimizer = Accelerator().prepare(AdamW(model.parameters()))
    assert isinstance(optimizer, AcceleratedOptimizer)
    before = masks["0.weight"].mask.clone()
    train(model, optimizer, schedule(masks, optimizer), steps=range(1))
    itop = masks["0.weight"]
    assert not torch.equal(itop.mask, before)
    for name in ("exp_avg", "exp_avg_sq"):
        assert not optimizer.state[itop.parameter][name][~itop.mask | ~before].any()
