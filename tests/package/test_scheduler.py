"""When masks move: the plan, what an update does to weights and statistics, what stops it, and resuming."""

import copy
import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers.toys import batch, convnet, mlp, train
from torch import Tensor, nn
from torch.nn import functional as F

import itop_prune
from itop_prune import ITOP, MaskScheduler, topology
from itop_prune.scheduler import SAVED

OPTIMIZERS: dict[str, Callable] = {
    "SGD momentum": lambda parameters: torch.optim.SGD(
        parameters, lr=0.1, momentum=0.9, weight_decay=1e-3
    ),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
}
optimizers = pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS)
growths = pytest.mark.parametrize("grow", ["random", "gradient"])


class Run:
    """A model, its masks, an optimizer and a scheduler, ready to be trained."""

    def __init__(
        self,
        model: nn.Module | None = None,
        build: Callable = OPTIMIZERS["SGD momentum"],
        sparsity: float = 0.6,
        method: str = "uniform",
        only: tuple[str, ...] = (),
        **options,
    ) -> None:
        self.model = mlp() if model is None else model
        self.masks = itop_prune.apply(self.model, sparsity, method)
        self.optimizer = build(self.model.parameters())
        chosen = {name: itop for name, itop in self.masks.items() if not only or name in only}
        self.regrow = MaskScheduler(
            chosen, self.optimizer, **{"total_steps": 12, "every": 2, **options}
        )

    def train(self, steps: range, after: Callable[[int], None] = lambda step: None) -> list[float]:
        return train(self.model, self.optimizer, self.regrow, steps=steps, after=after)

    def backward(self, step: int = 0, scale: float = 1.0) -> None:
        x, y = batch(step, 20)
        (scale * F.cross_entropy(self.model(x), y)).backward()

    def positions(self) -> dict[str, Tensor]:
        return {name: itop.mask.clone() for name, itop in self.masks.items()}

    def everything(self) -> list[Tensor]:
        """Weights, masks, statistics and what was explored, copied."""
        statistics = [
            value
            for parameter in self.model.parameters()
            for value in self.optimizer.state[parameter].values()
            if isinstance(value, Tensor)
        ]
        state = [*self.model.state_dict().values(), *statistics, *self.regrow.explored.values()]
        return [tensor.clone() for tensor in state]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a, b) for a, b in zip(first, second, strict=True)
    )


def moved(run: Run, before: dict[str, Tensor]) -> list[str]:
    return [name for name, itop in run.masks.items() if not torch.equal(itop.mask, before[name])]


def shaped_statistics(run: Run, itop: ITOP) -> list[Tensor]:
    state = run.optimizer.state[itop.parameter].values()
    return [
        value for value in state if isinstance(value, Tensor) and value.shape == itop.mask.shape
    ]


@pytest.mark.parametrize(
    ("total_steps", "every", "stop", "expected"),
    [
        (12, 4, 1.0, [4, 8, 12]),
        (13, 4, 1.0, [4, 8, 12]),
        (11, 4, 1.0, [4, 8]),
        (12, 4, 0.75, [4, 8]),
        (16, 4, 0.75, [4, 8, 12]),
        (3, 4, 1.0, []),
        (4, 1, 1.0, [1, 2, 3, 4]),
        (100, 29, 0.29, [29]),  # 0.29 * 100 is 28.999999999999996
        (100, 19, 0.57, [19, 38, 57]),  # 0.57 * 100 is 56.99999999999999
        (10, 1, 0.3, [1, 2, 3]),
    ],
)
def test_the_plan(total_steps: int, every: int, stop: float, expected: list[int]) -> None:
    assert (
        list(Run(total_steps=total_steps, every=every, stop=stop).regrow.update_steps()) == expected
    )


def test_the_step_at_stop_is_in_the_plan_whatever_the_float() -> None:
    run = Run()
    last = {}
    for hundredths in range(1, 101):
        regrow = MaskScheduler(
            run.masks, run.optimizer, total_steps=100, every=1, stop=hundredths / 100
        )
        last[hundredths] = regrow.update_steps()[-1]
    assert last == {hundredths: hundredths for hundredths in range(1, 101)}


def test_step_says_when_the_masks_moved() -> None:
    run, said = Run(total_steps=8, every=3), []
    for step in range(10):
        run.backward(step)
        run.optimizer.step()
        before = run.positions()
        said.append(run.regrow.step())
        assert said[-1] == bool(moved(run, before))
        run.optimizer.zero_grad()
    assert [step for step, answer in enumerate(said, start=1) if answer] == [3, 6]


def test_updates_are_counted() -> None:
    run = Run(total_steps=8, every=3)
    run.train(range(8))
    assert (run.regrow.updates, run.regrow.skipped) == (2, 0)


def test_an_update_that_is_due_is_made_also_by_a_run_that_plans_none() -> None:
    run, other = Run(total_steps=4, every=2), Run(total_steps=4, every=9)
    run.train(range(1))
    run.backward(1, scale=math.nan)
    with pytest.warns(UserWarning, match="not finite"):
        run.regrow.step()
    other.regrow.load_state_dict(run.regrow.state_dict())
    before = other.positions()
    other.train(range(2, 3))
    assert moved(other, before)


def test_past_the_end_nothing_moves() -> None:
    run = Run(total_steps=4, every=2)
    run.train(range(4))
    before = run.positions()
    run.train(range(4, 12))
    assert moved(run, before) == []


def test_past_the_end_cleared_gradients_are_no_error() -> None:
    run = Run(total_steps=2, every=2)
    run.train(range(2))
    assert [run.regrow.step() for _ in range(5)] == [False] * 5


def test_past_the_end_the_rate_stays_at_its_minimum() -> None:
    run = Run(total_steps=2, every=2)
    run.train(range(6))
    assert run.regrow.rate == pytest.approx(0.005)


def test_the_scheduler_itself_moves_nothing_before_it_is_due() -> None:
    run = Run(total_steps=12, every=5)
    before = run.positions()
    run.train(range(4))
    assert moved(run, before) == []


@optimizers
@growths
def test_active_counts_never_change(build: Callable, grow: str) -> None:
    run = Run(build=build, grow=grow, every=1, total_steps=12)
    expected, seen = {name: int(mask.sum()) for name, mask in run.positions().items()}, []
    run.train(
        range(12),
        after=lambda step: seen.append({n: int(m.sum()) for n, m in run.positions().items()}),
    )
    assert run.regrow.updates == 12
    assert seen == [expected] * 12


