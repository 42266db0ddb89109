"""The promises that hold whatever the model, the optimizer and the criteria are: one group of tests for each."""

import copy
import io
import math
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers.toys import batch, convnet, mlp, train
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

import itop_prune

GROWTH = ["random", "gradient"]


@dataclass
class Run:
    """A sparse model in training."""

    model: nn.Module
    masks: dict[str, itop_prune.ITOP]
    optimizer: torch.optim.Optimizer
    regrow: itop_prune.MaskScheduler
    shape: tuple[int, ...]

    def train(self, steps: range, after: Callable[[int], None] = lambda step: None) -> list[float]:
        return train(
            self.model, self.optimizer, self.regrow, steps=steps, shape=self.shape, after=after
        )

    def numbers(self) -> dict[str, Tensor]:
        """Everything that training depends on, copied."""
        found = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        found |= {
            f"explored of {name}": tensor.clone() for name, tensor in self.regrow.explored.items()
        }
        for index, state in self.optimizer.state_dict()["state"].items():
            found |= {
                f"{key} of {index}": value.clone()
                for key, value in state.items()
                if torch.is_tensor(value)
            }
        counts = [
            self.regrow.rate,
            self.regrow.updates,
            self.regrow.skipped,
            self.regrow.exploration_rate(),
        ]
        return found | {"counts": torch.tensor(counts, dtype=torch.float64)}


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.01)


def momentum(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


def sparse(
    build: Callable[[], nn.Module] = mlp,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adam,
    *,
    sparsity: float = 0.7,
    method: object = "ERK",
    every: int = 2,
    total_steps: int = 40,
    **keywords: object,
) -> Run:
    model = build()
    masks = itop_prune.apply(model, sparsity, method)
    built = optimizer(model)
    regrow = itop_prune.MaskScheduler(
        masks, built, total_steps=total_steps, every=every, **keywords
    )
    return Run(model, masks, built, regrow, (20,) if build is mlp else (3, 8, 8))


def channels_last() -> nn.Module:
    return convnet().to(memory_format=torch.channels_last)


def statistics(run: Run, name: str) -> list[Tensor]:
    parameter = run.masks[name].parameter
    return [
        value for value in run.optimizer.state[parameter].values() if value.shape == parameter.shape
    ]


def weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@dataclass
class Update:
    """One masked weight just before and just after an update."""

    before: Tensor
    after: Tensor
    values_before: list[Tensor]
    values_after: list[Tensor]


def updates_of(run: Run, steps: range) -> Iterator[Update]:
    """Train, and yield what every update did to every masked weight and to its statistics."""
    seen: dict[str, tuple[Tensor, list[Tensor]]] = {}
    found: list[Update] = []

    def look(name: str) -> tuple[Tensor, list[Tensor]]:
        itop = run.masks[name]
        return itop.mask.clone(), [
            value.detach().clone() for value in (itop.parameter, *statistics(run, name))
        ]

    def before(*_: object) -> None:
        seen.update({name: look(name) for name in run.masks})

    def after(step: int) -> None:
        if step + 1 in run.regrow.update_steps():
            for name in run.masks:
                mask, values = look(name)
                found.append(Update(seen[name][0], mask, seen[name][1], values))

    run.optimizer.register_step_post_hook(before)
    run.train(steps, after)
    assert found
    assert run.regrow.updates > 0
    yield from found


# --- 1. the number of active weights -------------------------------------------------------------


def counts_over(run: Run, steps: int = 50) -> set[tuple[int, ...]]:
    """Return every combination of counts seen; the masks must have moved."""
    first = {name: itop.mask.clone() for name, itop in run.masks.items()}
    seen = {tuple(int(itop.mask.sum()) for itop in run.masks.values())}
    run.train(
        range(steps),
        after=lambda step: seen.add(tuple(int(itop.mask.sum()) for itop in run.masks.values())),
    )
    assert run.regrow.updates == len(run.regrow.update_steps())
    assert any(not torch.equal(first[name], itop.mask) for name, itop in run.masks.items())
    return seen


@pytest.mark.parametrize("rate", [0.01, 0.37, 1.0])
@pytest.mark.parametrize("grow", GROWTH)
def test_an_update_never_changes_the_number_of_active_weights_of_a_layer(
    grow: str, rate: float
) -> None:
    run = sparse(rate=rate, min_rate=0.01, grow=grow, every=1, total_steps=50)
    assert len(counts_over(run)) == 1


@pytest.mark.filterwarnings("ignore:the dense gradient of")
@pytest.mark.parametrize("grow", GROWTH)
def test_counts_are_exact_where_every_weight_and_gradient_ties_at_zero(grow: str) -> None:
    run = sparse(
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.0), grow=grow, every=1
    )
    for itop in run.masks.values():
        torch.nn.init.zeros_(itop.parameter)
    assert len(counts_over(run)) == 1


