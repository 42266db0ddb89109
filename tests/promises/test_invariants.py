"""The promises that hold whatever the model, the optimizer and the criteria are: one section each.

They hold for both storages. Where positions matter, tensors of the parameter's shape are compared
in the dense shape. That all ranks hold the same numbers (8) is in test_ranks.py, torch.compile (10)
in test_compile.py.
"""

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
from helpers import sparse_run
from helpers.sparse_run import (
    Run,
    adam,
    apply,
    assert_same,
    dense,
    momentum,
    other_start,
    sparse,
)
from helpers.storages import both_storages, masks_alone, sparse_alone, sparse_if_slow
from helpers.toys import batch, convnet, mlp, train
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

import itop_prune

pytestmark = both_storages

both_ways_of_growth = pytest.mark.parametrize("grow", ["random", "gradient"])
both_optimizers = pytest.mark.parametrize("optimizer", [adam, momentum])


def channels_last() -> nn.Module:
    return convnet().to(memory_format=torch.channels_last)


def standing_still(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.0)


@dataclass
class Update:
    """One masked weight, then its statistics, just before and just after an update."""

    before: Tensor
    after: Tensor
    values_before: list[Tensor]
    values_after: list[Tensor]


def updates_of(run: Run, steps: range) -> Iterator[Update]:
    """Train, and yield what every update did to every masked weight."""
    seen: dict[str, tuple[Tensor, list[Tensor]]] = {}
    found: list[Update] = []

    def look(name: str) -> tuple[Tensor, list[Tensor]]:
        itop = run.masks[name]
        values = (itop.parameter, *run.statistics(name))
        return itop.mask.clone(), [dense(itop, value) for value in values]

    def after(step: int) -> None:
        if step + 1 in run.regrow.update_steps():
            for name in run.masks:
                mask, values = look(name)
                found.append(Update(seen[name][0], mask, seen[name][1], values))

    run.optimizer.register_step_post_hook(
        lambda *_: seen.update({name: look(name) for name in run.masks})
    )
    run.train(steps, after)
    assert found
    assert run.regrow.updates > 0
    yield from found


# --- 1. the number of active weights -------------------------------------------------------------


def assert_counts_stay(run: Run, steps: int = 40) -> None:
    """Train; the masks must move and no layer may ever have another number of active weights."""
    first, counts = run.positions(), run.counts()

    def unchanged(step: int) -> None:
        assert run.counts() == counts

    run.train(range(steps), unchanged)
    assert run.regrow.updates == len(run.regrow.update_steps())
    assert any(not torch.equal(first[name], itop.mask) for name, itop in run.masks.items())


@pytest.mark.parametrize("rate", [0.01, 0.37, 1.0])
@pytest.mark.parametrize("build", [mlp, channels_last])
@both_ways_of_growth
@sparse_if_slow
def test_an_update_never_changes_the_number_of_active_weights_of_a_layer(
    grow: str, build: Callable[[], nn.Module], rate: float
) -> None:
    assert_counts_stay(sparse(build, rate=rate, min_rate=0.01, grow=grow, every=1))


@pytest.mark.filterwarnings("ignore:the dense gradient of")
@pytest.mark.parametrize("tie", [Tensor.zero_, Tensor.sign_], ids=["all zero", "few values"])
@both_ways_of_growth
def test_counts_are_exact_where_scores_tie(grow: str, tie: Callable[[Tensor], Tensor]) -> None:
    run = sparse(optimizer=standing_still, grow=grow, every=1)
    with torch.no_grad():
        for itop in run.masks.values():
            tie(itop.parameter)
    assert_counts_stay(run)


@pytest.mark.filterwarnings("ignore:.* has fewer active weights than outputs")
def test_counts_are_exact_with_one_active_weight_in_a_layer() -> None:
    run = sparse(sparsity=1 - 3 / 560, method="uniform", every=1, grow="random", prune="random")
    assert run.counts() == {"0.weight": 1, "2.weight": 1, "4.weight": 1}
    assert_counts_stay(run)


# --- 2. what is grown, what is pruned, what stays ------------------------------------------------