@growths
@pytest.mark.filterwarnings("ignore:every gradient is 0")
def test_active_counts_never_change_when_all_weights_and_gradients_are_zero(grow: str) -> None:
    run = Run(grow=grow, every=1, total_steps=20, schedule="constant")
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.zero_()
    expected = {name: int(mask.sum()) for name, mask in run.positions().items()}
    for _ in range(20):
        sum(
            0.0 * layer.weight.sum() for layer in run.model if isinstance(layer, nn.Linear)
        ).backward()
        run.regrow.step()
        run.optimizer.zero_grad()
    assert {name: int(mask.sum()) for name, mask in run.positions().items()} == expected


def test_exactly_the_rate_of_active_weights_is_pruned_rounded_up() -> None:
    """With growth where it was never, nothing pruned comes back: the exchange can be counted."""
    run = Run(
        rate=0.3,
        schedule="constant",
        total_steps=2,
        every=2,
        grow=lambda explored: (~explored).float(),
    )
    before = run.positions()
    run.train(range(2))
    left = {name: int((mask & ~run.masks[name].mask).sum()) for name, mask in before.items()}
    assert left == {name: math.ceil(0.3 * int(mask.sum())) for name, mask in before.items()}


def test_the_smallest_weights_leave() -> None:
    run = Run(
        rate=0.3,
        schedule="constant",
        total_steps=1,
        every=1,
        grow=lambda explored: (~explored).float(),
    )
    run.backward()
    run.optimizer.step()
    before, weights = (
        run.positions(),
        {n: itop.parameter.detach().abs().clone() for n, itop in run.masks.items()},
    )
    run.regrow.step()
    for name, itop in run.masks.items():
        left, kept = before[name] & ~itop.mask, before[name] & itop.mask
        assert weights[name][left].max() <= weights[name][kept].min()


def test_growth_by_gradient_takes_the_largest_dense_gradients() -> None:
    run = Run(total_steps=1, every=1, rate=0.2, grow="gradient")
    twin = mlp()
    twin.load_state_dict(itop_prune.dense_state_dict(run.model))
    x, y = batch(0, 20)
    F.cross_entropy(twin(x), y).backward()
    run.backward()
    run.optimizer.step()
    before = run.positions()
    run.regrow.step()
    for name, itop in run.masks.items():
        gradient = twin.get_parameter(name).grad.abs()
        grown, never = itop.mask & ~before[name], ~itop.mask & ~before[name]
        assert grown.any()
        assert gradient[grown].min() >= gradient[never].max()


def run_with_stale_numbers(build: Callable, grow: str) -> tuple[Run, dict[str, Tensor]]:
    """A run at its first update, and the masks of before; off them everything is 7, as after dense training."""
    run = Run(build=build, grow=grow, every=3)
    run.train(range(2))
    run.backward(2)
    run.optimizer.step()
    with torch.no_grad():
        for itop in run.masks.values():
            for tensor in (itop.parameter, *shaped_statistics(run, itop)):
                tensor[~itop.mask] = 7.0
    before = run.positions()
    assert run.regrow.step()
    return run, before


@optimizers
@growths
def test_a_grown_weight_and_its_statistics_are_exactly_zero(build: Callable, grow: str) -> None:
    run, before = run_with_stale_numbers(build, grow)
    for name, itop in run.masks.items():
        grown, tensors = itop.mask & ~before[name], [itop.parameter, *shaped_statistics(run, itop)]
        assert grown.any()
        assert len(tensors) > 1
        assert not any(tensor[grown].any() for tensor in tensors)


@optimizers
@growths
def test_off_the_mask_weights_and_statistics_are_zero_after_an_update(
    build: Callable, grow: str
) -> None:
    run, _ = run_with_stale_numbers(build, grow)
    for itop in run.masks.values():
        assert not any(
            tensor[~itop.mask].any() for tensor in (itop.parameter, *shaped_statistics(run, itop))
        )


@optimizers
def test_a_weight_that_stays_keeps_value_and_statistics(build: Callable) -> None:
    run = Run(build=build, every=3)
    run.train(range(2))
    run.backward(2)
    run.optimizer.step()
    masks = run.positions()
    before = {
        n: [t.clone() for t in (i.parameter, *shaped_statistics(run, i))]
        for n, i in run.masks.items()
    }
    run.regrow.step()
    for name, itop in run.masks.items():
        stayed = masks[name] & itop.mask
        assert same(
            [tensor[stayed] for tensor in before[name]],
            [tensor[stayed] for tensor in (itop.parameter, *shaped_statistics(run, itop))],
        )


@optimizers
def test_a_weight_pruned_and_grown_again_keeps_value_and_statistics(build: Callable) -> None:
    """All active weights are pruned and grow first again: nothing may change at all."""
    run = Run(
        build=build, every=3, rate=1.0, schedule="constant", grow=lambda explored: explored.float()
    )
    run.train(range(2))
    run.backward(2)
    run.optimizer.step()
    before = run.everything()
    assert run.regrow.step()
    assert same(run.everything(), before)


@growths
def test_a_fully_dense_layer_is_left_alone(grow: str) -> None:
    run = Run(
        sparsity=0.4,
        method=lambda shapes, density: {"0.weight": 0.3, "2.weight": 1.0, "4.weight": 1.0},
        grow=grow,
    )
    run.train(range(1))
    run.backward(1)
    run.optimizer.step()
    itop = run.masks["2.weight"]
    before = [tensor.clone() for tensor in (itop.parameter, *shaped_statistics(run, itop))]
    assert run.regrow.step()
    assert itop.mask.all()
    assert same([itop.parameter, *shaped_statistics(run, itop)], before)


@growths
def test_a_frozen_weight_never_moves(grow: str) -> None:
    model = mlp()
    model[2].weight.requires_grad_(False)
    run = Run(model, grow=grow)
    before = run.positions()
    run.train(range(6))
    assert moved(run, before) == ["0.weight", "4.weight"]


@growths
def test_a_model_whose_masked_weights_are_all_frozen_trains_on(grow: str) -> None:
    model = mlp()
    for layer in (model[0], model[2], model[4]):
        layer.weight.requires_grad_(False)
    run = Run(model, grow=grow)
    before = run.positions()
    run.train(range(6))
    assert moved(run, before) == []