@pytest.mark.parametrize("grow", GROWTH)
def test_counts_are_exact_in_channels_last(grow: str) -> None:
    run = sparse(channels_last, momentum, grow=grow, every=1)
    assert run.masks["3.weight"].mask.is_contiguous(memory_format=torch.channels_last)
    assert len(counts_over(run)) == 1


@pytest.mark.parametrize("grow", GROWTH)
def test_counts_are_exact_where_few_distinct_weights_tie(grow: str) -> None:
    run = sparse(mlp, lambda model: torch.optim.SGD(model.parameters(), lr=0.0), grow=grow, every=1)
    with torch.no_grad():
        for itop in run.masks.values():
            itop.parameter.sign_()
    assert len(counts_over(run)) == 1


@pytest.mark.filterwarnings("ignore:.* has fewer active weights than outputs")
def test_counts_are_exact_with_one_active_weight_in_a_layer() -> None:
    run = sparse(sparsity=1 - 3 / 560, method="uniform", every=1, grow="random", prune="random")
    assert counts_over(run) == {(1, 1, 1)}


# --- 2. what is grown, what is pruned, what stays ------------------------------------------------


@pytest.mark.parametrize("optimizer", [adam, momentum])
@pytest.mark.parametrize("grow", GROWTH)
def test_grown_weights_start_at_zero_and_so_do_their_statistics(
    grow: str, optimizer: Callable
) -> None:
    grown = 0
    for update in updates_of(sparse(optimizer=optimizer, grow=grow), range(12)):
        new = update.after & ~update.before
        grown += int(new.sum())
        assert all(not value[new].any() for value in update.values_after)
    assert grown > 0


@pytest.mark.parametrize("optimizer", [adam, momentum])
@pytest.mark.parametrize("grow", GROWTH)
def test_pruned_weights_become_zero_and_so_do_their_statistics(
    grow: str, optimizer: Callable
) -> None:
    had_value = 0
    for update in updates_of(sparse(optimizer=optimizer, grow=grow), range(12)):
        gone = update.before & ~update.after
        had_value += sum(int(value[gone].count_nonzero()) for value in update.values_before)
        assert all(not value[gone].any() for value in update.values_after)
    assert had_value > 0


@pytest.mark.parametrize("optimizer", [adam, momentum])
@pytest.mark.parametrize("grow", GROWTH)
def test_weights_that_stay_keep_value_and_statistics(grow: str, optimizer: Callable) -> None:
    for update in updates_of(sparse(optimizer=optimizer, grow=grow), range(12)):
        stayed = update.before & update.after
        for before, after in zip(update.values_before, update.values_after, strict=True):
            assert torch.equal(before[stayed], after[stayed])


def test_a_weight_pruned_and_grown_again_in_one_update_keeps_value_and_statistics() -> None:
    run = sparse(
        rate=1.0, min_rate=1.0, prune="magnitude", grow=lambda weight: weight.abs()
    )  # all go, all come back
    for update in updates_of(run, range(4)):
        assert torch.equal(update.before, update.after)
        assert len(update.values_after) == 3
        for before, after in zip(update.values_before, update.values_after, strict=True):
            assert before[update.before].any()
            assert torch.equal(before, after)


class Strange(torch.optim.Optimizer):
    """Keeps what no known optimizer keeps: a statistic of a name of its own, a sum over rows, and a number."""

    def __init__(self, parameters: Iterator[nn.Parameter]) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            state.setdefault("whatever it is", torch.zeros_like(parameter)).add_(
                parameter.grad + (parameter != 0)
            )
            state.setdefault("of the rows", torch.zeros(len(parameter), 1)).add_(1.0)
            state.setdefault("a number", torch.zeros(())).add_(1.0)
            parameter.sub_(0.1 * parameter.grad)


def test_statistics_are_found_by_their_shape_alone() -> None:
    run = sparse(optimizer=lambda model: Strange(model.parameters()))
    for update in updates_of(run, range(8)):
        moved = update.before ^ update.after
        assert update.values_before[1][update.before].any()
        assert not update.values_after[1][moved].any()


def test_optimizer_state_of_another_shape_is_left_alone() -> None:
    run = sparse(optimizer=lambda model: Strange(model.parameters()))
    run.train(range(8))
    assert run.regrow.updates == 4
    for itop in run.masks.values():
        state = run.optimizer.state[itop.parameter]
        assert torch.equal(state["of the rows"], torch.full_like(state["of the rows"], 8.0))
        assert state["a number"] == 8


@pytest.mark.parametrize("grow", GROWTH)
def test_a_fully_dense_layer_is_left_alone(grow: str) -> None:
    run = sparse(
        method=lambda shapes, density: {"0.weight": 0.3, "2.weight": 0.3, "4.weight": 1.0},
        sparsity=0.64,
        grow=grow,
    )
    assert run.masks["4.weight"].mask.all()
    values: list[Tensor] = []
    last = run.masks["4.weight"].parameter
    run.optimizer.register_step_post_hook(
        lambda *_: values.__setitem__(
            slice(None), [v.detach().clone() for v in (last, *statistics(run, "4.weight"))]
        )
    )

    def unchanged(step: int) -> None:
        assert run.masks["4.weight"].mask.all()
        for before, now in zip(values, (last, *statistics(run, "4.weight")), strict=True):
            assert torch.equal(before, now)

    run.train(range(8), unchanged)
    assert run.regrow.updates == 4


