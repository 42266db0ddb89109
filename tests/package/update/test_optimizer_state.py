"""What is asked of an optimizer: that it holds the weights, and that its statistics can be reached."""

from collections import defaultdict
from collections.abc import Callable

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from helpers.toys import mlp, train
from timm.optim import Lookahead
from torch import nn
from torch.optim import Optimizer

import itop_prune
from itop_prune.update.optimizer_state import check_holds_parameters, check_statistics, statistics


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


def masked(model: nn.Module) -> dict[str, itop_prune.ITOP]:
    return itop_prune.apply(model, 0.5)


def test_an_optimizer_of_another_model_is_refused_by_the_scheduler() -> None:
    masks, optimizer = masked(mlp()), torch.optim.SGD(mlp().parameters(), lr=0.1)
    with pytest.raises(
        ValueError,
        match=r"does not hold 0\.weight, 2\.weight, 4\.weight; build it from model\.param",
    ):
        itop_prune.MaskScheduler(masks, optimizer, total_steps=4, every=2)


def test_an_optimizer_that_lacks_one_weight_is_refused_by_its_name() -> None:
    model = mlp()
    masks = masked(model)
    optimizer = torch.optim.SGD([*model[0].parameters(), *model[4].parameters()], lr=0.1)
    with pytest.raises(ValueError, match=r"does not hold 2\.weight; build it"):
        check_holds_parameters(optimizer, masks)


def test_many_missing_weights_are_shortened() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(8)))
    optimizer = torch.optim.SGD(mlp().parameters(), lr=0.1)
    with pytest.raises(
        ValueError, match=r"0\.weight, 1\.weight, 2\.weight, 3\.weight, 4\.weight and others; build"
    ):
        check_holds_parameters(optimizer, masked(model))