def test_a_subset_of_masks_is_all_that_moves() -> None:
    run = Run(only=("2.weight",))
    before = run.positions()
    run.train(range(4))
    assert moved(run, before) == ["2.weight"]
    assert list(run.regrow.explored) == ["2.weight"]


def test_exploration_counts_the_masks_that_are_passed() -> None:
    run = Run(only=("2.weight",), sparsity=0.5)
    assert run.regrow.exploration_rate() == 0.5


@growths
def test_masks_and_parameters_keep_identity_and_storage(grow: str) -> None:
    run = Run(grow=grow)
    before = [
        (id(t), t.data_ptr()) for itop in run.masks.values() for t in (itop.parameter, itop.mask)
    ]
    run.train(range(6))
    assert [
        (id(t), t.data_ptr()) for itop in run.masks.values() for t in (itop.parameter, itop.mask)
    ] == before


@growths
def test_a_channels_last_model_moves_its_masks_and_keeps_its_counts(grow: str) -> None:
    run = Run(convnet().to(memory_format=torch.channels_last), grow=grow, every=1, total_steps=4)
    before = run.positions()
    train(run.model, run.optimizer, run.regrow, steps=range(4), shape=(3, 8, 8))
    itop = run.masks["3.weight"]
    assert moved(run, before) == list(run.masks)
    assert itop.mask.sum() == before["3.weight"].sum()
    assert itop.mask.is_contiguous(memory_format=torch.channels_last)
    assert not itop.parameter[~itop.mask].any()


@growths
def test_a_channels_last_model_moves_as_a_contiguous_one(grow: str) -> None:
    first, second = (
        Run(convnet(), grow=grow),
        Run(convnet().to(memory_format=torch.channels_last), grow=grow),
    )
    for run in (first, second):
        for step in range(2):
            for name, itop in run.masks.items():
                values = torch.randn(
                    itop.mask.shape, generator=torch.Generator().manual_seed(step + len(name))
                )
                (
                    run.model.get_submodule(name.removesuffix(".weight")).weight * values
                ).sum().backward()
            run.regrow.step()
            run.optimizer.zero_grad()
    assert first.regrow.updates == 1
    assert same(list(first.positions().values()), list(second.positions().values()))


def test_explored_is_the_union_of_all_masks() -> None:
    run = Run(every=1)
    union = run.positions()

    def unite(step: int) -> None:
        for name, mask in run.positions().items():
            union[name] |= mask

    run.train(range(8), after=unite)
    assert all(torch.equal(run.regrow.explored[name], union[name]) for name in union)
    assert run.regrow.exploration_rate() == sum(int(m.sum()) for m in union.values()) / 560


@growths
def test_equal_seeds_move_alike(grow: str) -> None:
    first, second = Run(grow=grow, seed=3), Run(grow=grow, seed=3)
    for run in (first, second):
        run.train(range(6))
    assert same(first.everything(), second.everything())


def test_different_seeds_move_differently() -> None:
    first, second = Run(seed=3), Run(seed=4)
    for run in (first, second):
        run.train(range(2))
    assert moved(first, second.positions()) == ["0.weight", "2.weight", "4.weight"]