@both_optimizers
@both_ways_of_growth
def test_grown_and_pruned_weights_are_zero_and_so_are_their_statistics_and_others_stay(
    grow: str, optimizer: Callable
) -> None:
    grown = had_value = 0
    for update in updates_of(sparse(channels_last, optimizer, grow=grow), range(12)):
        new, gone = update.after & ~update.before, update.before & ~update.after
        stayed = update.before & update.after
        grown += int(new.sum())
        assert len(update.values_after) >= 2
        for before, after in zip(update.values_before, update.values_after, strict=True):
            had_value += int(before[gone].count_nonzero())
            assert not after[new].any()
            assert not after[gone].any()
            assert torch.equal(before[stayed], after[stayed])
    assert grown > 0
    assert had_value > 0


def test_a_weight_pruned_and_grown_again_in_one_update_keeps_value_and_statistics() -> None:
    """All go, and all come back."""
    run = sparse(rate=1.0, min_rate=1.0, prune="magnitude", grow=lambda weight: weight.abs())
    for update in updates_of(run, range(4)):
        assert torch.equal(update.before, update.after)
        assert len(update.values_after) == 3
        for before, after in zip(update.values_before, update.values_after, strict=True):
            assert before[update.before].any()
            assert torch.equal(before, after)


class Strange(torch.optim.Optimizer):
    """Keeps what no known optimizer keeps: a statistic of its own name, rows and a number."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), {})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            state.setdefault("own", torch.zeros_like(parameter)).add_((parameter != 0) + 0.5)
            state.setdefault("rows", torch.zeros(len(parameter), 1)).add_(1.0)
            state.setdefault("number", torch.zeros(())).add_(1.0)
            parameter.sub_(0.1 * parameter.grad)


def test_statistics_are_found_by_their_shape_alone() -> None:
    run = sparse(optimizer=Strange)
    for update in updates_of(run, range(8)):
        moved = update.before ^ update.after
        assert update.values_before[1][update.before].all()
        assert not update.values_after[1][moved].any()
    for itop in run.masks.values():
        state = run.optimizer.state[itop.parameter]
        assert torch.equal(state["rows"], torch.full_like(state["rows"], 8.0))
        assert state["number"] == 8


@both_ways_of_growth
def test_a_fully_dense_layer_is_left_alone(grow: str) -> None:
    densities = {"0.weight": 0.3, "2.weight": 0.3, "4.weight": 1.0}
    run = sparse(method=lambda shapes, density: densities, sparsity=0.64, grow=grow)
    seen = 0
    for update in updates_of(run, range(8)):
        if update.before.all():
            seen += 1
            assert update.after.all()
            for before, after in zip(update.values_before, update.values_after, strict=True):
                assert torch.equal(before, after)
    assert seen == 4


# --- 3. zeros off the mask, and the same step on every step --------------------------------------


def assert_zero_off_mask(model: nn.Module) -> None:
    masks = itop_prune.find_masks(model)
    assert masks
    for itop in masks.values():
        assert not itop.used.all()
        assert not itop.parameter[~itop.used].any()


def to_sparser(seed: int = 0) -> Run:
    """A run whose density has fallen, so that in sparse storage slots are free."""
    run = sparse(seed=seed, total_steps=4, density="cubic", final_sparsity=0.8)
    run.train(range(4))
    return run


def dirty() -> dict[str, Tensor]:
    """A sparse state dict as others write it: something else than 0 off the mask."""
    state = dict(to_sparser(seed=1).model.state_dict())
    for name, tensor in state.items():
        if name.endswith(("_orig", "_values")):
            state[name] = tensor + 1
    return state


LOADS: dict[str, Callable[[nn.Module], object]] = {
    "sparse": lambda model: model.load_state_dict(dirty()),
    "dense": lambda model: model.load_state_dict(mlp(seed=1).state_dict()),
    "itop_prune.load": lambda model: itop_prune.load(model, dirty()),
    "assigned": lambda model: model.load_state_dict(dirty(), assign=True),
}


@pytest.mark.parametrize("how", LOADS)
def test_weights_off_the_mask_are_zero_after_apply_and_a_load(how: str) -> None:
    model = to_sparser().model
    assert_zero_off_mask(model)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    LOADS[how](model)
    pairs = zip(before, model.parameters(), strict=True)
    assert any(not torch.equal(old, new) for old, new in pairs)
    assert_zero_off_mask(model)


@masks_alone
def test_a_state_of_torchs_own_pruning_is_loaded_in_place_with_zeros_off_the_mask() -> None:
    model = sparse().model
    before, state = places(model), dirty()
    state |= {name: t.float() for name, t in state.items() if name.endswith("_mask")}
    model.load_state_dict(state)
    assert_zero_off_mask(model)
    assert places(model) == before


def test_weights_off_the_mask_are_zero_after_a_sparse_load_into_a_dense_model() -> None:
    model = mlp(seed=1)
    itop_prune.load(model, dirty(), storage=sparse_run.STORAGE)
    itops = itop_prune.find_masks(model).values()
    assert {itop.storage for itop in itops} == {sparse_run.STORAGE}
    assert not any(dense(itop, itop.parameter)[~itop.mask].any() for itop in itops)


@both_optimizers
@both_ways_of_growth
def test_weights_and_statistics_off_the_mask_are_zero_after_an_update(
    grow: str, optimizer: Callable
) -> None:
    for update in updates_of(sparse(optimizer=optimizer, grow=grow), range(12)):
        assert not any(value[~update.after].any() for value in update.values_after)


def steps_with_clipping(grow: str | None, micro_batches: int) -> list[list[Tensor]]:
    """Gradient norm and weights after the optimizer in three steps; the third is an update step."""
    run = sparse(optimizer=momentum, every=3, grow=grow or "random")
    seen = []
    for step in range(3):
        for micro in range(micro_batches):
            run.backward(10 * step + micro)
        norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), 0.1)
        for itop in run.masks.values():
            assert itop.parameter.grad[itop.used].any()
            assert not itop.parameter.grad[~itop.used].any()
        run.optimizer.step()
        seen.append([norm, *(p.detach().clone() for p in run.model.parameters())])
        if grow is not None:
            assert run.regrow.step() == (step == 2)
        run.optimizer.zero_grad()
    return seen


@pytest.mark.parametrize("micro_batches", [1, 2])
@both_ways_of_growth
def test_an_update_step_clips_and_steps_as_a_static_sparse_model_does(
    grow: str, micro_batches: int
) -> None:
    moving, static = (steps_with_clipping(how, micro_batches) for how in (grow, None))
    for found, expected in zip(moving, static, strict=True):
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


# --- 4. identity, storage, memory format, order --------------------------------------------------


def places(model: nn.Module) -> list[tuple[int, int, tuple[int, ...]]]:
    """Identity, memory and layout of every parameter, then of what says which are active."""
    tensors = [*model.parameters(), *(i.buffer for i in itop_prune.find_masks(model).values())]
    return [(id(tensor), tensor.data_ptr(), tensor.stride()) for tensor in tensors]


@pytest.mark.parametrize("build", [mlp, convnet, channels_last])
@both_ways_of_growth
def test_updates_keep_parameters_and_masks_in_place_and_order(
    grow: str, build: Callable[[], nn.Module]
) -> None:
    run = sparse(build, grow=grow)
    before = places(run.model)
    run.train(range(8))
    assert run.regrow.updates == 4
    assert places(run.model) == before


def test_updates_keep_parameters_and_masks_in_place_while_the_density_falls() -> None:
    run = sparse(final_sparsity=0.9, density="cubic", total_steps=8)
    before, counts = places(run.model), run.counts()
    run.train(range(8))
    assert all(itop.active < counts[name] for name, itop in run.masks.items())
    assert places(run.model) == before


@masks_alone
@pytest.mark.parametrize("build", [mlp, convnet, channels_last])
def test_apply_and_remove_keep_parameters_in_place(build: Callable[[], nn.Module]) -> None:
    model = build()
    before = places(model)
    for itop in apply(model, 0.7).values():
        assert itop.mask.stride() == itop.parameter.stride()
    assert places(model)[: len(before)] == before
    itop_prune.remove(model)
    assert places(model) == before


@sparse_alone
@pytest.mark.parametrize("build", [mlp, convnet, channels_last])
def test_apply_and_remove_put_another_parameter_in_the_place_of_each_masked_one(
    build: Callable[[], nn.Module],
) -> None:
    model = build()
    before = dict(model.named_parameters())
    frozen = next(iter(before.values())).requires_grad_(False)
    masks = apply(model, 0.7)
    stored = list(model.parameters())
    assert [parameter.requires_grad for parameter in stored] == [
        parameter is not frozen for parameter in before.values()
    ]
    for (name, old), new in zip(before.items(), stored, strict=True):
        if name not in masks:
            assert new is old
            continue
        assert new is masks[name].parameter
        assert new.shape == (1, masks[name].active)
        assert torch.equal(masks[name].weight, old * masks[name].mask)

    effective = {name: itop.weight for name, itop in masks.items()}
    strides = {name: tensor.stride() for name, tensor in before.items()}
    itop_prune.remove(model)
    after = dict(model.named_parameters())
    assert {name: tensor.stride() for name, tensor in after.items()} == strides
    assert [tensor.requires_grad for tensor in after.values()] == [
        tensor is not frozen for tensor in before.values()
    ]
    for name, tensor in after.items():
        assert (tensor is before[name]) == (name not in effective)
        assert torch.equal(tensor, effective.get(name, tensor))


def test_apply_renames_a_parameter_and_changes_no_other_name(storage: str) -> None:
    model = convnet()
    masked, suffix = {"0.weight", "3.weight", "7.weight"}, {"mask": "_orig", "sparse": "_values"}
    expected = [name + suffix[storage] * (name in masked) for name, _ in model.named_parameters()]
    apply(model, 0.7)
    assert [name for name, _ in model.named_parameters()] == expected


@pytest.mark.parametrize("how", [how for how in LOADS if how != "assigned"])
def test_loading_keeps_masks_and_parameters_in_place(how: str) -> None:
    model = sparse().model
    before = places(model)
    LOADS[how](model)
    assert places(model) == before


@masks_alone
def test_loading_a_sparse_state_into_a_dense_model_keeps_its_parameters_in_place() -> None:
    model = mlp(seed=1)
    before = places(model)
    itop_prune.load(model, dirty())
    assert places(model)[: len(before)] == before


def test_restoring_the_scheduler_keeps_masks_in_place() -> None:
    run, other = sparse(), sparse()
    other.train(range(6))
    before = places(run.model)
    run.regrow.load_state_dict(other.regrow.state_dict())
    assert places(run.model) == before
    assert_same(dict(run.regrow.explored), dict(other.regrow.explored))


# --- 5. the weight is current, whoever reads it --------------------------------------------------


def test_the_weight_is_current_without_a_forward_and_carries_a_masked_gradient() -> None:
    layer = nn.Linear(8, 4)
    itop = apply(layer, 0.5)["weight"]
    with torch.no_grad():
        layer(torch.ones(1, 8))
        itop.parameter.fill_(3.0)
    assert torch.equal(layer.weight, 3.0 * itop.mask)
    before = itop.mask.clone()
    itop.write_mask(itop.mask, ~before)
    with torch.no_grad():
        itop.parameter.fill_(2.0)
    assert torch.equal(layer.weight, 2.0 * ~before)
    layer.weight.sum().backward()
    assert torch.equal(dense(itop, itop.parameter.grad), itop.mask.float())


class Parent(nn.Module):
    """Reads the weight of its child and never calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.qkv.weight)