def test_a_frozen_weight_need_not_be_held() -> None:
    model = mlp()
    model[0].weight.requires_grad_(False)
    masks = masked(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    assert itop_prune.MaskScheduler(
        masks, optimizer, total_steps=4, every=2
    ).update_steps() == range(2, 5, 2)


def test_weights_may_be_held_in_several_groups() -> None:
    model = mlp()
    masks = masked(model)
    optimizer = torch.optim.SGD([{"params": layer.parameters()} for layer in model], lr=0.1)
    assert check_holds_parameters(optimizer, masks) is None


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_optimizer_may_be_built_before_or_after_apply(when: str) -> None:
    model = mlp()
    masks = masked(model) if when == "after" else {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    masks = masks or masked(model)
    regrow = itop_prune.MaskScheduler(masks, optimizer, total_steps=4, every=2)
    train(model, optimizer, regrow, steps=range(4))
    assert regrow.updates == 2


@pytest.mark.parametrize(
    ("build", "count"),
    [
        (lambda parameters: torch.optim.SGD(parameters, lr=0.1), 0),
        (lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9), 1),
        (lambda parameters: torch.optim.AdamW(parameters), 2),
        (lambda parameters: torch.optim.AdamW(parameters, amsgrad=True), 3),
        (lambda parameters: torch.optim.Adagrad(parameters), 1),
    ],
    ids=["SGD", "momentum", "AdamW", "amsgrad", "Adagrad"],
)
def test_statistics_are_all_tensors_of_the_shape_of_the_weight(build: Callable, count: int) -> None:
    model = mlp()
    masks = masked(model)
    optimizer = build(model.parameters())
    train(model, optimizer, steps=range(1))
    shapes = [
        tensor.shape for tensor in statistics(optimizer, masks["0.weight"].parameter).values()
    ]
    assert shapes == [(16, 20)] * count


def test_there_are_no_statistics_before_the_first_step() -> None:
    model = mlp()
    masks = masked(model)
    assert statistics(torch.optim.AdamW(model.parameters()), masks["0.weight"].parameter) == {}


def test_statistics_of_a_weight_that_is_not_held_are_not_made_up() -> None:
    """`optimizer.state` is a defaultdict: looking must not leave an entry behind."""
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    statistics(optimizer, model[0].weight)
    assert len(optimizer.state) == 0


def test_the_lookahead_of_timm_is_refused() -> None:
    model = mlp()
    masks = masked(model)
    optimizer = Lookahead(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    with pytest.raises(
        ValueError,
        match=r"Lookahead keeps statistics of weights in its .*pruned weights would come",
    ):
        itop_prune.MaskScheduler(masks, optimizer, total_steps=4, every=1)


def test_rprop_is_refused_before_it_trains() -> None:
    """A grown weight would have the step size 0, and go on with the smallest one there is."""
    model = mlp()
    masks = masked(model)
    with pytest.raises(ValueError, match="Rprop keeps a step size of each weight"):
        itop_prune.MaskScheduler(
            masks, torch.optim.Rprop(model.parameters()), total_steps=4, every=2
        )


def test_what_is_kept_of_a_weight_and_holds_no_tensor_is_no_statistic() -> None:
    """Kron keeps the text of its products by weight."""
    model = mlp()
    masks = masked(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.texts = {itop.parameter: ("ab,bc->ac", [("bc", 1)]) for itop in masks.values()}
    assert check_statistics(optimizer, masks) is None
    optimizer.texts[masks["2.weight"].parameter] = ("ab", [torch.zeros(3)])
    with pytest.raises(ValueError, match="in its texts, out of reach"):
        check_statistics(optimizer, masks)


def test_an_optimizer_with_statistics_of_its_own_is_refused_at_the_first_update() -> None:
    model = mlp()
    masks = masked(model)
    optimizer = Elsewhere(model.parameters())
    regrow = itop_prune.MaskScheduler(masks, optimizer, total_steps=4, every=2)
    with pytest.raises(
        ValueError, match="Elsewhere keeps statistics of weights in its momenta, out of reach"
    ):
        train(model, optimizer, regrow, steps=range(4))


def test_a_refused_optimizer_has_moved_no_mask() -> None:
    model = mlp()
    masks = masked(model)
    before = {name: itop.mask.clone() for name, itop in masks.items()}
    optimizer = Elsewhere(model.parameters())
    with pytest.raises(ValueError):
        train(model, optimizer, itop_prune.MaskScheduler(masks, optimizer, total_steps=4, every=1))
    assert all(torch.equal(itop.mask, before[name]) for name, itop in masks.items())


def test_a_wrapper_that_shares_the_state_is_accepted() -> None:
    model = mlp()
    masks = masked(model)
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    outer = torch.optim.SGD(model.parameters(), lr=0.1)
    outer.inner, outer.state = inner, inner.state
    assert check_statistics(outer, masks) is None


def test_a_wrapper_with_a_state_of_its_own_is_refused() -> None:
    model = mlp()
    masks = masked(model)
    outer = torch.optim.SGD(model.parameters(), lr=0.1)
    outer.inner, outer.state = torch.optim.SGD(model.parameters(), lr=0.1), defaultdict(dict)
    with pytest.raises(ValueError, match="SGD keeps statistics of weights in its inner"):
        check_statistics(outer, masks)


def test_the_wrapper_of_accelerate_moves_masks_and_zeroes_statistics() -> None:
    model = mlp()
    masks = masked(model)
    optimizer = Accelerator().prepare(torch.optim.AdamW(model.parameters()))
    assert isinstance(optimizer, AcceleratedOptimizer)
    regrow = itop_prune.MaskScheduler(masks, optimizer, total_steps=4, every=2)
    before = masks["0.weight"].mask.clone()
    train(model, optimizer, regrow, steps=range(2))
    itop = masks["0.weight"]
    assert not torch.equal(itop.mask, before)
    for name in ("exp_avg", "exp_avg_sq"):
        assert not optimizer.state[itop.parameter][name][~itop.mask | ~before].any()


def test_statistics_that_are_not_floating_point_are_refused_by_name() -> None:
    class Quantized(torch.optim.SGD):
        def step(self, closure: object = None) -> None:
            super().step()
            for group in self.param_groups:
                for parameter in group["params"]:
                    self.state[parameter]["state1"] = torch.full(
                        parameter.shape, 127, dtype=torch.uint8
                    )

    model = mlp()
    masks = itop_prune.apply(model, 0.8)
    optimizer = Quantized(model.parameters(), lr=0.1)
    regrow = itop_prune.MaskScheduler(masks, optimizer, total_steps=10, every=1)
    with pytest.raises(ValueError, match=r"Quantized keeps state1 of 0\.weight as torch\.uint8"):
        train(model, optimizer, regrow, steps=range(1))