def test_successive_updates_draw_differently() -> None:
    drawn: list[Tensor] = []

    def watch(mask: Tensor, generator: torch.Generator) -> Tensor:
        drawn.append(torch.rand(mask.shape, generator=generator))
        return drawn[-1]

    Run(grow=watch, only=("0.weight",), every=1).train(range(3))
    assert len(drawn) == 3
    assert not any(torch.equal(drawn[i], drawn[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


@growths
def test_the_global_generator_is_untouched(grow: str) -> None:
    run = Run(grow=grow)
    before = torch.get_rng_state()
    run.train(range(4))
    assert torch.equal(torch.get_rng_state(), before)


@optimizers
def test_a_closed_loop_still_learns(build: Callable) -> None:
    """A sanity check of the whole: the loss on one batch falls while masks move."""
    run, (x, y) = Run(build=build, total_steps=60, every=5), batch(0, 20)
    losses = []
    for _ in range(60):
        loss = F.cross_entropy(run.model(x), y)
        loss.backward()
        run.optimizer.step()
        run.regrow.step()
        run.optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def spying(seen: list[Tensor]) -> Callable[[Tensor], Tensor]:
    def spy(grad: Tensor) -> Tensor:
        seen.append(grad.clone())
        return grad.abs()

    return spy


def dense_twin(model: nn.Module, fresh: nn.Module) -> nn.Module:
    fresh.load_state_dict(itop_prune.dense_state_dict(model))
    return fresh


@pytest.mark.parametrize("micro_batches", [1, 2, 3])
def test_the_dense_gradient_is_the_true_one(micro_batches: int) -> None:
    seen: list[Tensor] = []
    run = Run(grow=spying(seen), every=1)
    twin = dense_twin(run.model, mlp())
    for step in range(micro_batches):
        x, y = batch(step, 20)
        F.cross_entropy(run.model(x), y).backward()
        F.cross_entropy(twin(x), y).backward()
    run.regrow.step()
    expected = [twin.get_parameter(name).grad for name in run.masks]
    assert all(
        torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(seen, expected, strict=True)
    )


def test_the_dense_gradient_of_a_layer_that_is_called_twice_is_the_true_one() -> None:
    def twice(model: nn.Module, x: Tensor) -> Tensor:
        return model(torch.relu(model(x)))

    seen: list[Tensor] = []
    torch.manual_seed(0)
    run = Run(nn.Linear(20, 20), grow=spying(seen), every=1)
    twin = dense_twin(run.model, nn.Linear(20, 20))
    x, _ = batch(0, 20)
    for model in (run.model, twin):
        twice(model, x).square().sum().backward()
    run.regrow.step()
    assert torch.allclose(seen[0], twin.weight.grad, rtol=1e-5, atol=1e-6)


def test_the_dense_gradient_is_of_the_update_step_alone() -> None:
    seen: list[Tensor] = []
    run = Run(grow=spying(seen), every=3, only=("0.weight",))
    run.train(range(2))
    twin = dense_twin(run.model, mlp())
    x, y = batch(2, 20)
    F.cross_entropy(twin(x), y).backward()
    run.train(range(2, 3))
    assert torch.allclose(seen[0], twin[0].weight.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_the_dense_gradient_starts_anew_after_every_update(set_to_none: bool) -> None:
    seen: list[Tensor] = []
    run = Run(grow=spying(seen), every=1, only=("0.weight",))
    run.backward(0)
    run.optimizer.step()
    run.regrow.step()
    run.optimizer.zero_grad(set_to_none=set_to_none)
    twin = dense_twin(run.model, mlp())
    x, y = batch(1, 20)
    F.cross_entropy(twin(x), y).backward()
    run.backward(1)
    run.regrow.step()
    assert torch.allclose(seen[1], twin[0].weight.grad, rtol=1e-5, atol=1e-7)


def test_gradients_cleared_in_between_do_not_count() -> None:
    """A backward pass that the user throws away, of a probe say, is thrown away here too."""
    seen: list[Tensor] = []
    run = Run(grow=spying(seen), every=1, only=("0.weight",))
    twin = dense_twin(run.model, mlp())
    run.backward(5)
    run.optimizer.zero_grad()
    run.backward(0)
    x, y = batch(0, 20)
    F.cross_entropy(twin(x), y).backward()
    run.regrow.step()
    assert torch.allclose(seen[0], twin[0].weight.grad, rtol=1e-5, atol=1e-7)


def test_a_half_precision_gradient_is_handed_over_in_float32() -> None:
    seen: list[Tensor] = []
    run = Run(mlp().bfloat16(), grow=spying(seen), every=1)
    run.model(torch.randn(8, 20).bfloat16()).sum().backward()
    run.regrow.step()
    assert {grad.dtype for grad in seen} == {torch.float32}


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_on_an_update_step_the_gradient_is_the_masked_dense_one(micro_batches: int) -> None:
    run = Run(grow="gradient", every=1)
    twin = dense_twin(run.model, mlp())
    for step in range(micro_batches):
        x, y = batch(step, 20)
        F.cross_entropy(run.model(x), y).backward()
        F.cross_entropy(twin(x), y).backward()
    for name, itop in run.masks.items():
        expected = twin.get_parameter(name).grad * itop.mask
        assert torch.allclose(itop.parameter.grad, expected, rtol=1e-5, atol=1e-7)


def test_the_norm_that_is_clipped_is_the_same_on_an_update_step() -> None:
    norms = []
    for grow in ("random", "gradient"):
        run = Run(grow=grow, every=1)
        run.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(run.model.parameters(), 0.1))
    assert torch.equal(*norms)


def test_the_step_taken_on_an_update_step_is_the_same_sparse_step() -> None:
    weights = []
    for grow in ("random", "gradient"):
        run = Run(grow=grow, every=3)
        run.train(range(2))
        run.backward(2)
        run.optimizer.step()
        weights.append([parameter.detach().clone() for parameter in run.model.parameters()])
    assert same(*weights)


def test_after_the_last_update_backward_is_sparse_again() -> None:
    run = Run(grow="gradient", total_steps=2, every=2)
    run.train(range(2))
    run.backward(2)
    assert not any(itop.parameter.grad[~itop.mask].any() for itop in run.masks.values())


def poison_gradient(run: Run, value: float) -> None:
    itop = run.masks["2.weight"]
    itop.parameter.grad[tuple(itop.mask.nonzero()[0])] = value


def poison_weight(run: Run, value: float) -> None:
    itop = run.masks["2.weight"]
    with torch.no_grad():
        itop.parameter[tuple(itop.mask.nonzero()[0])] = value


poisons = pytest.mark.parametrize("poison", [poison_gradient, poison_weight])
values = pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)


def poisoned(
    poison: Callable[[Run, float], None], value: float, grow: str
) -> tuple[Run, list[Tensor]]:
    """A run whose first update, due after step 2, has met a bad number; and how everything was just before."""
    run = Run(grow=grow, every=2)
    run.train(range(1))
    run.backward(1)
    run.optimizer.step()
    poison(run, value)
    return run, run.everything()


@pytest.mark.parametrize("at_once", [{"cpu"}, set()], ids=["asks the device", "does not wait"])
def test_gradients_whose_squares_are_too_large_are_finite(
    at_once: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topology, "ANSWERS_AT_ONCE", at_once)
    run, _ = poisoned(poison_gradient, 1e30, "random")
    assert run.regrow.step()


@poisons
@values
@growths
@pytest.mark.parametrize("at_once", [{"cpu"}, set()], ids=["asks the device", "does not wait"])
def test_a_bad_number_moves_nothing_in_any_layer(
    at_once: set[str], poison: Callable, value: float, grow: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topology, "ANSWERS_AT_ONCE", at_once)
    run, before = poisoned(poison, value, grow)
    with pytest.warns(
        UserWarning, match="a gradient or masked weight is not finite at step 2: the update waits"
    ):
        assert not run.regrow.step()
    after = run.everything()
    assert all(
        torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
        for a, b in zip(after, before, strict=True)
    )


@growths
def test_a_bad_number_of_the_dense_gradient_alone_moves_nothing(grow: str) -> None:
    """An overflow in float32 sums: the masked gradient is finite, the dense one is not."""
    run = Run(nn.Linear(2, 1, bias=False), sparsity=0.5, grow=grow, every=1)
    active = run.model.weight_mask.int().argmax().item()
    x = torch.full((1, 2), 3e38)
    x[0, active] = 1.0
    before = run.positions()
    for _ in range(2):
        run.model(x).sum().backward()
    if grow == "random":
        assert run.regrow.step()
    else:
        with pytest.warns(UserWarning, match="not finite"):
            assert not run.regrow.step()
        assert moved(run, before) == []


@poisons
@growths
def test_an_update_that_waits_is_made_at_the_next_finite_step(poison: Callable, grow: str) -> None:
    run, _ = poisoned(poison, math.nan, grow)
    with pytest.warns(UserWarning, match="not finite"):
        run.regrow.step()
    run.optimizer.zero_grad()
    poison_weight(run, 0.1)
    run.backward(2)
    assert run.regrow.step()
    assert (run.regrow.updates, run.regrow.skipped) == (1, 1)


@growths
def test_an_update_that_waited_uses_the_gradient_of_the_finite_step(grow: str) -> None:
    seen: list[Tensor] = []
    run = Run(
        grow=spying(seen) if grow == "gradient" else grow,
        prune=spying(seen),
        only=("0.weight",),
        every=2,
    )
    run.train(range(1))
    run.backward(1)
    run.masks["0.weight"].parameter.grad[0, 0] = math.inf
    with pytest.warns(UserWarning, match="not finite"):
        run.regrow.step()
    run.optimizer.zero_grad()
    twin = dense_twin(run.model, mlp())
    x, y = batch(2, 20)
    F.cross_entropy(twin(x), y).backward()
    run.backward(2)
    run.regrow.step()
    assert all(torch.allclose(grad, twin[0].weight.grad, rtol=1e-5, atol=1e-7) for grad in seen)
    assert seen


def test_an_update_that_waited_does_not_shift_the_plan() -> None:
    run, _ = poisoned(poison_gradient, math.nan, "random")
    with pytest.warns(UserWarning, match="not finite"):
        run.regrow.step()
    run.optimizer.zero_grad()
    made = []
    for step in range(2, 8):
        run.backward(step)
        made.append(run.regrow.step())
        run.optimizer.zero_grad()
    assert made == [True, True, False, True, False, True]


def test_an_update_still_waiting_past_the_end_is_made() -> None:
    run = Run(total_steps=2, every=2)
    run.train(range(1))
    run.backward(1)
    poison_gradient(run, math.nan)
    with pytest.warns(UserWarning, match="not finite"):
        run.regrow.step()
    run.optimizer.zero_grad()
    run.backward(2)
    assert run.regrow.step()


def test_bad_numbers_are_counted_at_every_step_and_warned_of_once() -> None:
    run, _ = poisoned(poison_gradient, math.nan, "random")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            run.regrow.step()
    assert run.regrow.skipped == 3
    assert len(caught) == 1


def test_a_bad_number_between_updates_is_no_business_of_ours() -> None:
    run = Run(every=5)
    run.backward()
    poison_gradient(run, math.nan)
    assert not run.regrow.step()
    assert run.regrow.skipped == 0


@pytest.mark.parametrize("every", [1, 5], ids=["an update is due", "the first step"])
def test_cleared_gradients_raise_and_name_the_order(every: int) -> None:
    run = Run(every=every)
    run.backward()
    run.optimizer.step()
    run.optimizer.zero_grad()
    order = r"loss\.backward\(\), optimizer\.step\(\), step\(\) of the MaskScheduler, .*optimizer\.zero_grad\(\)"
    before = run.regrow.state_dict()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=order):
            run.regrow.step()
    assert (
        run.regrow.state_dict()["step"] == before["step"] == 0
    )  # who catches it and does it right counts once
    assert not run.regrow.state_dict()["due"]
    run.backward()
    assert run.regrow.step() is (every == 1)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.old_head, self.head = nn.Linear(20, 16), nn.Linear(16, 4), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.used(x))