# --- 3. zeros off the mask, and the same step on every step --------------------------------------


def assert_zero_off_mask(model: nn.Module) -> None:
    masks = itop_prune.find_masks(model)
    assert masks
    for itop in masks.values():
        assert not itop.mask.all()
        assert not itop.parameter[~itop.mask].any()


def test_weights_off_the_mask_are_zero_after_apply() -> None:
    assert_zero_off_mask(sparse().model)


def dirty(model: nn.Module) -> dict[str, Tensor]:
    """A sparse state dict as others write it: something else than 0 off the mask."""
    return {
        name: tensor + 1 if name.endswith("_orig") else tensor.clone()
        for name, tensor in model.state_dict().items()
    }


def float_masks(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: tensor.float() if name.endswith("_mask") else tensor
        for name, tensor in dirty(model).items()
    }


LOADS = {
    "a sparse state dict": lambda model: model.load_state_dict(dirty(sparse(every=1).model)),
    "a state dict of torch's own pruning": lambda model: model.load_state_dict(
        float_masks(sparse().model)
    ),
    "a sparse state dict, assigned": lambda model: model.load_state_dict(
        dirty(sparse().model), assign=True
    ),
    "a dense state dict": lambda model: model.load_state_dict(mlp(seed=1).state_dict()),
    "itop_prune.load": lambda model: itop_prune.load(model, dirty(sparse().model)),
}


@pytest.mark.parametrize("how", LOADS)
def test_weights_off_the_mask_are_zero_after_a_load(how: str) -> None:
    model = sparse().model
    before = weights(model)
    LOADS[how](model)
    assert any(
        not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)
    )
    assert_zero_off_mask(model)


def test_weights_off_the_mask_are_zero_after_a_sparse_load_into_a_dense_model() -> None:
    model = mlp(seed=1)
    itop_prune.load(model, dirty(sparse().model))
    assert_zero_off_mask(model)


@pytest.mark.parametrize("optimizer", [adam, momentum])
@pytest.mark.parametrize("grow", GROWTH)
def test_weights_and_statistics_off_the_mask_are_zero_after_an_update(
    grow: str, optimizer: Callable
) -> None:
    for update in updates_of(sparse(channels_last, optimizer, grow=grow), range(12)):
        assert len(update.values_after) >= 2
        assert all(not value[~update.after].any() for value in update.values_after)


def steps_with_clipping(grow: str | None, micro_batches: int) -> list[tuple[Tensor, list[Tensor]]]:
    """Return the gradient norm and the weights after the optimizer, of three steps; the third is an update step."""
    run = sparse(optimizer=momentum, every=3, grow=grow or "random")
    seen = []
    for step in range(3):
        for micro in range(micro_batches):
            x, y = batch(10 * step + micro, 20)
            F.cross_entropy(run.model(x), y).backward()
        norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), 0.1)
        run.optimizer.step()
        seen.append((norm, weights(run.model)))
        if grow is not None:
            assert run.regrow.step() == (step == 2)
        run.optimizer.zero_grad()
    return seen


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("grow", GROWTH)
def test_an_update_step_clips_and_steps_as_a_static_sparse_model_does(
    grow: str, micro_batches: int
) -> None:
    moving, static = (
        steps_with_clipping(grow, micro_batches),
        steps_with_clipping(None, micro_batches),
    )
    for (norm, values), (expected_norm, expected) in zip(moving, static, strict=True):
        assert torch.equal(norm, expected_norm)
        assert all(torch.equal(value, other) for value, other in zip(values, expected, strict=True))


def test_the_gradient_the_optimizer_sees_on_an_update_step_is_zero_off_the_mask() -> None:
    run = sparse(grow="gradient", every=1)
    x, y = batch(0, 20)
    F.cross_entropy(run.model(x), y).backward()
    for itop in run.masks.values():
        assert itop.parameter.grad[itop.mask].any()
        assert not itop.parameter.grad[~itop.mask].any()


# --- 4. identity, storage, memory format, order --------------------------------------------------


def places(tensors: Iterator[Tensor]) -> list[tuple[int, int, tuple[int, ...]]]:
    return [(id(tensor), tensor.data_ptr(), tensor.stride()) for tensor in tensors]


def mask_places(model: nn.Module) -> list[tuple[int, int, tuple[int, ...]]]:
    return places(itop.mask for itop in itop_prune.find_masks(model).values())


@pytest.mark.parametrize("build", [mlp, convnet, channels_last])
def test_apply_keeps_parameters_in_place_and_order(build: Callable[[], nn.Module]) -> None:
    model = build()
    before = places(model.parameters())
    itop_prune.apply(model, 0.7)
    assert places(model.parameters()) == before