def test_a_parent_that_reads_the_weight_of_a_child_reads_the_current_one() -> None:
    model, x = Parent(), torch.randn(2, 8)
    itop = apply(model, 0.5)["qkv.weight"]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(x).square().sum().backward()
    optimizer.step()
    assert not dense(itop, itop.parameter.grad)[~itop.mask].any()
    assert torch.equal(model(x), x @ dense(itop, itop.parameter).T)


@pytest.mark.parametrize("training", [True, False])
def test_multihead_attention_computes_with_the_current_weights(training: bool) -> None:
    torch.manual_seed(0)
    attention, twin = (nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(2))
    masks = apply(attention, 0.5)
    assert sorted(masks) == ["in_proj_weight", "out_proj.weight"]
    x = torch.randn(2, 3, 8)

    def outputs(layer: nn.MultiheadAttention) -> Tensor:
        return layer.train(training)(x, x, x, need_weights=False)[0]

    with torch.no_grad():
        outputs(attention)
        for itop in masks.values():
            itop.write_mask(itop.mask, itop.mask.flip(0))
            itop.parameter.add_(2.0)
        twin.load_state_dict(itop_prune.dense_state_dict(attention))
        assert torch.allclose(outputs(attention), outputs(twin), atol=1e-6)
    outputs(attention).square().sum().backward()
    for itop in masks.values():
        assert itop.parameter.grad[itop.used].any()
        assert not dense(itop, itop.parameter.grad)[~itop.mask].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_dtype_of_the_weight_is_the_one_the_model_was_moved_to(dtype: torch.dtype) -> None:
    run, x = sparse(convnet), batch(0, 3, 8, 8)[0]
    model, buffers = run.model, [itop.buffer.clone() for itop in run.masks.values()]
    model(x)
    model.to(dtype)
    assert {model[i].weight.dtype for i in (0, 3, 7)} == {dtype}
    for itop, before in zip(run.masks.values(), buffers, strict=True):
        assert itop.buffer.dtype == before.dtype
        assert torch.equal(itop.buffer, before)
    assert model(x.to(dtype)).dtype == dtype