def unused(grow: str = "random") -> Run:
    torch.manual_seed(0)
    return Run(Unused(), grow=grow)


@growths
def test_a_layer_without_gradient_is_warned_of_once_by_name(grow: str) -> None:
    run = unused(grow)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.train(range(8))
    assert [str(warning.message).partition("?")[0] for warning in caught] == [
        "old_head.weight got no gradient since the last update: is its layer still used by the model"
    ]
    assert "apply(model, ..., include=[...])" in str(caught[0].message)


@growths
def test_a_layer_without_gradient_is_not_moved_and_the_others_are(grow: str) -> None:
    run = unused(grow)
    before = run.positions()
    with pytest.warns(UserWarning, match="old_head.weight got no gradient"):
        run.train(range(2))
    assert moved(run, before) == ["used.weight", "head.weight"]


def test_a_layer_with_a_gradient_at_some_step_since_the_last_update_is_not_warned_of() -> None:
    run = unused()
    x, y = batch(0, 20)
    F.cross_entropy(run.model.old_head(run.model.used(x)), y).backward()
    run.regrow.step()
    run.optimizer.zero_grad()
    run.backward(1)
    assert run.regrow.step()


def test_the_warning_points_at_the_line_that_called_step() -> None:
    run, _ = poisoned(poison_gradient, math.nan, "random")
    with pytest.warns(UserWarning, match="not finite") as caught:
        run.regrow.step()
    assert caught[0].filename == __file__


def resumed(run: Run, **options) -> Run:
    """What a new process makes of the saved states of a run."""
    saved = copy.deepcopy(
        (run.model.state_dict(), run.optimizer.state_dict(), run.regrow.state_dict())
    )
    other = Run(mlp(seed=9), **options)
    other.model.load_state_dict(saved[0])
    other.optimizer.load_state_dict(saved[1])
    other.regrow.load_state_dict(saved[2])
    return other


@optimizers
@growths
@pytest.mark.parametrize("stop_after", [0, 3, 5, 6], ids=lambda step: f"after step {step}")
def test_resume_is_bit_exact(build: Callable, grow: str, stop_after: int) -> None:
    options = {"build": build, "grow": grow, "every": 3}
    straight, run = Run(**options), Run(**options)
    expected = straight.train(range(12))
    losses = run.train(range(stop_after))
    other = resumed(run, **options)
    assert losses + other.train(range(stop_after, 12)) == expected
    assert same(other.everything(), straight.everything())


@growths
def test_what_entered_is_active_now_and_was_not_before_the_update(grow: str) -> None:
    run, positions = Run(grow=grow, every=3), []
    assert run.regrow.entered() == {}
    for step in range(9):
        before = run.positions()
        run.train(range(step, step + 1))
        if moved(run, before):
            positions.append(
                {name: int((itop.mask & ~before[name]).sum()) for name, itop in run.masks.items()}
            )
            assert run.regrow.entered() == positions[-1]
    assert len(positions) == 3
    assert all(counts[name] for counts in positions for name in ("0.weight", "2.weight"))
    assert (
        run.regrow.entered() == resumed(run, grow=grow, every=3).regrow.entered() == positions[-1]
    )


def test_where_nothing_is_exchanged_nothing_entered() -> None:
    run = Run(rate=0.5, min_rate=0.0, schedule="linear", total_steps=4)
    run.train(range(2))
    assert any(run.regrow.entered().values())
    run.train(range(2, 4))  # at a rate of 0
    assert run.regrow.updates == 2
    assert run.regrow.entered() == dict.fromkeys(run.masks, 0)


