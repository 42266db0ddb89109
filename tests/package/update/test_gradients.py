"""What is kept of the dense gradient from step to step, in numbers."""

from typing import Any

import torch
from torch import Tensor, nn

import itop_prune
from itop_prune import MaskScheduler


class Steps:
    """A layer of four weights whose gradient at each step is given: the loss is its product with the weights."""

    def __init__(self, **options: Any) -> None:
        self.layer, self.seen = nn.Linear(4, 1, bias=False), []
        self.optimizer = torch.optim.SGD(self.layer.parameters(), lr=0.0)
        masks = itop_prune.apply(self.layer, 0.5)
        self.regrow = MaskScheduler(masks, self.optimizer, grow=self.see, rate=0.5, **options)

    def see(self, grad: Tensor) -> Tensor:
        self.seen.append(grad.flatten().tolist())
        return grad.abs()

    def take(self, *gradients: float, used: bool = True) -> None:
        for gradient in gradients:
            if used:
                (self.layer.weight * gradient).sum().backward()
            else:
                self.layer.weight.grad = None
            self.regrow.step()
            self.optimizer.zero_grad()


def test_the_sum_is_of_the_last_steps_also_where_momentum_listens_to_all() -> None:
    steps = Steps(
        total_steps=9, every=3, gradient_steps=2, prune=lambda weight, momentum: weight.abs()
    )
    steps.take(100.0, 2.0, 3.0, 100.0, 20.0, 30.0)
    assert steps.seen == [[5.0] * 4, [50.0] * 4]


def test_a_gradient_alone_is_that_of_the_step_also_where_momentum_listens_to_all() -> None:
    steps = Steps(total_steps=9, every=3, prune=lambda weight, momentum: weight.abs())
    steps.take(100.0, 2.0, 3.0)
    assert steps.seen == [[3.0] * 4]


def test_a_layer_that_took_no_part_in_an_update_begins_anew() -> None:
    layer, other = nn.Linear(4, 1, bias=False), nn.Linear(4, 1, bias=False)
    model, seen = nn.ModuleList([layer, other]), []

    def see(grad: Tensor) -> Tensor:
        seen.append(grad.flatten().tolist())
        return grad.abs()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    masks = itop_prune.apply(model, 0.5)
    regrow = MaskScheduler(
        masks, optimizer, total_steps=9, every=3, rate=0.5, gradient_steps=2, grow=see
    )
    for step in range(6):
        loss = layer.weight.sum()
        if step not in (2,):  # the second layer is not used on the step of the first update
            loss = loss + other.weight.sum() * 10
        loss.backward()
        regrow.step()
        optimizer.zero_grad()
    assert seen == [[2.0] * 4, [2.0] * 4, [20.0] * 4]


def test_sums_saved_by_a_run_over_several_steps_are_left_behind_by_one_over_a_single_step() -> None:
    several, single = Steps(total_steps=9, every=3, gradient_steps=3), Steps(total_steps=9, every=3)
    several.take(100.0, 100.0)
    single.regrow.load_state_dict(several.regrow.state_dict())
    single.take(3.0)
    assert single.seen == [[3.0] * 4]


def test_averages_saved_by_a_run_with_momentum_are_left_behind_by_one_without() -> None:
    averaging = Steps(total_steps=9, every=3, prune=lambda weight, momentum: weight.abs())
    averaging.take(100.0, 100.0)
    assert averaging.regrow.state_dict()["dense"]["averages"]
    single = Steps(total_steps=9, every=3)
    single.regrow.load_state_dict(averaging.regrow.state_dict())
    assert single.regrow.state_dict()["dense"] == {"sums": {}, "averages": {}}


def test_nothing_but_what_is_kept_is_held_after_a_step() -> None:
    steps = Steps(total_steps=9, every=3, prune=lambda weight, momentum: weight.abs())
    steps.take(1.0)
    held = [value for value in vars(steps.regrow._dense).values() if isinstance(value, dict)]  # noqa: SLF001
    tensors = [tensor for kept in held for tensor in kept.values() if isinstance(tensor, Tensor)]
    assert len(tensors) == 1  # the moving average