def test_functional_call_computes_with_the_parameters_it_was_given() -> None:
    run, x = sparse(), batch(0, 20)[0]
    doubled = {name: 2.0 * parameter for name, parameter in run.model.named_parameters()}
    given = torch.func.functional_call(run.model, doubled, (x,))
    run.model.load_state_dict(doubled, strict=False)
    assert torch.equal(given, run.model(x))


# torch 2.15 deprecates parts of itself while it exports.
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*", "ignore::FutureWarning:torch.*")
@both_ways_of_growth
def test_an_export_has_the_current_weights(grow: str) -> None:
    run, x = sparse(grow=grow), batch(0, 20)[0]
    run.model(x)
    run.train(range(3))  # with gradient growth the next backward collects the dense gradient
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


def between_backward_and_update(run: Run) -> None:
    run.train(range(1))
    run.backward(1)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": through_torch_save,
}
MOMENTS: dict[str, Callable[[Run], object]] = {
    "after apply": lambda run: None,
    "after a forward": lambda run: run.model(batch(0, *run.shape)[0]),
    "after a step": lambda run: run.train(range(1)),
    "after an update": lambda run: run.train(range(2)),
    "between backward and update": between_backward_and_update,
}
every_copy = pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)


@pytest.mark.parametrize("moment", MOMENTS)
@every_copy
def test_a_copy_at_any_moment_is_equal_and_independent(duplicate: Callable, moment: str) -> None:
    run = sparse(convnet, grow="gradient")
    MOMENTS[moment](run)
    other = duplicate(run.model)
    state = copy.deepcopy(dict(other.state_dict()))
    assert_same(state, dict(run.model.state_dict()))
    masks = itop_prune.find_masks(other)
    assert list(masks) == list(run.masks)
    assert any(masks["0.weight"].buffer is buffer for buffer in other[0].buffers())
    assert prune.is_pruned(other)
    assert [type(layer) for layer in other] == [type(layer) for layer in run.model]
    x = batch(0, *run.shape)[0]
    assert torch.equal(copy.deepcopy(other).eval()(x), copy.deepcopy(run.model).eval()(x))

    run.optimizer.zero_grad()
    run.train(range(2, 8))
    assert_same(dict(other.state_dict()), state)

    before, first, optimizer = run.numbers(), masks["3.weight"].mask.clone(), adam(other)
    regrow = itop_prune.MaskScheduler(masks, optimizer, total_steps=40, every=2, grow="gradient")
    optimizer.zero_grad()
    train(other, optimizer, regrow, steps=range(4), shape=run.shape)
    assert regrow.updates == 2
    assert not torch.equal(masks["3.weight"].mask, first)
    assert_same(run.numbers(), before)