@growths
def test_resume_with_an_update_that_is_still_due_is_bit_exact(grow: str) -> None:
    run, _ = poisoned(poison_gradient, math.nan, grow)
    with pytest.warns(UserWarning, match="not finite"):
        run.regrow.step()
    run.optimizer.zero_grad()
    other = resumed(run, grow=grow)
    losses = [each.train(range(2, 7)) for each in (run, other)]
    assert losses[0] == losses[1]
    assert same(run.everything(), other.everything())
    assert (other.regrow.updates, other.regrow.skipped) == (run.regrow.updates, 1) == (3, 1)


def test_resume_remembers_which_layer_had_a_gradient() -> None:
    run = unused()
    x, y = batch(0, 20)
    F.cross_entropy(run.model.old_head(run.model.used(x)), y).backward()
    run.regrow.step()
    other = unused()
    other.regrow.load_state_dict(run.regrow.state_dict())
    other.backward(1)
    assert other.regrow.step()


def test_a_state_survives_torch_save(tmp_path) -> None:
    run = Run()
    run.train(range(4))
    torch.save(run.regrow.state_dict(), tmp_path / "state.pt")
    other = Run()
    other.regrow.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert other.regrow.exploration_rate() == run.regrow.exploration_rate()
    assert (other.regrow.updates, other.regrow.rate) == (run.regrow.updates, run.regrow.rate)


def test_loading_a_state_keeps_the_explored_tensors() -> None:
    run, other = Run(), Run()
    run.train(range(4))
    before = dict(other.regrow.explored)
    other.regrow.load_state_dict(run.regrow.state_dict())
    assert all(other.regrow.explored[name] is before[name] for name in before)


def test_a_state_of_other_masks_is_refused_by_name() -> None:
    state = Run(only=("0.weight", "2.weight")).regrow.state_dict()
    with pytest.raises(
        ValueError, match=r"saved for other masks; different are: 2\.weight, 4\.weight"
    ):
        Run(only=("0.weight", "4.weight")).regrow.load_state_dict(state)


def test_a_state_of_other_shapes_is_refused_by_name() -> None:
    state = Run(nn.Sequential(nn.Linear(20, 8))).regrow.state_dict()
    with pytest.raises(ValueError, match=r"saved for other masks; different are: 0\.weight"):
        Run(only=("0.weight",)).regrow.load_state_dict(state)


def test_a_run_at_one_density_goes_on_to_another() -> None:
    run, other = Run(every=3, sparsity=0.8), Run(density="linear", final_sparsity=0.9, sparsity=0.2)
    run.train(range(3))
    other.regrow.load_state_dict(run.regrow.state_dict())
    other.model.load_state_dict(run.model.state_dict())
    active = []
    other.train(
        range(3, 12),
        after=lambda step: active.append(sum(itop.active for itop in other.masks.values())),
    )
    assert max(active) < 112  # of 560 at the start
    assert active == sorted(active, reverse=True)
    assert active[-1] == 56


@pytest.mark.filterwarnings("ignore:4.weight got no gradient since the last update")
def test_a_layer_that_is_frozen_where_a_run_goes_on_to_another_density_takes_part_later() -> None:
    run, other = Run(every=3, sparsity=0.8), Run(density="linear", final_sparsity=0.9, sparsity=0.2)
    run.train(range(3))
    other.model.load_state_dict(run.model.state_dict())
    other.regrow.load_state_dict(run.regrow.state_dict())
    other.masks["4.weight"].parameter.requires_grad_(False)
    other.train(range(3, 4))
    other.masks["4.weight"].parameter.requires_grad_(True)
    other.train(range(4, 12))
    assert sum(itop.active for itop in other.masks.values()) == 56  # of 560


@pytest.mark.parametrize("lacking", ["step", "dense", "explored"])
def test_a_state_that_lacks_something_is_refused_and_changes_nothing(lacking: str) -> None:
    run, other = Run(), Run()
    run.train(range(4))
    before = other.regrow.state_dict()
    state = {key: value for key, value in run.regrow.state_dict().items() if key != lacking}
    with pytest.raises(
        ValueError, match=f"the state lacks {lacking}; give what a MaskScheduler's state_dict"
    ):
        other.regrow.load_state_dict(state)
    after = other.regrow.state_dict()
    assert all(
        torch.equal(after["explored"][name], explored)
        for name, explored in before["explored"].items()
    )
    assert after["step"] == before["step"]


def test_what_a_state_needs_is_in_it() -> None:
    assert Run().regrow.state_dict().keys() - {"entered"} == set(SAVED)


@pytest.mark.parametrize("seed", [1.5, "x", None])
def test_a_seed_that_is_no_whole_number_is_refused(seed: Any) -> None:
    model = mlp()
    masks, optimizer = itop_prune.apply(model, 0.5), torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"seed is .*; allowed is a whole number"):
        itop_prune.MaskScheduler(masks, optimizer, total_steps=4, every=2, seed=seed)


def test_rates_of_numpy_are_those_of_python() -> None:
    model = mlp()
    masks, optimizer = itop_prune.apply(model, 0.5), torch.optim.SGD(model.parameters(), lr=0.1)
    regrow = itop_prune.MaskScheduler(
        masks, optimizer, total_steps=4, every=2, rate=np.float32(0.25), stop=np.float64(1)
    )
    assert type(regrow.rate) is float
    assert regrow.update_steps() == range(2, 5, 2)


def test_a_refused_state_changes_nothing() -> None:
    other, run = Run(only=("0.weight",)), Run()
    other.train(range(4))
    with pytest.raises(ValueError):
        run.regrow.load_state_dict(other.regrow.state_dict())
    assert run.regrow.updates == 0
    assert run.regrow.rate == 0.5


def test_own_functions_prune_and_grow() -> None:
    def oldest(weight: Tensor) -> Tensor:
        return torch.arange(weight.numel(), dtype=torch.float32).view_as(weight)

    def last(mask: Tensor) -> Tensor:
        return torch.arange(mask.numel(), dtype=torch.float32).view_as(mask)

    layer = nn.Linear(8, 1, bias=False)
    itop = ITOP.apply(layer, "weight", torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0]]))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    regrow = MaskScheduler(
        {"weight": itop},
        optimizer,
        total_steps=1,
        every=1,
        rate=0.5,
        schedule="constant",
        prune=oldest,
        grow=last,
    )
    layer(torch.ones(1, 8)).sum().backward()
    regrow.step()
    assert itop.mask.tolist() == [[False, False, True, True, False, False, True, True]]


