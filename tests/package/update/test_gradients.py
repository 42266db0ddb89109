"""The dense gradient that criteria get: the true one, summed and averaged as asked, and freed."""

from typing import Any

import pytest
import torch
from helpers.toys import batch, mlp
from torch import Tensor, nn
from torch.nn import functional as F

import itop_prune
from itop_prune import MaskScheduler


class Steps:
    """Layers of four weights whose gradients are given: the loss is their product with weights."""

    def __init__(self, layers: int = 1, **options: Any) -> None:
        self.model = nn.ModuleList(nn.Linear(4, 1, bias=False) for _ in range(layers))
        self.seen: list[list[float]] = []
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0)
        masks = itop_prune.apply(self.model, 0.5)
        options = {"total_steps": 9, "every": 3, "rate": 0.5, "grow": self.see, **options}
        self.regrow = MaskScheduler(masks, self.optimizer, **options)

    def see(self, grad: Tensor) -> Tensor:
        self.seen.append(grad.flatten().tolist())
        return grad.abs()

    def backward(self, *gradients: float | None) -> None:
        """One backward pass; a layer with None takes no part in it."""
        pairs = zip(self.model, gradients, strict=True)
        losses = [layer.weight.sum() * value for layer, value in pairs if value is not None]
        torch.stack(losses).sum().backward()

    def take(self, *steps: float | tuple[float | None, ...]) -> None:
        for gradients in steps:
            self.backward(*(gradients if isinstance(gradients, tuple) else (gradients,)))
            self.regrow.step()
            self.optimizer.zero_grad()


def momentum_too(weight: Tensor, momentum: Tensor) -> Tensor:
    return weight.abs()


def copied(model: nn.Module) -> nn.Module:
    """A dense model that computes the same."""
    twin = mlp()
    twin.load_state_dict(itop_prune.dense_state_dict(model))
    return twin


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_it_is_the_gradient_of_a_dense_model_and_grad_stays_sparse(micro_batches: int) -> None:
    seen: list[Tensor] = []

    def see(grad: Tensor) -> Tensor:
        seen.append(grad.clone())
        return grad

    model = mlp()
    masks, optimizer = itop_prune.apply(model, 0.6), torch.optim.SGD(model.parameters(), lr=0.1)
    regrow = MaskScheduler(masks, optimizer, total_steps=4, every=1, grow=see)
    twin = copied(model)
    for step in range(micro_batches):
        x, y = batch(step, 20)
        for each in (model, twin):
            F.cross_entropy(each(x), y).backward()
    expected = {name: twin.get_parameter(name).grad for name in masks}
    for name, itop in masks.items():
        torch.testing.assert_close(itop.parameter.grad, expected[name] * itop.mask)
    regrow.step()
    for grad, name in zip(seen, masks, strict=True):
        torch.testing.assert_close(grad, expected[name])


def test_a_layer_called_twice_adds_both_gradients() -> None:
    steps = Steps(every=1)
    layer = steps.model[0]
    (layer(torch.ones(1, 4)) + layer(2 * torch.ones(1, 4))).sum().backward()
    steps.regrow.step()
    assert steps.seen == [[3.0] * 4]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_cleared_in_between_do_not_count(set_to_none: bool) -> None:
    """A backward pass that the user throws away is thrown away here too."""
    steps = Steps(every=1)
    steps.backward(5.0)
    steps.optimizer.zero_grad(set_to_none=set_to_none)
    steps.backward(2.0)
    steps.regrow.step()
    steps.optimizer.zero_grad(set_to_none=set_to_none)
    steps.take(7.0)
    assert steps.seen == [[2.0] * 4, [7.0] * 4]


@pytest.mark.parametrize("options", [{}, {"prune": momentum_too}], ids=["alone", "with momentum"])
def test_without_a_sum_it_is_that_of_the_step_alone(options: dict[str, Any]) -> None:
    steps = Steps(**options)
    steps.take(100.0, 2.0, 3.0)
    assert steps.seen == [[3.0] * 4]


def test_the_sum_is_of_the_last_steps_and_starts_anew_after_an_update() -> None:
    for options in ({}, {"prune": momentum_too}):
        steps = Steps(gradient_steps=2, **options)
        steps.take(100.0, 2.0, 3.0, 100.0, 20.0, 30.0)
        assert steps.seen == [[5.0] * 4, [50.0] * 4]


def test_a_layer_without_a_part_in_an_update_begins_anew() -> None:
    """The second layer is not used on the step of the first update."""
    steps = Steps(layers=2, gradient_steps=2)
    steps.take(*[(1.0, 10.0)] * 2, (1.0, None), *[(1.0, 10.0)] * 3)
    assert steps.seen == [[2.0] * 4, [2.0] * 4, [20.0] * 4]


def test_it_is_float32_in_half_precision() -> None:
    dtypes = set()

    def see(grad: Tensor) -> Tensor:
        dtypes.add(grad.dtype)
        return grad

    model = mlp().bfloat16()
    masks, optimizer = itop_prune.apply(model, 0.5), torch.optim.SGD(model.parameters(), lr=0.1)
    regrow = MaskScheduler(masks, optimizer, total_steps=4, every=1, grow=see)
    model(torch.randn(8, 20).bfloat16()).sum().backward()
    regrow.step()
    assert dtypes == {torch.float32}


@pytest.mark.parametrize("steps", [0, 4, 1.5, True])
def test_more_steps_than_between_updates_are_refused(steps: Any) -> None:
    message = f"gradient_steps is {steps!r}; allowed are whole numbers from 1 to every, 3"
    with pytest.raises(ValueError, match=message):
        Steps(gradient_steps=steps)


def test_sums_and_averages_of_another_kind_of_run_are_left_behind() -> None:
    several, averaging, single = Steps(gradient_steps=3), Steps(prune=momentum_too), Steps()
    for steps, key in ((several, "sums"), (averaging, "averages")):
        steps.take(100.0, 100.0)
        assert steps.regrow.state_dict()["dense"][key]
        single.regrow.load_state_dict(steps.regrow.state_dict())
        assert single.regrow.state_dict()["dense"] == {"sums": {}, "averages": {}}
    single.take(3.0)
    assert single.seen == [[3.0] * 4]


def test_only_what_is_kept_from_step_to_step_is_held() -> None:
    steps = Steps(prune=momentum_too)
    for number in range(4):  # the third is an update
        steps.take(1.0)
        gradients = steps.regrow._gradients  # noqa: SLF001
        kept = [value for value in vars(gradients).values() if isinstance(value, dict)]
        tensors = [x for each in kept for x in each.values() if isinstance(x, Tensor)]
        assert len(tensors) == 1, number  # the moving average


@pytest.mark.parametrize(
    ("options", "collecting"),
    [
        ({"grow": "random"}, [False] * 9),
        ({}, [False, False, True] * 3),
        ({"gradient_steps": 2}, [False, True, True] * 3),
        ({"grow": "momentum"}, [True] * 9),
        ({"grow": "momentum", "stop": 0.4}, [True] * 3 + [False] * 6),
    ],
    ids=str,
)
def test_it_is_collected_on_no_other_steps_than_needed(
    options: dict[str, Any], collecting: list[bool]
) -> None:
    steps, found = Steps(**options), []
    for _ in range(9):
        found.append(steps.regrow.listens)
        steps.take(1.0)
    assert found == collecting