@every_copy
def test_a_copy_in_the_middle_of_training_changes_nothing_in_what_comes_after(
    duplicate: Callable,
) -> None:
    watched, alone = sparse(grow="gradient"), sparse(grow="gradient")
    for step in range(6):
        other = duplicate(watched.model)
        other(batch(step + 50, 20)[0]).sum().backward()
        for itop in itop_prune.find_masks(other).values():
            assert not dense(itop, itop.parameter.grad)[~itop.mask].any()
        watched.train(range(step, step + 1))
        alone.train(range(step, step + 1))
    assert watched.regrow.updates == 3
    assert_same(watched.numbers(), alone.numbers())


@both_ways_of_growth
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


@pytest.mark.parametrize("trained", [0, 3])
def test_an_averaged_model_of_torch_has_the_masks_of_the_model_and_is_independent(
    trained: int,
) -> None:
    run = sparse(convnet)
    run.train(range(trained))
    averaging = torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    average = torch.optim.swa_utils.AveragedModel(run.model, multi_avg_fn=averaging)
    frozen = copy.deepcopy(dict(average.state_dict()))
    run.train(range(3, 9))
    assert_same(dict(average.state_dict()), frozen)
    for _ in range(2):
        average.update_parameters(run.model)
    for name, itop in itop_prune.find_masks(average).items():
        assert torch.equal(itop.mask, run.masks[name].mask)
        assert itop.buffer is not run.masks[name].buffer
    assert torch.isfinite(average(batch(0, 3, 8, 8)[0])).all()