def test_own_functions_get_what_their_parameters_name() -> None:
    given_to: dict[str, object] = {}

    def mine(
        weight: Tensor, mask: Tensor, grad: Tensor, explored: Tensor, generator: torch.Generator
    ) -> Tensor:
        given_to.update(weight=weight, mask=mask, grad=grad, explored=explored, generator=generator)
        return weight.abs()

    run = Run(mlp().bfloat16(), grow=mine, only=("0.weight",), every=1)
    run.model(torch.randn(8, 20).bfloat16()).sum().backward()
    run.regrow.step()
    dtypes = {name: value.dtype for name, value in given_to.items() if isinstance(value, Tensor)}
    assert dtypes == {
        "weight": torch.float32,
        "mask": torch.bool,
        "grad": torch.float32,
        "explored": torch.bool,
    }
    assert isinstance(given_to["generator"], torch.Generator)


def test_a_criterion_for_pruning_may_ask_for_the_gradient() -> None:
    run = Run(prune="taylor", every=1)
    before = run.positions()
    run.backward()
    assert run.regrow.step()
    assert moved(run, before) == list(run.masks)


@pytest.mark.parametrize(
    "answer", [lambda weight: weight.sum(), lambda weight: 3.0, lambda weight: weight.T]
)
def test_a_criterion_that_gives_something_else_is_refused(answer: Callable) -> None:
    run = Run(grow=answer, every=1)
    run.backward()
    with pytest.raises(
        ValueError,
        match=r"<lambda> gave .* for 0\.weight; it must give one score per weight, \(16, 20",
    ):
        run.regrow.step()


@pytest.mark.parametrize(
    ("role", "name", "known"),
    [("prune", "magnitud", "magnitude, set, .*, random"), ("grow", "randm", "random, gradient")],
)
def test_an_unknown_criterion_is_answered_with_the_menu(role: str, name: str, known: str) -> None:
    with pytest.raises(
        ValueError, match=rf"unknown {role} '{name}'; known are {known}.* \(nearest"
    ):
        Run(**{role: name})


def test_an_unknown_schedule_is_answered_with_the_menu() -> None:
    with pytest.raises(
        ValueError, match=r"unknown schedule 'cos'; known are constant, linear, cosine"
    ):
        Run(schedule="cos")


@pytest.mark.parametrize("role", ["prune", "grow"])
def test_a_criterion_with_an_unknown_parameter_is_refused(role: str) -> None:
    with pytest.raises(
        ValueError, match=rf"parameter of the {role} criterion <lambda> 'gradient'.*nearest: 'grad'"
    ):
        Run(**{role: lambda gradient: gradient})


@pytest.mark.parametrize("name", ["total_steps", "every"])
@pytest.mark.parametrize("value", [0, -1, 2.5, "3", True, None])
def test_steps_must_be_whole_numbers_from_1(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"{name} is {value!r}; allowed are whole numbers from 1"):
        Run(**{name: value})


@pytest.mark.parametrize("name", ["stop", "rate"])
@pytest.mark.parametrize("value", [0.0, -0.5, 1.01, math.nan, "0.5", True])
def test_shares_must_lie_above_0_and_up_to_1(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"{name} is {value!r}; allowed is a number in \(0, 1\]"):
        Run(**{name: value})


@pytest.mark.parametrize("value", [-0.1, 0.6, math.nan, "0.1"])
def test_min_rate_must_lie_between_0_and_rate(value: object) -> None:
    with pytest.raises(
        ValueError,
        match=rf"min_rate is {value!r}; allowed is a number in \[0, rate\], and rate is 0.5",
    ):
        Run(min_rate=value)


@pytest.mark.parametrize("masks", [{}, [1], mlp()], ids=["empty", "list", "model"])
def test_what_is_no_masks_is_refused(masks: object) -> None:
    with pytest.raises(
        ValueError, match=r"masks is \w+; allowed is what itop_prune\.apply returned"
    ):
        MaskScheduler(masks, torch.optim.SGD(mlp().parameters(), lr=0.1), total_steps=1, every=1)


def test_the_repr_tells_counts_rate_and_next_update() -> None:
    run = Run(sparsity=0.75, total_steps=12, every=4)
    run.train(range(6))
    assert repr(run.regrow) == (
        "MaskScheduler(3 masks, 140 of 560 active, prune=magnitude, grow=random, rate=0.2525, "
        "step 6 of 12, updates=1, next=8)"
    )


def test_the_repr_past_the_last_update_has_no_next_one() -> None:
    run = Run(total_steps=4, every=4)
    run.train(range(4))
    assert "next=None" in repr(run.regrow)


