"""What is kept of a dense gradient: all that an update can choose from, and little else."""

from collections.abc import Callable

import pytest
import torch
from helpers.toys import batch, mlp
from itop_prune_tools.benchmarks.measure import peak_bytes
from torch import Tensor, nn
from torch.nn import functional as F

import itop_prune
from itop_prune import MaskScheduler, topology
from itop_prune.layers.largest_gradients import keep_largest

CPU = torch.device("cpu")


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(25))
def test_an_update_chooses_from_it_as_from_all(seed: int, ties: bool) -> None:
    """Also where weights tie for the last places, and where most gradients are 0."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(20, 30, generator=generator) < 0.1
    gradient = torch.randn(20, 30, generator=generator)
    if ties:
        gradient = gradient.round() * (torch.rand(20, 30, generator=generator) < 0.3)
    weight = torch.randn(20, 30, generator=generator).abs()
    kept = keep_largest(gradient, mask)
    count = int(torch.randint(topology.count_true(mask) + 1, (), generator=generator))

    def updated(grad: Tensor) -> Tensor:
        draws = topology.seeded(CPU, "ties")
        return topology.prune_and_regrow(mask, weight, grad.abs(), count, count, draws)

    assert torch.equal(updated(kept.dense()), updated(gradient))
    if not ties:
        assert kept.values.numel() == 2 * topology.count_true(mask)


def test_a_dense_layer_keeps_all_and_what_is_not_finite_is_kept() -> None:
    gradient = torch.tensor([1.0, torch.nan, -2.0, torch.inf])
    everything = torch.ones(4, dtype=torch.bool)
    assert torch.equal(keep_largest(gradient, everything).dense().isnan(), gradient.isnan())
    one = torch.tensor([True, False, False, False])
    assert not keep_largest(gradient, one).values.isfinite().all()


def sparse_run(**options: object) -> tuple[nn.Module, torch.optim.Optimizer, MaskScheduler]:
    model = mlp()
    masks = itop_prune.apply(model, 0.8, storage="sparse")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"total_steps": 9, "every": 1, "grow": "gradient", "one_backward": True, **options}
    return model, optimizer, MaskScheduler(masks, optimizer, **options)


def backward(model: nn.Module, seed: int) -> None:
    x, y = batch(seed, 20)
    F.cross_entropy(model(x), y).backward()


def test_a_second_backward_in_a_step_is_refused() -> None:
    model, optimizer, regrow = sparse_run()
    backward(model, 0)
    with pytest.raises(RuntimeError, match="leave one_backward out"):
        backward(model, 1)

    model, optimizer, regrow = sparse_run(one_backward=False)
    backward(model, 0)
    backward(model, 1)
    optimizer.step()
    assert regrow.step()


@pytest.mark.parametrize("clear", [lambda model: model.zero_grad(), lambda model: zero(model)])
def test_a_backward_after_clearing_is_the_one_that_counts(
    clear: Callable[[nn.Module], None],
) -> None:
    """As by an optimizer that asks for a second pass within its step."""
    (twice, _, first), (once, _, second) = sparse_run(), sparse_run()
    backward(twice, 0)
    clear(twice)
    for model, regrow in ((twice, first), (once, second)):
        backward(model, 1)
        assert regrow.step()
    for name, itop in itop_prune.find_masks(once).items():
        assert torch.equal(itop_prune.find_masks(twice)[name].mask, itop.mask)


def far_from_mean_momentum(weight: Tensor, momentum: Tensor) -> Tensor:
    return (weight.abs() - 1000 * momentum.abs().mean()).abs()


def far_from_mean_gradient(weight: Tensor, grad: Tensor) -> Tensor:
    return (weight.abs() - 100 * grad.abs().mean()).abs()


@pytest.mark.parametrize("prune", ["magnitude", far_from_mean_momentum, far_from_mean_gradient])
def test_masks_move_as_if_all_were_kept(prune: object) -> None:
    """Where another function looks at gradients too, all are kept."""
    (one, _, first), (other, _, second) = (
        sparse_run(one_backward=kept, every=3, prune=prune) for kept in (True, False)
    )
    for step in range(9):
        for model, regrow in ((one, first), (other, second)):
            backward(model, step)
            regrow.step()
            model.zero_grad()
    assert first.updates == second.updates == 3
    for name, itop in itop_prune.find_masks(one).items():
        assert torch.equal(itop.mask, itop_prune.find_masks(other)[name].mask)


def zero(model: nn.Module) -> None:
    model.zero_grad(set_to_none=False)


def held_by_a_step(layers: int, size: int, one_backward: bool) -> float:
    """The most that backward, optimizer and update hold, in dense weights of a layer."""
    model = nn.Sequential(*(nn.Linear(size, size, bias=False) for _ in range(layers)))
    masks = itop_prune.apply(model, 0.99, method="uniform", storage="sparse")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    regrow = MaskScheduler(
        masks, optimizer, total_steps=9, every=1, grow="gradient", one_backward=one_backward
    )
    x = torch.randn(1, size)

    def step() -> None:
        model(x).square().mean().backward()
        optimizer.step()
        assert regrow.step()
        optimizer.zero_grad()

    step()
    return peak_bytes(step, CPU) / (4 * size * size)


def test_a_step_that_listens_holds_four_tensors_of_a_layer_whatever_their_number() -> None:
    assert held_by_a_step(12, 400, one_backward=True) < 4.0
    assert held_by_a_step(12, 400, one_backward=False) > 12.0