# --- 7. resume -----------------------------------------------------------------------------------

TWELVE = {"every": 3, "total_steps": 12}


@pytest.mark.parametrize("stop", range(1, 12))
@both_ways_of_growth
def test_a_resumed_run_gives_every_later_number_bit_for_bit(grow: str, stop: int) -> None:
    whole = sparse(optimizer=momentum, grow=grow, **TWELVE)
    whole.train(range(stop))
    states, resumed = whole.saved(), other_start(grow=grow, **TWELVE)
    resumed.restore(states)
    for step in range(stop, 12):
        assert resumed.train(range(step, step + 1)) == whole.train(range(step, step + 1))
        assert_same(resumed.numbers(), whole.numbers())
    assert resumed.regrow.updates == 4
    again = other_start(grow=grow, **TWELVE)  # what was saved did not change while the run went on
    again.restore(states)
    again.train(range(stop, 12))
    assert_same(again.numbers(), whole.numbers())


@both_ways_of_growth
def test_a_run_resumed_through_load_into_a_dense_model_is_the_same(grow: str) -> None:
    whole = sparse(optimizer=momentum, grow=grow, **TWELVE)
    whole.train(range(5))
    model = mlp(seed=7)
    masks = itop_prune.load(model, whole.model.state_dict(), storage=sparse_run.STORAGE)
    optimizer = momentum(model)
    regrow = itop_prune.MaskScheduler(masks, optimizer, grow=grow, **TWELVE)
    resumed = Run(model, masks, optimizer, regrow, (20,))
    optimizer.load_state_dict(copy.deepcopy(whole.optimizer.state_dict()))
    regrow.load_state_dict(whole.regrow.state_dict())
    assert resumed.train(range(5, 12)) == whole.train(range(5, 12))
    assert_same(resumed.numbers(), whole.numbers())


@sparse_alone
def test_a_run_resumed_after_layers_grew_beyond_their_slots_is_the_same() -> None:
    rules = {"redistribute": "momentum", "grow": "momentum", "rate": 1.0, **TWELVE}
    whole, resumed = sparse(optimizer=momentum, **rules), other_start(**rules)
    whole.train(range(8))
    slots = {name: itop.parameter.shape for name, itop in resumed.masks.items()}
    assert any(itop.parameter.shape > slots[name] for name, itop in whole.masks.items())
    parameters = list(map(id, resumed.model.parameters()))
    resumed.restore(whole.saved())
    assert resumed.train(range(8, 12)) == whole.train(range(8, 12))
    assert_same(resumed.numbers(), whole.numbers())
    assert list(map(id, resumed.model.parameters())) == parameters