def test_gradients_cleared_to_zeros_before_step_are_noticed_once() -> None:
    model = mlp()
    masks = itop_prune.apply(model, 0.8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    regrow = itop_prune.MaskScheduler(masks, optimizer, total_steps=10, every=2)

    def wrong_order() -> None:
        x, y = batch(0, 20)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        regrow.step()

    wrong_order()
    with pytest.warns(UserWarning, match=r"were they cleared before\? The order is loss\.backward"):
        wrong_order()
    wrong_order()
    wrong_order()


def test_what_was_active_before_the_first_update_counts_as_explored_whoever_set_it() -> None:
    model = mlp()
    masks = itop_prune.apply(model, 0.8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    regrow = itop_prune.MaskScheduler(masks, optimizer, total_steps=1, every=1)
    other = mlp()
    itop_prune.apply(other, 0.8, seed=1)
    model.load_state_dict(other.state_dict())
    loaded = {name: itop.mask.clone() for name, itop in masks.items()}
    train(model, optimizer, regrow, steps=range(1))
    assert all(regrow.explored[name][mask].all() for name, mask in loaded.items())


def test_a_state_dict_does_not_change_when_training_goes_on() -> None:
    model = mlp()
    masks = itop_prune.apply(model, 0.8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    regrow = itop_prune.MaskScheduler(masks, optimizer, total_steps=10, every=1)
    state = regrow.state_dict()
    before = {name: explored.clone() for name, explored in state["explored"].items()}
    train(model, optimizer, regrow, steps=range(5))
    assert all(torch.equal(state["explored"][name], explored) for name, explored in before.items())


def test_a_layer_unfrozen_that_the_optimizer_does_not_hold_is_refused_at_the_update() -> None:
    model = mlp()
    masks = itop_prune.apply(model, 0.8)
    model[2].weight_orig.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    regrow = itop_prune.MaskScheduler(masks, optimizer, total_steps=10, every=1)
    model[2].weight_orig.requires_grad_(True)
    before = masks["2.weight"].mask.clone()
    with pytest.raises(ValueError, match=r"does not hold 2\.weight"):
        train(model, optimizer, regrow, steps=range(1))
    assert torch.equal(masks["2.weight"].mask, before)


def test_a_criterion_may_have_parameters_of_its_own() -> None:
    def mixed(weight: torch.Tensor, grad: torch.Tensor, alpha: float = 0.5) -> torch.Tensor:
        return alpha * weight.abs() + (1 - alpha) * grad.abs()

    model = mlp()
    masks = itop_prune.apply(model, 0.8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for grow in (mixed, functools.partial(mixed, alpha=0.1)):
        regrow = itop_prune.MaskScheduler(masks, optimizer, total_steps=2, every=1, grow=grow)
        train(model, optimizer, regrow, steps=range(2))
        assert regrow.updates == 2


class Blocked(nn.Module):
    """Its first layer's gradient is 0: what follows multiplies by 0."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(20, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x) * 0.0 + x[:, :16])


def test_a_layer_whose_dense_gradient_is_zero_everywhere_is_warned_of_once_by_name() -> None:
    torch.manual_seed(0)
    run = Run(Blocked(), grow="gradient")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.train(range(8))
    assert len(caught) == 1
    assert "the dense gradient of body.weight is 0 everywhere at step 2" in str(caught[0].message)


def test_random_growth_asks_no_layer_for_its_dense_gradient() -> None:
    torch.manual_seed(0)
    run = Run(Blocked())
    run.train(range(4))
    assert run.regrow.updates == 2


@pytest.mark.parametrize(
    ("layer", "outputs"),
    [(nn.Linear(20, 16), 16), (nn.ConvTranspose2d(20, 8, 1, groups=2), 8)],
    ids=str,
)
def test_a_layer_with_fewer_active_weights_than_outputs_is_warned_of_once_by_name(
    layer: nn.Module, outputs: int
) -> None:
    model = nn.Sequential(layer)
    masks = itop_prune.apply(model, 1.0 - 5.2 / layer.weight.numel())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    regrow = itop_prune.MaskScheduler(masks, optimizer, total_steps=4, every=1)
    x = torch.randn(3, 20) if isinstance(layer, nn.Linear) else torch.randn(3, 20, 2, 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            model(x).square().sum().backward()
            regrow.step()
    assert [str(warning.message).split(", so")[0] for warning in caught] == [
        f"0.weight has fewer active weights than outputs, 5 and {outputs}"
    ]


def test_a_parameter_that_something_flattened_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    masks = itop_prune.apply(model, 0.5)
    model[0].weight_orig.data = model[0].weight_orig.data.flatten()
    with pytest.raises(
        ValueError,
        match=r"0.weight has the shape \(12,\), its mask \(3, 4\): FSDP1 and ZeRO-3 flatten",
    ):
        itop_prune.MaskScheduler(masks, torch.optim.SGD(model.parameters()), total_steps=4, every=1)


def test_a_parameter_that_lies_elsewhere_than_its_mask_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    masks = itop_prune.apply(model, 0.5)
    model[0].weight_orig = nn.Parameter(model[0].weight_orig.detach().to("meta"))
    with pytest.raises(
        ValueError,
        match=r"0.weight is on meta, its mask on cpu; .* leave out FSDP2's CPUOffloadPolicy",
    ):
        itop_prune.MaskScheduler(
            masks, torch.optim.SGD(model.parameters(), lr=0.1), total_steps=4, every=1
        )


def heads(**options: Any) -> tuple[nn.ModuleList, MaskScheduler, Callable[[int], None]]:
    """Two layers; a step takes the one of its number."""
    model = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"total_steps": 8, "every": 4, **options}
    regrow = MaskScheduler(itop_prune.apply(model, 0.5, "uniform"), optimizer, **options)

    def step(number: int) -> None:
        model[number](torch.ones(1, 8)).square().sum().backward()
        optimizer.step()
        regrow.step()
        optimizer.zero_grad()

    return model, regrow, step


def test_a_layer_that_three_updates_in_a_row_miss_is_told_of() -> None:
    _, regrow, step = heads(every=2, total_steps=20)
    for number in (
        (0, 1) * 2 + (1, 0) * 2 + (1,)
    ):  # two updates miss the first layer, two the second
        step(number)
    with pytest.warns(
        UserWarning,
        match=r"^1\.weight got no gradient at step 10 and the updates before it, though",
    ):
        step(0)
    assert regrow.entered()["0.weight"] > 0
    assert regrow.entered()["1.weight"] == 0


def test_a_final_sparsity_that_a_layer_misses_is_told_of() -> None:
    model, _, step = heads(density="cubic", final_sparsity=0.75)
    for number in (0, 1, 0, 0, 0, 0, 1):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            step(number)
    with pytest.warns(
        UserWarning,
        match=r"the final sparsity is missed: .* step 8, and stay as they are: 1\.weight",
    ):
        step(0)
    assert int(model[0].weight_mask.sum()) == 16
    assert int(model[1].weight_mask.sum()) == 32


@pytest.mark.filterwarnings("ignore:the dense gradient of")
def test_gradients_that_nobody_could_hear_are_told_of_once_and_the_update_waits() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    regrow = MaskScheduler(
        itop_prune.apply(model, 0.5), optimizer, total_steps=9, every=2, grow="gradient"
    )

    def step() -> bool:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        return regrow.step()

    step()
    assert not step()
    with pytest.warns(
        UserWarning, match=r"an update is due at step 3, and waits: .* no dense gradient was seen"
    ):
        assert not step()
    assert not step()
    optimizer.zero_grad()
    F.cross_entropy(model(batch(0, 20)[0]), batch(0, 20)[1]).backward()
    assert regrow.step()


def test_a_scheduler_built_between_backward_and_its_first_update_says_nothing() -> None:
    model = mlp()
    masks, optimizer = itop_prune.apply(model, 0.5), torch.optim.SGD(model.parameters(), lr=0.1)
    F.cross_entropy(model(batch(0, 20)[0]), batch(0, 20)[1]).backward()
    regrow = MaskScheduler(masks, optimizer, total_steps=9, every=1, grow="gradient")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not regrow.step()
