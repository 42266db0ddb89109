"""The dense gradient beside the sparse one: what adds up in `.grad`, and nothing else."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import itop_prune


def masked() -> tuple[nn.Linear, itop_prune.ITOP]:
    torch.manual_seed(0)
    layer = nn.Linear(6, 4)
    return layer, itop_prune.apply(layer, 0.5)["weight"]


def loss(layer: nn.Linear, times: float) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return (layer(torch.randn(5, 6, generator=generator)) * times).square().sum()


def dense_gradient(layer: nn.Linear, *all_times: float) -> Tensor:
    """What a dense layer with the same effective weight has, summed."""
    twin = nn.Linear(6, 4)
    twin.load_state_dict(itop_prune.dense_state_dict(layer))
    for times in all_times:
        loss(twin, times).backward()
    assert twin.weight.grad is not None
    return twin.weight.grad


def to_none(layer: nn.Linear) -> None:
    layer.zero_grad()


def in_place(layer: nn.Linear) -> None:
    layer.zero_grad(set_to_none=False)


def halve(layer: nn.Linear) -> None:
    layer.weight_orig.grad.mul_(0.5)


def replace(layer: nn.Linear) -> None:
    layer.weight_orig.grad = layer.weight_orig.grad.clone()


def test_micro_batches_add_up() -> None:
    layer, itop = masked()
    itop.collect_dense_gradient()
    for times in (1.0, 2.0, 3.0):
        loss(layer, times).backward()
    torch.testing.assert_close(itop.take_dense_gradient(), dense_gradient(layer, 1.0, 2.0, 3.0))


@pytest.mark.parametrize("clear", [to_none, in_place])
def test_what_was_cleared_is_not_counted(clear: Callable[[nn.Linear], None]) -> None:
    """As by an optimizer that asks for a second pass within its step (SAM, L-BFGS)."""
    layer, itop = masked()
    itop.collect_dense_gradient()
    loss(layer, 1.0).backward()
    clear(layer)
    loss(layer, 2.0).backward()
    loss(layer, 3.0).backward()
    torch.testing.assert_close(itop.take_dense_gradient(), dense_gradient(layer, 2.0, 3.0))


@pytest.mark.parametrize("touch", [halve, replace])
def test_what_is_changed_between_two_passes_and_not_cleared_is_counted(
    touch: Callable[[nn.Linear], None],
) -> None:
    layer, itop = masked()
    itop.collect_dense_gradient()
    loss(layer, 1.0).backward()
    touch(layer)
    loss(layer, 2.0).backward()
    torch.testing.assert_close(itop.take_dense_gradient(), dense_gradient(layer, 1.0, 2.0))


def test_a_layer_whose_active_weights_have_no_gradient_keeps_that_of_the_others() -> None:
    layer, itop = masked()
    itop.mask.copy_(torch.arange(6) < 2)
    itop.collect_dense_gradient()
    for columns in (slice(2, 4), slice(2, 6)):
        x = torch.zeros(3, 6)
        x[:, columns] = 1.0
        layer(x).sum().backward()
        assert not itop.parameter.grad.any()
    assert torch.equal(itop.take_dense_gradient(), torch.tensor([0.0, 0, 6, 6, 3, 3]).expand(4, 6))


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_what_autograd_is_asked_for_beside_it_is_not_counted_and_sparse() -> None:
    """As by AdaHessian, at each step."""
    layer, itop = masked()
    itop.collect_dense_gradient()
    loss(layer, 1.0).backward(create_graph=True)
    gradient = itop.parameter.grad
    (curvature,) = torch.autograd.grad(gradient.sum(), itop.parameter)
    assert curvature.any()
    assert not curvature[~itop.mask].any()
    collected = itop.take_dense_gradient()
    torch.testing.assert_close(collected, dense_gradient(layer, 1.0))
    assert collected is not None
    assert not collected.requires_grad
    torch.testing.assert_close(gradient.detach(), collected * itop.mask)
    layer.zero_grad()  # it and its graph hold each other


def test_nothing_is_heard_after_it_was_taken() -> None:
    layer, itop = masked()
    itop.collect_dense_gradient()
    loss(layer, 1.0).backward()
    assert itop.take_dense_gradient() is not None
    loss(layer, 1.0).backward()
    assert itop.take_dense_gradient() is None
    assert not itop.parameter.grad[~itop.mask].any()


def adapted(layer: nn.Linear, steps: int) -> list[Tensor]:
    """Gradients of a loss after some steps of an inner optimization, as in MAML."""
    parameters, x = (
        dict(layer.named_parameters()),
        torch.randn(5, 6, generator=torch.Generator().manual_seed(2)),
    )
    for _ in range(steps):
        inner = torch.func.functional_call(layer, parameters, (x,)).square().mean()
        gradients = torch.autograd.grad(inner, list(parameters.values()), create_graph=True)
        parameters = {
            n: p - 0.5 * g for (n, p), g in zip(parameters.items(), gradients, strict=True)
        }
    torch.func.functional_call(layer, parameters, (x,)).square().mean().backward()
    found = [parameter.grad.clone() for parameter in layer.parameters()]
    layer.zero_grad()
    return found


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_step_through_other_parameters_is_that_of_any_other_step(steps: int) -> None:
    layer, itop = masked()
    expected = adapted(layer, steps)
    itop.collect_dense_gradient()
    for found, other in zip(adapted(layer, steps), expected, strict=True):
        assert torch.equal(found, other)


def test_the_copies_of_data_parallel_are_heard() -> None:
    """They hold plain tensors that lead to the parameters."""
    layer, itop = masked()
    itop.collect_dense_gradient()
    replica = layer._replicate_for_data_parallel()  # noqa: SLF001  (as torch.nn.parallel.replicate does)
    replica._parameters = {}  # noqa: SLF001
    for name, parameter in layer.named_parameters():
        setattr(replica, name, parameter * 1.0)
    loss(replica, 1.0).backward()
    torch.testing.assert_close(itop.take_dense_gradient(), dense_gradient(layer, 1.0))


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_of_others_see_the_sparse_gradient(when: str) -> None:
    layer, itop = masked()
    seen: list[Tensor] = []
    if when == "after":
        itop.collect_dense_gradient()
    handle = layer.weight_orig.register_hook(
        lambda gradient: seen.append(gradient) or gradient * 2.0
    )
    itop.collect_dense_gradient()
    loss(layer, 1.0).backward()
    collected = itop.take_dense_gradient()
    torch.testing.assert_close(collected, dense_gradient(layer, 1.0))
    assert torch.equal(seen[0], collected * itop.mask)
    assert torch.equal(layer.weight_orig.grad, 2.0 * seen[0])
    layer.zero_grad()
    loss(layer, 1.0).backward()
    assert len(seen) == 2  # it is there when nobody listens any more
    handle.remove()
    loss(layer, 1.0).backward()
    assert len(seen) == 2


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_is_collected_is_float32(dtype: torch.dtype, passes: int) -> None:
    layer = nn.Linear(6, 4).to(dtype)
    itop = itop_prune.apply(layer, 0.5)["weight"]
    itop.collect_dense_gradient()
    for _ in range(passes):
        layer(torch.ones(2, 6, dtype=dtype)).sum().backward()
    collected = itop.take_dense_gradient()
    assert collected is not None
    assert collected.dtype is torch.float32
    assert torch.equal(collected, torch.full((4, 6), 2.0 * passes))