@both_ways_of_growth
def test_an_update_that_waits_is_made_after_a_resume_as_well(grow: str) -> None:
    whole = sparse(optimizer=momentum, grow=grow, **TWELVE)
    whole.train(range(2))
    assert not spoiled_step(whole, 2, lambda run: gradient(run, "2.weight").fill_(math.nan))
    resumed = other_start(grow=grow, **TWELVE)
    resumed.restore(whole.saved())
    assert resumed.train(range(3, 5)) == whole.train(range(3, 5))
    assert (resumed.regrow.updates, resumed.regrow.skipped) == (1, 1)
    assert_same(resumed.numbers(), whole.numbers())


FRESH = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import torch
from helpers import sparse_run
sparse_run.STORAGE = {storage!r}
run = sparse_run.other_start(grow="gradient", every=3, total_steps=12)
run.restore(open({states!r}, "rb").read())
torch.save({{"losses": run.train(range(4, 12)), "numbers": run.numbers()}}, {result!r})
"""


@pytest.mark.slow
def test_a_run_resumed_in_a_fresh_process_is_the_same(tmp_path: Path, storage: str) -> None:
    whole = sparse(optimizer=momentum, grow="gradient", **TWELVE)
    whole.train(range(4))
    (tmp_path / "states").write_bytes(whole.saved())
    tests = Path(__file__).parents[1]
    places = {"root": str(tests.parent), "tests": str(tests), "storage": storage}
    places |= {name: str(tmp_path / name) for name in ("states", "result")}
    subprocess.run([sys.executable, "-c", FRESH.format(**places)], check=True)
    resumed = torch.load(tmp_path / "result")
    assert resumed["losses"] == whole.train(range(4, 12))
    assert_same(resumed["numbers"], whole.numbers())


# --- 9. numbers that are not finite --------------------------------------------------------------


def gradient(run: Run, name: str) -> Tensor:
    return run.masks[name].parameter.grad


def spoiled_step(run: Run, step: int, spoil: Callable[[Run], object] = lambda run: None) -> bool:
    """Take one step, with something spoiled between the optimizer's step and the scheduler's."""
    run.backward(step)
    run.optimizer.step()
    with torch.no_grad():
        spoil(run)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not finite", category=UserWarning)
        moved = run.regrow.step()
    run.optimizer.zero_grad()
    return moved


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["gradient", "weight"])
@both_ways_of_growth
def test_an_update_that_meets_a_number_that_is_not_finite_moves_nothing_anywhere(
    grow: str, where: str, value: float
) -> None:
    for name in ("0.weight", "2.weight", "4.weight"):
        run, before = sparse(grow=grow), {}
        run.train(range(3))

        def spoil(run: Run, name: str = name, before: dict = before) -> None:
            itop = run.masks[name]
            tensor = itop.parameter if where == "weight" else itop.parameter.grad
            tensor[tuple(itop.used.nonzero()[0])] = value
            before |= run.numbers()

        assert not spoiled_step(run, 3, spoil)
        after = run.numbers()
        assert after.pop("counts")[1] == before.pop("counts")[1]
        for key, tensor in after.items():
            assert torch.equal(tensor.nan_to_num(), before[key].nan_to_num())
        assert run.regrow.skipped == 1


@both_ways_of_growth
def test_an_update_waits_until_the_next_finite_step(grow: str) -> None:
    run, moved = sparse(grow=grow, every=4), []
    for step in range(8):
        value = math.inf if step in (0, 3, 4) else 1.0  # at step 0 no update is due
        moved.append(
            spoiled_step(run, step, lambda run, value=value: gradient(run, "4.weight").mul_(value))
        )
    assert moved == [False] * 5 + [True, False, True]
    assert (run.regrow.updates, run.regrow.skipped) == (2, 2)


def test_a_dense_gradient_that_is_not_finite_off_the_mask_alone_moves_nothing() -> None:
    """The sum of two micro-batches, each finite, for an input that no active weight reads."""
    run = sparse(grow="gradient", every=1)
    first = run.masks["0.weight"]
    mask = first.mask.clone()
    mask[:, 0] = False
    first.write_mask(first.mask, mask)
    twin = mlp()
    twin.load_state_dict(itop_prune.dense_state_dict(run.model))
    x, y = batch(0, 20, size=1)
    x[:, 0] = 1.0
    (1e4 * F.cross_entropy(twin(x), y)).backward()
    x[:, 0] = 2.5e38 / twin[0].weight.grad[:, 0].abs().max()
    before = run.positions()
    for _ in range(2):
        (1e4 * F.cross_entropy(run.model(x), y)).backward()
    run.optimizer.step()
    assert all(parameter.isfinite().all() for parameter in run.model.parameters())
    assert all(parameter.grad.isfinite().all() for parameter in run.model.parameters())
    with pytest.warns(UserWarning, match="not finite"):
        assert not run.regrow.step()
    assert_same(run.positions(), before)


def test_a_number_that_is_not_finite_is_warned_of_once() -> None:
    run = sparse(every=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(3):
            run.backward(step)
            gradient(run, "0.weight").fill_(math.nan)
            run.regrow.step()
            run.optimizer.zero_grad()
    assert ["not finite" in str(warning.message) for warning in caught] == [True]
    assert run.regrow.skipped == 3


# --- 11. remove ----------------------------------------------------------------------------------


def encoder() -> nn.Module:
    """Two masked tensors of one layer, and layers inside of others."""
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)


def remove_by_torch(model: nn.Module) -> None:
    for layer in list(model.modules()):
        for name, _ in list(layer.named_buffers(recurse=False)):
            if name.endswith(("_mask", "_positions")):
                prune.remove(layer, name.rpartition("_")[0])


@pytest.mark.usefixtures("without_kernels")
@pytest.mark.parametrize("remove", [itop_prune.remove, remove_by_torch])
@pytest.mark.parametrize(
    ("build", "shape"), [(mlp, (20,)), (convnet, (3, 8, 8)), (encoder, (3, 8))]
)
def test_remove_leaves_names_order_classes_and_outputs_as_a_masked_dense_model_has_them(
    build: Callable[[], nn.Module], shape: tuple[int, ...], remove: Callable[[nn.Module], None]
) -> None:
    model, fresh, x = build().eval(), build().eval(), batch(0, *shape)[0]
    apply(model, 0.6)
    assert repr(model) == repr(fresh)
    pairs = zip(model.modules(), fresh.modules(), strict=True)
    assert all(isinstance(layer, type(other)) for layer, other in pairs)

    expected = model(x)
    remove(model)
    assert [type(layer) for layer in model.modules()] == [type(layer) for layer in fresh.modules()]
    names = [name for name, _ in fresh.named_parameters()]
    assert [name for name, _ in model.named_parameters()] == names
    assert list(model.state_dict()) == list(fresh.state_dict())
    assert repr(model) == repr(fresh)
    assert not prune.is_pruned(model)
    assert torch.equal(model(x), expected)
    assert not torch.equal(fresh(x), expected)


def test_a_removed_weight_is_zero_where_its_mask_was_false_and_trains_everywhere() -> None:
    """Also where the backward of the next update was to collect the dense gradient."""
    run = sparse(grow="gradient", every=1)
    masks, twin = run.positions(), mlp()
    twin.load_state_dict(itop_prune.dense_state_dict(run.model))
    itop_prune.remove(run.model)
    parameters = dict(run.model.named_parameters())
    assert not any(parameters[name][~mask].any() for name, mask in masks.items())
    x = batch(0, 20)[0]
    for model in (run.model, twin):
        model(x).square().sum().backward()
    for found, expected in zip(run.model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(found.grad, expected.grad)
    assert all(parameters[name].grad[~mask].any() for name, mask in masks.items())