def test_apply_renames_a_parameter_and_changes_no_other_name() -> None:
    model = convnet()
    masked = {"0.weight", "3.weight", "7.weight"}
    expected = [name + "_orig" if name in masked else name for name, _ in model.named_parameters()]
    itop_prune.apply(model, 0.7)
    assert [name for name, _ in model.named_parameters()] == expected


@pytest.mark.parametrize("build", [convnet, channels_last])
def test_a_mask_has_the_memory_format_of_its_parameter(build: Callable[[], nn.Module]) -> None:
    for itop in itop_prune.apply(build(), 0.7).values():
        assert itop.mask.stride() == itop.parameter.stride()


@pytest.mark.parametrize("build", [mlp, channels_last])
@pytest.mark.parametrize("grow", GROWTH)
def test_updates_keep_masks_and_parameters_in_place(
    grow: str, build: Callable[[], nn.Module]
) -> None:
    run = sparse(build, grow=grow)
    parameters, masks = places(run.model.parameters()), mask_places(run.model)
    run.train(range(8))
    assert run.regrow.updates == 4
    assert places(run.model.parameters()) == parameters
    assert mask_places(run.model) == masks


@pytest.mark.parametrize("how", [how for how in LOADS if "assigned" not in how])
def test_loading_keeps_masks_and_parameters_in_place(how: str) -> None:
    model = sparse().model
    parameters, masks = places(model.parameters()), mask_places(model)
    LOADS[how](model)
    assert places(model.parameters()) == parameters
    assert mask_places(model) == masks


def test_loading_a_sparse_state_into_a_dense_model_keeps_its_parameters_in_place() -> None:
    model = mlp(seed=1)
    before = places(model.parameters())
    itop_prune.load(model, sparse().model.state_dict())
    assert places(model.parameters()) == before


def test_restoring_the_scheduler_keeps_masks_and_explored_in_place() -> None:
    run, other = sparse(), sparse()
    other.train(range(6))
    masks, explored = mask_places(run.model), places(run.regrow.explored.values())
    run.regrow.load_state_dict(other.regrow.state_dict())
    assert mask_places(run.model) == masks
    assert places(run.regrow.explored.values()) == explored


@pytest.mark.parametrize("build", [mlp, channels_last])
def test_remove_keeps_parameters_in_place_and_order(build: Callable[[], nn.Module]) -> None:
    run = sparse(build, grow="gradient")
    before = places(run.model.parameters())
    run.train(range(3))
    itop_prune.remove(run.model)
    assert places(run.model.parameters()) == before


# --- 5. the weight is current, whoever reads it --------------------------------------------------


def test_the_weight_is_current_after_its_parameter_changed_without_a_forward() -> None:
    layer = nn.Linear(8, 4)
    itop = itop_prune.apply(layer, 0.5)["weight"]
    layer(torch.ones(1, 8))
    with torch.no_grad():
        itop.parameter.fill_(3.0)
    assert torch.equal(layer.weight, 3.0 * itop.mask)


def test_the_weight_is_current_after_its_mask_changed_without_a_forward() -> None:
    layer = nn.Linear(8, 4)
    itop = itop_prune.apply(layer, 0.5)["weight"]
    layer(torch.ones(1, 8))
    with torch.no_grad():
        itop.parameter.fill_(3.0)
    itop.mask.logical_not_()
    assert torch.equal(layer.weight, 3.0 * itop.mask)


def test_a_weight_read_without_gradients_does_not_stay_without() -> None:
    layer = nn.Linear(8, 4)
    itop = itop_prune.apply(layer, 0.5)["weight"]
    with torch.no_grad():
        layer(torch.ones(1, 8))
    layer.weight.sum().backward()
    assert torch.equal(itop.parameter.grad, itop.mask.float())


class Parent(nn.Module):
    """Reads the weight of its child and never calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.qkv.weight)


def test_a_parent_that_reads_the_weight_of_a_child_reads_the_current_one() -> None:
    model, x = Parent(), torch.randn(2, 8)
    itop = itop_prune.apply(model, 0.5)["qkv.weight"]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(x).square().sum().backward()
    optimizer.step()
    assert not itop.parameter.grad[~itop.mask].any()
    assert torch.equal(model(x), x @ (itop.parameter * itop.mask).T)


def attention_step(attention: nn.MultiheadAttention, x: Tensor) -> Tensor:
    return attention(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("training", [True, False])
def test_multihead_attention_computes_with_the_current_weights(training: bool) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    masks = itop_prune.apply(attention, 0.5)
    assert sorted(masks) == ["in_proj_weight", "out_proj.weight"]
    x = torch.randn(2, 3, 8)
    attention.train(training)
    with torch.no_grad():
        attention_step(attention, x)
        for itop in masks.values():
            itop.parameter.mul_(2.0)
            itop.mask.copy_(itop.mask.flip(0))
        twin = nn.MultiheadAttention(8, 2, batch_first=True)
        twin.load_state_dict(itop_prune.dense_state_dict(attention))
        assert torch.allclose(
            attention_step(attention, x), attention_step(twin.train(training), x), atol=1e-6
        )


def test_multihead_attention_passes_gradients_to_both_weights() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    masks = itop_prune.apply(attention, 0.5)
    attention_step(attention, torch.randn(2, 3, 8)).square().sum().backward()
    for itop in masks.values():
        assert itop.parameter.grad[itop.mask].any()
        assert not itop.parameter.grad[~itop.mask].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_dtype_of_the_weight_is_the_one_the_model_was_moved_to(dtype: torch.dtype) -> None:
    model = sparse(convnet).model
    model(batch(0, 3, 8, 8)[0])
    model.to(dtype)
    assert {layer.weight.dtype for layer in (model[0], model[3], model[7])} == {dtype}
    assert {itop.mask.dtype for itop in itop_prune.find_masks(model).values()} == {torch.bool}
    assert model(batch(0, 3, 8, 8)[0].to(dtype)).dtype == dtype


def test_functional_call_computes_with_the_parameters_it_was_given() -> None:
    run, x = sparse(), batch(0, 20)[0]
    doubled = {name: 2.0 * parameter for name, parameter in run.model.named_parameters()}
    given = torch.func.functional_call(run.model, doubled, (x,))
    run.model.load_state_dict(doubled, strict=False)
    assert torch.equal(given, run.model(x))


# torch 2.15 deprecates parts of itself while it exports.
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*", "ignore::FutureWarning:torch.*")
@pytest.mark.parametrize("grow", GROWTH)
def test_an_export_has_the_current_weights(grow: str) -> None:
    run, x = sparse(grow=grow), batch(0, 20)[0]
    run.model(x)
    run.train(range(3))  # with gradient growth it now listens for the update of the next step
    program = torch.export.export(run.model.eval(), (x,))
    twin = mlp(seed=1)
    twin.load_state_dict(itop_prune.dense_state_dict(run.model))
    assert torch.allclose(program.module()(x), twin(x), atol=1e-6)


# --- 6. copies -----------------------------------------------------------------------------------


def through_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": through_torch_save,
}


def backward(run: Run, step: int) -> None:
    x, y = batch(step, *run.shape)
    F.cross_entropy(run.model(x), y).backward()


def after_a_forward(run: Run) -> None:
    run.model(batch(0, *run.shape)[0])


def between_backward_and_update(run: Run) -> None:
    run.train(range(1))
    backward(run, 1)


MOMENTS = {
    "after apply": lambda run: None,
    "after a forward": after_a_forward,
    "after a step": lambda run: run.train(range(1)),
    "after an update": lambda run: run.train(range(2)),
    "between backward and update": between_backward_and_update,
}


@pytest.fixture(params=MOMENTS)
def run(request: pytest.FixtureRequest) -> Run:
    """A run that listens for the dense gradient at every second step, at some moment of its training."""
    run = sparse(convnet, grow="gradient")
    MOMENTS[request.param](run)
    return run


@pytest.fixture(params=COPIES)
def duplicate(request: pytest.FixtureRequest) -> Callable[[nn.Module], nn.Module]:
    return COPIES[request.param]


def test_a_copy_has_the_same_weights_masks_and_outputs(run: Run, duplicate: Callable) -> None:
    other = duplicate(run.model)
    assert_same(dict(other.state_dict()), dict(run.model.state_dict()))
    x = batch(0, *run.shape)[0]
    assert torch.equal(other.eval()(x), run.model.eval()(x))


def test_a_copy_has_masks_of_its_own_that_can_be_found(run: Run, duplicate: Callable) -> None:
    other = duplicate(run.model)
    masks = itop_prune.find_masks(other)
    assert list(masks) == list(run.masks)
    assert prune.is_pruned(other)
    assert masks["0.weight"].parameter is other[0].weight_orig
    assert masks["0.weight"].mask is other[0].weight_mask


def test_training_the_model_leaves_a_copy_as_it_was(run: Run, duplicate: Callable) -> None:
    other = duplicate(run.model)
    before = copy.deepcopy(dict(other.state_dict()))
    run.optimizer.zero_grad()
    run.train(range(2, 8))
    assert_same(dict(other.state_dict()), before)


def test_training_a_copy_leaves_the_model_as_it_was(run: Run, duplicate: Callable) -> None:
    other = duplicate(run.model)
    before = run.numbers()
    masks, optimizer = itop_prune.find_masks(other), adam(other)
    regrow = itop_prune.MaskScheduler(masks, optimizer, total_steps=40, every=2, grow="gradient")
    optimizer.zero_grad()
    train(other, optimizer, regrow, steps=range(4), shape=run.shape)
    assert regrow.updates == 2
    assert not torch.equal(masks["3.weight"].mask, run.masks["3.weight"].mask)
    assert_same(run.numbers(), before)


def test_a_copy_in_the_middle_of_training_changes_nothing_in_what_comes_after(
    duplicate: Callable,
) -> None:
    watched, alone = sparse(grow="gradient"), sparse(grow="gradient")
    for step in range(6):
        duplicate(watched.model)(batch(step + 50, 20)[0]).sum().backward()
        watched.train(range(step, step + 1))
        alone.train(range(step, step + 1))
    assert watched.regrow.updates == 3
    assert_same(watched.numbers(), alone.numbers())


def test_a_copy_of_a_listening_model_has_a_masked_gradient(duplicate: Callable) -> None:
    run = sparse(grow="gradient", every=1)
    other = duplicate(run.model)
    other(batch(0, 20)[0]).square().sum().backward()
    for itop in itop_prune.find_masks(other).values():
        assert not itop.parameter.grad[~itop.mask].any()


@pytest.mark.parametrize("grow", GROWTH)
def test_a_copy_of_model_optimizer_and_scheduler_together_goes_on_as_the_original(
    grow: str,
) -> None:
    run = sparse(grow=grow)
    run.train(range(3))  # the next step is an update step
    other = copy.deepcopy(run)
    run.train(range(3, 8))
    other.train(range(3, 8))
    assert run.regrow.updates == 4
    assert_same(other.numbers(), run.numbers())


def test_a_copy_has_layers_of_the_same_class(run: Run, duplicate: Callable) -> None:
    other = duplicate(run.model)
    assert [type(layer) for layer in other.modules()] == [
        type(layer) for layer in run.model.modules()
    ]


@pytest.mark.parametrize("sparse_first", [True, False])
def test_an_averaged_model_of_torch_has_the_masks_of_the_model_and_is_independent(
    sparse_first: bool,
) -> None:
    run = sparse(convnet)
    if not sparse_first:
        run.train(range(3))
    average = torch.optim.swa_utils.AveragedModel(
        run.model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    )
    frozen = copy.deepcopy(dict(average.state_dict()))
    run.train(range(3, 9))
    assert_same(dict(average.state_dict()), frozen)
    average.update_parameters(run.model)
    average.update_parameters(run.model)
    for name, itop in itop_prune.find_masks(average).items():
        assert torch.equal(itop.mask, run.masks[name].mask)
        assert itop.mask is not run.masks[name].mask
    assert torch.isfinite(average(batch(0, 3, 8, 8)[0])).all()


# --- 7. resume -----------------------------------------------------------------------------------


def saved(run: Run) -> bytes:
    file = io.BytesIO()
    states = {
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "regrow": run.regrow.state_dict(),
    }
    torch.save(states, file)
    return file.getvalue()


def restore(run: Run, states: bytes) -> None:
    loaded = torch.load(io.BytesIO(states), weights_only=True)
    run.model.load_state_dict(loaded["model"])
    run.optimizer.load_state_dict(loaded["optimizer"])
    run.regrow.load_state_dict(loaded["regrow"])


def other_start(grow: str) -> Run:
    """The same run built from other weights and other masks: whatever is not restored shows."""
    model = mlp(seed=7)
    masks = itop_prune.apply(model, 0.7, seed=7)
    optimizer = momentum(model)
    regrow = itop_prune.MaskScheduler(masks, optimizer, total_steps=12, every=3, grow=grow)
    return Run(model, masks, optimizer, regrow, (20,))


@pytest.mark.parametrize("stop", range(1, 12))
@pytest.mark.parametrize("grow", GROWTH)
def test_a_resumed_run_gives_every_later_number_bit_for_bit(grow: str, stop: int) -> None:
    whole = sparse(optimizer=momentum, every=3, total_steps=12, grow=grow)
    whole.train(range(stop))
    states = saved(whole)
    resumed = other_start(grow)
    restore(resumed, states)
    for step in range(stop, 12):
        assert resumed.train(range(step, step + 1)) == whole.train(range(step, step + 1))
        assert_same(resumed.numbers(), whole.numbers())
    assert resumed.regrow.updates == 4


@pytest.mark.parametrize("grow", GROWTH)
def test_a_run_resumed_through_load_into_a_dense_model_is_the_same(grow: str) -> None:
    whole = sparse(optimizer=momentum, every=3, total_steps=12, grow=grow)
    whole.train(range(5))
    model = mlp(seed=7)
    masks = itop_prune.load(model, whole.model.state_dict())
    optimizer = momentum(model)
    optimizer.load_state_dict(copy.deepcopy(whole.optimizer.state_dict()))
    regrow = itop_prune.MaskScheduler(masks, optimizer, total_steps=12, every=3, grow=grow)
    regrow.load_state_dict(copy.deepcopy(whole.regrow.state_dict()))
    resumed = Run(model, masks, optimizer, regrow, (20,))
    assert resumed.train(range(5, 12)) == whole.train(range(5, 12))
    assert_same(resumed.numbers(), whole.numbers())


@pytest.mark.parametrize("grow", GROWTH)
def test_an_update_that_waits_is_made_after_a_resume_as_well(grow: str) -> None:
    whole = sparse(optimizer=momentum, every=3, total_steps=12, grow=grow)
    whole.train(range(2))
    assert not spoiled_step(
        whole, 2, lambda run: run.masks["2.weight"].parameter.grad.fill_(math.nan)
    )
    resumed = other_start(grow)
    restore(resumed, saved(whole))
    assert resumed.train(range(3, 5)) == whole.train(range(3, 5))
    assert (resumed.regrow.updates, resumed.regrow.skipped) == (1, 1)
    assert_same(resumed.numbers(), whole.numbers())


def test_states_do_not_change_while_the_run_goes_on_once_they_are_saved() -> None:
    run = sparse(every=1)
    run.train(range(2))
    first = saved(run)
    run.train(range(2, 6))
    again = sparse(every=1)
    restore(again, first)
    again.train(range(2, 6))
    assert_same(again.numbers(), run.numbers())


FRESH = """
import sys
sys.path[:0] = [{root!r}, {tests!r}, {here!r}]
import torch
from test_invariants import other_start, restore
run = other_start({grow!r})
restore(run, open({states!r}, "rb").read())
torch.save({{"losses": run.train(range(4, 12)), "numbers": run.numbers()}}, {result!r})
"""


@pytest.mark.parametrize("grow", GROWTH)
def test_a_run_resumed_in_a_fresh_process_is_the_same(grow: str, tmp_path: Path) -> None:
    whole = sparse(optimizer=momentum, every=3, total_steps=12, grow=grow)
    whole.train(range(4))
    states, result = tmp_path / "states", tmp_path / "result"
    states.write_bytes(saved(whole))
    root = Path(itop_prune.__file__).parents[1]
    places = {
        "root": str(root),
        "tests": str(Path(__file__).parents[1]),
        "here": str(Path(__file__).parent),
        "states": str(states),
        "result": str(result),
    }
    subprocess.run([sys.executable, "-c", FRESH.format(grow=grow, **places)], check=True)
    resumed = torch.load(result)
    assert resumed["losses"] == whole.train(range(4, 12))
    assert_same(resumed["numbers"], whole.numbers())


# --- 9. numbers that are not finite --------------------------------------------------------------


def spoiled_step(run: Run, step: int, spoil: Callable[[Run], object]) -> bool:
    """Take one step, with something spoiled between the optimizer's step and the scheduler's."""
    backward(run, step)
    run.optimizer.step()
    with torch.no_grad():
        spoil(run)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not finite", category=UserWarning)
        moved = run.regrow.step()
    run.optimizer.zero_grad()
    return moved


def spoilers() -> dict[str, Callable[[Run], object]]:
    found: dict[str, Callable[[Run], object]] = {}
    for name in ("0.weight", "2.weight", "4.weight"):
        for value in (math.nan, math.inf, -math.inf):
            found[f"{value} in the gradient of {name}"] = lambda run, name=name, value=value: (
                spoil_one(run.masks[name].parameter.grad, run.masks[name].mask, value)
            )
            found[f"{value} in {name}"] = lambda run, name=name, value=value: spoil_one(
                run.masks[name].parameter, run.masks[name].mask, value
            )
    return found


def spoil_one(tensor: Tensor, mask: Tensor, value: float) -> None:
    tensor[tuple(mask.nonzero()[0])] = value


SPOILERS = spoilers()


@pytest.mark.parametrize("what", SPOILERS)
@pytest.mark.parametrize("grow", GROWTH)
def test_an_update_that_meets_a_number_that_is_not_finite_moves_nothing_anywhere(
    grow: str, what: str
) -> None:
    run = sparse(grow=grow)
    run.train(range(3))
    before = {}

    def spoil(run: Run) -> None:
        SPOILERS[what](run)
        before.update(run.numbers())

    assert not spoiled_step(run, 3, spoil)
    after = run.numbers()
    counts, counts_before = after.pop("counts"), before.pop("counts")
    assert all(
        torch.equal(value.nan_to_num(), before[name].nan_to_num()) for name, value in after.items()
    )
    assert counts[1] == counts_before[1]
    assert run.regrow.skipped == 1


@pytest.mark.parametrize("grow", GROWTH)
def test_an_update_waits_until_the_next_finite_step(grow: str) -> None:
    run = sparse(grow=grow, every=4)
    moved = []
    for step in range(8):
        spoil = (
            (lambda run: run.masks["4.weight"].parameter.grad.fill_(math.inf))
            if step in (3, 4)
            else (lambda run: 0)
        )
        moved.append(spoiled_step(run, step, spoil))
    assert moved == [False, False, False, False, False, True, False, True]
    assert (run.regrow.updates, run.regrow.skipped) == (2, 2)


def test_a_dense_gradient_that_is_not_finite_off_the_mask_alone_moves_nothing() -> None:
    run = sparse(grow="gradient", every=1)
    first = run.masks["0.weight"]
    first.mask[:, 0] = (
        False  # an input that no active weight reads: the outputs do not depend on it
    )
    with torch.no_grad():
        first.parameter[:, 0] = 0.0
    twin = mlp()
    twin.load_state_dict(itop_prune.dense_state_dict(run.model))
    x, y = batch(0, 20, size=1)
    x[:, 0] = 1.0
    (1e4 * F.cross_entropy(twin(x), y)).backward()
    x[:, 0] = 2.5e38 / twin[0].weight.grad[:, 0].abs().max()
    before = {name: itop.mask.clone() for name, itop in run.masks.items()}
    for _ in range(2):  # each finite, the sum is not
        (1e4 * F.cross_entropy(run.model(x), y)).backward()
    run.optimizer.step()
    assert all(parameter.isfinite().all() for parameter in run.model.parameters())
    assert all(parameter.grad.isfinite().all() for parameter in run.model.parameters())
    with pytest.warns(UserWarning, match="not finite"):
        assert not run.regrow.step()
    assert_same({name: itop.mask for name, itop in run.masks.items()}, before)


def test_a_number_that_is_not_finite_is_warned_of_once() -> None:
    run = sparse(every=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(3):
            backward(run, step)
            run.masks["0.weight"].parameter.grad.fill_(math.nan)
            run.regrow.step()
            run.optimizer.zero_grad()
    assert [
        str(warning.message) for warning in caught if "not finite" in str(warning.message)
    ] != []
    assert len(caught) == 1
    assert run.regrow.skipped == 3


def test_a_number_that_is_not_finite_before_an_update_is_due_counts_for_nothing() -> None:
    run = sparse(every=4)
    backward(run, 0)
    run.masks["0.weight"].parameter.grad.fill_(math.nan)
    assert not run.regrow.step()
    assert run.regrow.skipped == 0


# --- 11. remove ----------------------------------------------------------------------------------


def both() -> nn.Module:
    """Two masked tensors of one layer, and layers inside of others."""
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)


REMOVALS = {
    "itop_prune.remove": itop_prune.remove,
    "prune.remove": lambda model: [
        prune.remove(layer, name.removesuffix("_mask"))
        for layer in list(model.modules())
        for name, _ in list(layer.named_buffers(recurse=False))
        if name.endswith("_mask")
    ],
}


@pytest.mark.parametrize("how", REMOVALS)
@pytest.mark.parametrize("build", [mlp, convnet, both])
def test_remove_leaves_classes_and_names_and_order_as_a_model_that_was_never_masked(
    build: Callable[[], nn.Module], how: str
) -> None:
    model, fresh = build(), build()
    itop_prune.apply(model, 0.6)
    REMOVALS[how](model)
    assert [type(layer) for layer in model.modules()] == [type(layer) for layer in fresh.modules()]
    assert [name for name, _ in model.named_parameters()] == [
        name for name, _ in fresh.named_parameters()
    ]
    assert list(model.state_dict()) == list(fresh.state_dict())
    assert repr(model) == repr(fresh)
    assert not prune.is_pruned(model)


@pytest.mark.parametrize("how", REMOVALS)
@pytest.mark.parametrize(("build", "shape"), [(mlp, (20,)), (convnet, (3, 8, 8)), (both, (3, 8))])
def test_remove_leaves_the_outputs_of_the_masked_model(
    build: Callable[[], nn.Module], shape: tuple[int, ...], how: str
) -> None:
    model, x = build().eval(), batch(0, *shape)[0]
    itop_prune.apply(model, 0.6)
    expected = model(x)
    REMOVALS[how](model)
    assert torch.equal(model(x), expected)
    assert not torch.equal(build().eval()(x), expected)


def test_apply_leaves_class_names_and_the_repr_of_the_model() -> None:
    model, fresh = convnet(), convnet()
    itop_prune.apply(model, 0.6)
    assert repr(model) == repr(fresh)
    assert all(
        isinstance(layer, type(other))
        for layer, other in zip(model.modules(), fresh.modules(), strict=True)
    )


def test_a_removed_weight_is_zero_where_its_mask_was_false_and_trains_everywhere() -> None:
    run = sparse()
    masks = {name: itop.mask.clone() for name, itop in run.masks.items()}
    itop_prune.remove(run.model)
    parameters = dict(run.model.named_parameters())
    for name, mask in masks.items():
        assert not parameters[name][~mask].any()
    x, y = batch(0, 20)
    F.cross_entropy(run.model(x), y).backward()
    assert all(parameters[name].grad[~mask].any() for name, mask in masks.items())


def test_remove_while_the_model_listens_leaves_the_plain_gradient() -> None:
    run, x = sparse(grow="gradient", every=1), batch(0, 20)[0]
    twin = mlp()
    twin.load_state_dict(itop_prune.dense_state_dict(run.model))
    itop_prune.remove(run.model)
    for model in (run.model, twin):
        model(x).square().sum().backward()
    for found, expected in zip(run.model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(found.grad, expected.grad)
