"""`MaskScheduler`: when masks move, by which algorithm, what makes it wait, warn or refuse."""

import copy
import functools
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.ids import as_text
from helpers.sparse_run import Run, adam, assert_same, momentum, sparse
from helpers.toys import batch, convnet, mlp
from itop_prune_tools.benchmarks.measure import peak_bytes
from torch import Tensor, nn
from torch.nn import functional as F

import itop_prune
from itop_prune import ITOP, MaskScheduler, topology
from itop_prune.update.saved_state import SAVED

NAMES = ["0.weight", "2.weight", "4.weight"]  # of `mlp`
growths = pytest.mark.parametrize("grow", ["random", "gradient"])


def run_of(**options: Any) -> Run:
    """An `mlp` at 60 % in every layer, with an update after every second of 12 steps."""
    options = {"sparsity": 0.6, "method": "uniform", "optimizer": momentum, **options}
    return sparse(**{"total_steps": 12, **options})


def moved(run: Run, before: dict[str, Tensor]) -> list[str]:
    return [name for name, itop in run.masks.items() if not torch.equal(itop.mask, before[name])]


def where_never(explored: Tensor) -> Tensor:
    """Growth where nothing was ever active: what is pruned stays out."""
    return (~explored).float()


def all_warnings(call: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in caught]


# --- when ----------------------------------------------------------------------------------------


def test_step_tells_when_masks_moved_and_updates_are_counted() -> None:
    run, answers = run_of(total_steps=8, every=3), []
    for step in range(10):
        run.backward(step)
        run.optimizer.step()
        before = run.positions()
        answers.append(run.regrow.step())
        assert moved(run, before) == (NAMES if answers[-1] else [])
        run.optimizer.zero_grad()
    assert [step for step, answer in enumerate(answers, start=1) if answer] == [3, 6]
    assert list(run.regrow.update_steps()) == [3, 6]
    assert (run.regrow.updates, run.regrow.skipped) == (2, 0)


@pytest.mark.parametrize(
    ("options", "last"), [({"every": 1500}, "12"), ({"every": 6, "stop": 0.25}, "3")]
)
def test_masks_that_will_never_move_are_announced(options: dict[str, Any], last: str) -> None:
    found = f"every is {options['every']} and the last update could be at step {last}: none is made"
    with pytest.warns(UserWarning, match=f"^{found}, the masks never move; lower every") as warned:
        run = run_of(**options)
    assert [Path(warning.filename).name for warning in warned] == ["sparse_run.py"]
    run.train(range(12))
    assert run.regrow.updates == 0


def test_past_the_last_update_steps_are_counted_and_gradients_may_be_gone() -> None:
    run = run_of(total_steps=2)
    run.train(range(2))
    before = run.positions()
    assert [run.regrow.step() for _ in range(5)] == [False] * 5
    assert moved(run, before) == []
    assert run.regrow.rate == pytest.approx(0.005)


# --- how many and which --------------------------------------------------------------------------


def test_an_update_is_made_by_prune_and_regrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The masks follow whatever the documented algorithm answers."""
    asked: list[tuple[int, int]] = []

    def shift(
        mask: Tensor, prune: Tensor, grow: Any, n_prune: int, n_grow: int, generator: Any
    ) -> Tensor:
        asked.append((n_prune, n_grow))
        return mask.roll(1, 0)

    monkeypatch.setattr(topology, "prune_and_regrow", shift)
    run = run_of(rate=0.3, schedule="constant")
    before = run.positions()
    run.train(range(2))
    expected = [math.ceil(0.3 * int(mask.sum())) for mask in before.values()]
    assert asked == [(count, count) for count in expected]
    for name, itop in run.masks.items():
        assert torch.equal(itop.mask, before[name].roll(1, 0))
        assert not itop.parameter[~(before[name] & itop.mask)].any()


def test_the_share_that_leaves_is_rounded_up_and_the_smallest_leave() -> None:
    run = run_of(rate=0.3, schedule="constant", total_steps=1, every=1, grow=where_never)
    run.backward(0)
    run.optimizer.step()
    before = run.positions()
    sizes = {name: itop.parameter.detach().abs().clone() for name, itop in run.masks.items()}
    run.regrow.step()
    for name, itop in run.masks.items():
        left, kept = before[name] & ~itop.mask, before[name] & itop.mask
        assert int(left.sum()) == math.ceil(0.3 * int(before[name].sum()))
        assert int(itop.mask.sum()) == int(before[name].sum())
        assert sizes[name][left].max() <= sizes[name][kept].min()


def test_growth_by_gradient_takes_the_largest_dense_gradients() -> None:
    run, twin = run_of(total_steps=1, every=1, rate=0.2, grow="gradient"), mlp()
    twin.load_state_dict(itop_prune.dense_state_dict(run.model))
    x, y = batch(0, 20)
    F.cross_entropy(twin(x), y).backward()
    run.backward(0)
    run.optimizer.step()
    before = run.positions()
    run.regrow.step()
    for name, itop in run.masks.items():
        gradient = twin.get_parameter(name).grad.abs()
        grown, never = itop.mask & ~before[name], ~itop.mask & ~before[name]
        assert grown.any()
        assert gradient[grown].min() >= gradient[never].max()


def test_own_functions_prune_and_grow() -> None:
    def first(weight: Tensor) -> Tensor:
        return torch.arange(weight.numel()).view_as(weight)

    def last(mask: Tensor, sign: float = 1.0) -> Tensor:
        return sign * torch.arange(mask.numel()).view_as(mask)

    for grow, expected in ((last, "00110011"), (functools.partial(last, sign=-1.0), "11110000")):
        layer = nn.Linear(8, 1, bias=False)
        itop = ITOP.apply(layer, "weight", torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0]]))
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        options = {"total_steps": 1, "every": 1, "rate": 0.5, "schedule": "constant"}
        regrow = MaskScheduler({"weight": itop}, optimizer, prune=first, grow=grow, **options)
        layer(torch.ones(1, 8)).sum().backward()
        assert regrow.step()
        assert "".join(str(int(bit)) for bit in itop.mask[0]) == expected


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_counts_are_planned_before_any_tensor_moves(scope: str) -> None:
    """The redistribution is asked last. If it fails, nothing has changed."""
    started: list[bool] = []

    def fails(active: dict[str, int]) -> dict[str, float]:
        assert_same(run.numbers(), before)
        started.append(True)
        return {}

    options = {"redistribute": fails, "scope": scope, "grow": "gradient"}
    run = run_of(every=3, schedule="constant", **options)
    run.train(range(2))
    run.backward(2)
    run.optimizer.step()
    before = run.numbers()
    with pytest.raises(ValueError, match=r"fails gave .*; it must give a number from 0 for every"):
        run.regrow.step()
    assert_same(run.numbers(), before)
    assert started == [True]


# --- what an update writes -----------------------------------------------------------------------


@growths
@pytest.mark.parametrize("optimizer", [momentum, adam])
def test_what_grows_is_exactly_zero_and_what_stays_is_kept(grow: str, optimizer: Callable) -> None:
    """Off the mask everything is 7 before the update, as after dense training."""
    run = run_of(optimizer=optimizer, grow=grow, every=3)
    run.train(range(2))
    run.backward(2)
    run.optimizer.step()
    masks, tensors = run.positions(), {}
    for name, itop in run.masks.items():
        tensors[name] = [itop.parameter.data, *run.statistics(name)]
        for tensor in tensors[name]:
            tensor[~itop.mask] = 7.0
    before = {name: [tensor.clone() for tensor in each] for name, each in tensors.items()}
    assert run.regrow.step()
    for name, itop in run.masks.items():
        stayed = masks[name] & itop.mask
        assert (itop.mask & ~masks[name]).any()
        assert len(tensors[name]) == (3 if optimizer is adam else 2)
        for old, new in zip(before[name], tensors[name], strict=True):
            assert torch.equal(new[stayed], old[stayed])
            assert not new[~stayed].any()


def test_a_weight_pruned_and_grown_again_keeps_value_and_statistics() -> None:
    """All active weights are pruned and grow first again: nothing may change at all."""
    run = run_of(every=3, rate=1.0, schedule="constant", grow=lambda explored: explored.float())
    run.train(range(2))
    run.backward(2)
    run.optimizer.step()
    before = run.numbers()
    assert run.regrow.step()
    after = run.numbers()
    del before["counts"], after["counts"]
    assert_same(after, before)


@growths
def test_frozen_weights_never_move_and_all_may_be_frozen(grow: str) -> None:
    for frozen in ([2], [0, 2, 4]):
        model = mlp()
        for index in frozen:
            model[index].weight.requires_grad_(False)
        run = run_of(build=lambda model=model: model, grow=grow)
        before = run.positions()
        run.train(range(6))
        assert moved(run, before) == [n for n in NAMES if int(n.split(".")[0]) not in frozen]


def test_only_the_masks_that_are_passed_move_and_count() -> None:
    run = run_of(sparsity=0.5)
    passed = {"2.weight": run.masks["2.weight"]}
    run.regrow = MaskScheduler(passed, run.optimizer, total_steps=4, every=2)
    assert run.regrow.exploration_rate() == 0.5
    before = run.positions()
    run.train(range(4))
    assert moved(run, before) == list(run.regrow.explored) == ["2.weight"]


@growths
def test_a_channels_last_model_moves_as_a_contiguous_one(grow: str) -> None:
    runs = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model = convnet().to(memory_format=memory_format)
        runs.append(run_of(build=lambda model=model: model, grow=grow, every=1))
    for run in runs:
        for name, itop in run.masks.items():
            draw = torch.Generator().manual_seed(len(name))
            layer = run.model.get_submodule(name.removesuffix(".weight"))
            (layer.weight * torch.randn(itop.mask.shape, generator=draw)).sum().backward()
        assert run.regrow.step()
    assert_same(runs[0].positions(), runs[1].positions())
    assert runs[1].masks["3.weight"].mask.is_contiguous(memory_format=torch.channels_last)


def test_an_update_takes_at_most_four_tensors_of_the_largest_layer() -> None:
    """However many layers there are; in float32, beside what training itself holds."""
    size = 400
    for options in ({"grow": "random"}, {"grow": "gradient"}, {"prune": "taylor"}):
        build = functools.partial(nn.Sequential, *(nn.Linear(size, size) for _ in range(8)))
        run = run_of(build=build, sparsity=0.9, every=1, **options)
        run.model(torch.randn(3, size)).square().sum().backward()
        run.optimizer.step()
        peak = peak_bytes(run.regrow.step)
        assert run.regrow.updates == 1
        assert peak < 4 * (4 * size * size), options


# --- random draws --------------------------------------------------------------------------------


@growths
def test_the_seed_decides_and_the_global_generator_is_untouched(grow: str) -> None:
    state = torch.get_rng_state()
    first, second, other = (run_of(grow=grow, prune="random") for _ in range(3))
    other.regrow = MaskScheduler(
        other.masks, other.optimizer, total_steps=12, every=2, grow=grow, prune="random", seed=4
    )
    torch.set_rng_state(state)
    for run in (first, second, other):
        run.train(range(6))
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(first.numbers(), second.numbers())
    assert moved(first, other.positions()) == NAMES


def test_updates_layers_and_criteria_draw_differently() -> None:
    drawn: list[float] = []

    def watch(mask: Tensor, generator: torch.Generator) -> Tensor:
        scores = torch.rand(mask.shape, generator=generator)
        drawn.append(scores[0, 0].item())
        return scores

    run_of(prune=watch, grow=watch, every=1).train(range(3))
    assert len(set(drawn)) == 2 * 3 * 3


# --- numbers that are not finite -----------------------------------------------------------------


def poison_gradient(run: Run, value: float) -> None:
    itop = run.masks["2.weight"]
    itop.parameter.grad[tuple(itop.mask.nonzero()[0])] = value


def poison_weight(run: Run, value: float) -> None:
    itop = run.masks["2.weight"]
    with torch.no_grad():
        itop.parameter[tuple(itop.mask.nonzero()[0])] = value


def waiting(poison: Callable = poison_gradient, value: float = math.nan, **options: Any) -> Run:
    """A run whose first update, due after step 2, has met a bad number and waits."""
    run = run_of(**options)
    run.train(range(1))
    run.backward(1)
    run.optimizer.step()
    poison(run, value)
    before = {name: tensor.nan_to_num() for name, tensor in run.numbers().items()}
    message = "a gradient or masked weight is not finite at step 2: the update waits"
    with pytest.warns(UserWarning, match=message) as caught:
        assert not run.regrow.step()
    assert caught[0].filename == __file__
    after = {name: tensor.nan_to_num() for name, tensor in run.numbers().items()}
    del before["counts"], after["counts"]
    assert_same(after, before)
    run.optimizer.zero_grad()
    return run


@growths
@pytest.mark.parametrize("poison", [poison_gradient, poison_weight])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_bad_number_moves_nothing_and_the_update_is_made_at_the_next_finite_step(
    poison: Callable, value: float, grow: str
) -> None:
    run = waiting(poison, value, grow=grow)
    poison_weight(run, 0.1)
    before = run.positions()
    run.backward(2)
    assert run.regrow.step()
    assert moved(run, before) == NAMES
    assert (run.regrow.updates, run.regrow.skipped) == (1, 1)


def test_an_update_that_waited_uses_the_gradient_of_the_finite_step_and_keeps_the_timetable() -> (
    None
):
    seen: list[Tensor] = []

    def spy(grad: Tensor) -> Tensor:
        seen.append(grad.clone())
        return grad.abs()

    run, twin, made = waiting(grow=spy), mlp(), []
    twin.load_state_dict(itop_prune.dense_state_dict(run.model))
    x, y = batch(2, 20)
    F.cross_entropy(twin(x), y).backward()
    for step in range(2, 8):
        run.backward(step)
        made.append(run.regrow.step())
        run.optimizer.zero_grad()
    torch.testing.assert_close(seen[0], twin[0].weight.grad)
    assert made == [True, True, False, True, False, True]


def test_an_update_that_waits_is_made_past_the_end_and_by_a_run_that_plans_none() -> None:
    run, other = waiting(total_steps=2), run_of(every=12)
    other.restore(run.saved())
    for each in (run, other):
        before = each.positions()
        each.train(range(2, 3))
        assert moved(each, before) == NAMES


def test_bad_numbers_count_at_every_step_of_a_due_update_and_at_no_other() -> None:
    run = waiting()
    for _ in range(2):
        run.backward(2)
        poison_gradient(run, math.inf)
        assert not run.regrow.step()  # without another warning
    assert run.regrow.skipped == 3

    early = run_of(every=5)
    early.backward(0)
    poison_gradient(early, math.nan)
    assert not early.regrow.step()
    assert early.regrow.skipped == 0


# --- order and warnings --------------------------------------------------------------------------

ORDER = r"loss\.backward\(\), optimizer\.step\(\), step\(\) of the MaskScheduler, .*zero_grad\(\)"


@pytest.mark.parametrize("every", [1, 5], ids=["an update is due", "the first step"])
def test_cleared_gradients_raise_and_the_step_is_not_counted(every: int) -> None:
    run = run_of(every=every)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=ORDER):
            run.regrow.step()
    state = run.regrow.state_dict()
    assert (state["step"], state["due"]) == (0, False)
    run.backward(0)
    assert run.regrow.step() is (every == 1)


def test_gradients_cleared_to_zeros_are_noticed_once() -> None:
    run = run_of()

    def wrong_order() -> None:
        run.backward(0)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=False)
        run.regrow.step()

    wrong_order()
    with pytest.warns(UserWarning, match=rf"were they cleared before\? The order is {ORDER}"):
        wrong_order()
    wrong_order()
    wrong_order()


class Unused(nn.Module):
    """Its old head takes part on request only."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.old_head, self.head = nn.Linear(20, 16), nn.Linear(16, 4), nn.Linear(16, 4)

    def forward(self, x: Tensor, old: bool = False) -> Tensor:
        return (self.old_head if old else self.head)(self.used(x))


@growths
def test_a_layer_without_gradient_is_reported_once_and_the_others_move(grow: str) -> None:
    run = run_of(build=Unused, grow=grow)
    before = run.positions()
    found = all_warnings(lambda: run.train(range(8)))
    assert [message.partition(" since")[0] for message in found] == [
        "old_head.weight got no gradient"
    ]
    assert moved(run, before) == ["used.weight", "head.weight"]


@pytest.mark.parametrize("resume", [False, True])
def test_a_gradient_at_any_step_since_the_last_update_is_enough(resume: bool) -> None:
    run = run_of(build=Unused)
    run.model(batch(0, 20)[0], old=True).sum().backward()
    run.regrow.step()
    if resume:
        state = run.regrow.state_dict()
        run = run_of(build=Unused)
        run.regrow.load_state_dict(state)
    run.optimizer.zero_grad()
    run.backward(1)
    assert run.regrow.step()  # warnings are errors here

    run.optimizer.zero_grad()
    run.train(range(2, 3))
    with pytest.warns(UserWarning, match=r"old_head\.weight got no gradient since the last update"):
        run.train(range(3, 4))


class Blocked(nn.Module):
    """Its first layer's gradient is 0: what follows multiplies by 0."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(20, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x) * 0.0 + x[:, :16])


def test_a_dense_gradient_of_zero_is_reported_only_if_growth_needs_it() -> None:
    (message,) = all_warnings(lambda: run_of(build=Blocked, grow="gradient").train(range(8)))
    assert message.startswith("the dense gradient of body.weight is 0 everywhere at step 2")
    assert all_warnings(lambda: run_of(build=Blocked).train(range(8))) == []


@pytest.mark.parametrize(
    ("layer", "outputs"),
    [(nn.Linear(20, 16), 16), (nn.ConvTranspose2d(20, 8, 1, groups=2), 8)],
    ids=str,
)
def test_fewer_active_weights_than_outputs_are_reported_once(
    layer: nn.Module, outputs: int
) -> None:
    sparsity = 1.0 - 5.2 / layer.weight.numel()
    run = run_of(build=lambda: nn.Sequential(layer), sparsity=sparsity, every=1)
    x = torch.randn(3, 20) if isinstance(layer, nn.Linear) else torch.randn(3, 20, 2, 2)

    def train() -> None:
        for _ in range(3):
            run.model(x).square().sum().backward()
            run.regrow.step()

    (message,) = all_warnings(train)
    assert message.startswith(f"0.weight has fewer active weights than outputs, 5 and {outputs}")


def heads(**options: Any) -> tuple[Run, Callable[[int], None]]:
    """Two layers; a step takes the one of its number."""
    build = functools.partial(nn.ModuleList, [nn.Linear(8, 8), nn.Linear(8, 8)])
    run = run_of(build=build, sparsity=0.5, **options)

    def step(number: int) -> None:
        run.model[number](torch.ones(1, 8)).square().sum().backward()
        run.optimizer.step()
        run.regrow.step()
        run.optimizer.zero_grad()

    return run, step


def test_a_layer_that_three_updates_in_a_row_miss_is_reported() -> None:
    run, step = heads(total_steps=20)
    for number in (0, 1, 0, 1, 1, 0, 1, 0, 1):  # two updates miss the first layer, two the second
        step(number)
    message = r"^1\.weight got no gradient at step 10 and the updates before it, though"
    with pytest.warns(UserWarning, match=message):
        step(0)
    entered = run.regrow.entered()
    assert entered["0.weight"] > 0
    assert entered["1.weight"] == 0


def test_a_final_sparsity_that_a_layer_misses_is_reported() -> None:
    run, step = heads(total_steps=8, every=4, density="cubic", final_sparsity=0.75)
    all_warnings(lambda: [step(number) for number in (0, 1, 0, 0, 0, 0, 1)])
    message = r"the final sparsity is missed: .* step 8, and stay as they are: 1\.weight"
    with pytest.warns(UserWarning, match=message):
        step(0)
    assert run.counts() == {"0.weight": 16, "1.weight": 32}


@pytest.mark.filterwarnings("ignore:the dense gradient of")
def test_gradients_set_by_hand_are_reported_once_and_the_update_waits() -> None:
    run = run_of(grow="gradient")

    def step() -> bool:
        for parameter in run.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        run.optimizer.step()
        return run.regrow.step()

    step()
    assert not step()
    message = r"an update is due at step 3, and waits: .* no dense gradient was seen"
    with pytest.warns(UserWarning, match=message):
        assert not step()
    assert not step()
    run.optimizer.zero_grad()
    run.backward(0)
    assert run.regrow.step()


def test_a_scheduler_built_between_backward_and_its_first_update_says_nothing() -> None:
    run = run_of()
    run.backward(0)
    options = {"total_steps": 9, "every": 1, "grow": "gradient"}
    assert not MaskScheduler(run.masks, run.optimizer, **options).step()


# --- states --------------------------------------------------------------------------------------


@growths
def test_a_resume_with_an_update_that_waits_is_bit_exact(grow: str) -> None:
    run, other = waiting(grow=grow), run_of(build=lambda: mlp(seed=9), seed=9, grow=grow)
    other.restore(run.saved())
    assert other.regrow.entered() == run.regrow.entered()
    losses = [each.train(range(2, 7)) for each in (run, other)]
    assert losses[0] == losses[1]
    assert_same(other.numbers(), run.numbers())
    assert (other.regrow.updates, other.regrow.skipped) == (3, 1)


def test_a_state_holds_what_it_needs_and_does_not_change_when_training_goes_on() -> None:
    run = run_of(every=1, grow="momentum", gradient_steps=1, survival=True)
    run.train(range(2))
    state = run.regrow.state_dict()
    assert set(SAVED) <= state.keys()
    before = copy.deepcopy(state)
    run.train(range(2, 5))
    for name, explored in before["explored"].items():
        assert torch.equal(state["explored"][name], explored)
        assert torch.equal(state["dense"]["averages"][name], before["dense"]["averages"][name])
        assert torch.equal(state["survival"]["grown"][name], before["survival"]["grown"][name])
    assert run.regrow.state_dict()["updates"] == 5


@pytest.mark.parametrize("lacking", [*SAVED, "a mask"])
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(lacking: str) -> None:
    run, other = run_of(), run_of()
    run.train(range(4))
    before, state = other.numbers(), run.regrow.state_dict()
    message = f"the state lacks {lacking}; give what a MaskScheduler's state_dict"
    if lacking in state:
        del state[lacking]
    else:
        del state["shapes"]["2.weight"]
        message = r"saved for other masks; different are: 2\.weight"
    with pytest.raises(ValueError, match=message):
        other.regrow.load_state_dict(state)
    assert_same(other.numbers(), before)


# --- several schedulers --------------------------------------------------------------------------


def second(run: Run, names: list[str] = NAMES, **rules: Any) -> Run:
    """The same model, and another scheduler for its masks."""
    masks = {name: run.masks[name] for name in names}
    regrow = MaskScheduler(masks, run.optimizer, total_steps=12, every=2, **rules)
    return Run(run.model, run.masks, run.optimizer, regrow, run.shape)


@growths
@pytest.mark.parametrize("shared", [NAMES, NAMES[1:2]], ids=["all", "one"])
def test_two_schedulers_that_take_turns_with_a_mask_are_refused(
    grow: str, shared: list[str]
) -> None:
    run = run_of(grow=grow)
    other = second(run, shared, grow=grow)
    run.train(range(1))
    other.train(range(1, 2))
    message = rf"another MaskScheduler has stepped with {', '.join(shared)} since .*step only one"
    with pytest.raises(RuntimeError, match=message):
        run.train(range(2, 3))
    other.train(range(2, 4))
    assert other.regrow.updates == 1


@growths
def test_a_new_scheduler_takes_over_and_the_old_one_again_with_its_state(grow: str) -> None:
    run = run_of(grow=grow)
    run.train(range(3))
    other = second(run, grow=grow)
    other.regrow.load_state_dict(run.regrow.state_dict())
    other.train(range(3, 6))
    assert other.regrow.updates == 3
    run.regrow.load_state_dict(other.regrow.state_dict())
    run.train(range(6, 12))
    assert run.regrow.updates == 6


@growths
def test_a_run_goes_on_beside_its_copy(grow: str) -> None:
    run = run_of(grow=grow)
    run.train(range(3))
    other = copy.deepcopy(run)
    for step in range(3, 6):
        run.train(range(step, step + 1))
        other.train(range(step, step + 1))
    assert_same(run.numbers(), other.numbers())


@growths
def test_two_schedulers_move_two_parts_of_a_model(grow: str) -> None:
    run = run_of()
    one, two = second(run, NAMES[:1], grow=grow), second(run, NAMES[1:], grow=grow)
    for step in range(4):
        run.backward(step)
        run.optimizer.step()
        assert one.regrow.step() == two.regrow.step() == (step % 2 == 1)
        run.optimizer.zero_grad()


def test_a_mask_loaded_before_the_first_update_counts_as_explored() -> None:
    run, other = run_of(every=1), run_of(seed=1)
    run.model.load_state_dict(other.model.state_dict())
    loaded = run.positions()
    run.train(range(1))
    assert all(run.regrow.explored[name][mask].all() for name, mask in loaded.items())


# --- refusals and words --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prune": "magnitud"}, r"unknown prune 'magnitud'; known are magnitude, set, .*\(nearest"),
        ({"grow": "randm"}, r"unknown grow 'randm'; known are random, gradient.*\(nearest"),
        ({"schedule": "cos"}, "unknown schedule 'cos'; known are constant, linear, cosine"),
        (
            {"prune": lambda gradient: gradient},
            "parameter of the prune criterion <lambda> 'gradient'.*nearest: 'grad'",
        ),
        (
            {"grow": lambda gradient: gradient},
            "parameter of the grow criterion <lambda> 'gradient'.*nearest: 'grad'",
        ),
        ({"seed": 1.5}, r"seed is 1\.5; allowed is a whole number"),
        ({"seed": None}, "seed is None; allowed is a whole number"),
        ({"explored_bytes": 0}, r"explored_bytes is 0; allowed are whole numbers from 1"),
        ({"every": 0}, "every is 0; allowed are whole numbers from 1"),
        ({"stop": 0.0}, r"stop is 0\.0; allowed is a number in \(0, 1\]"),
        ({"scope": "all"}, "scope is 'all'; allowed are 'layer' and 'global'"),
        ({"floor": 0.1}, r"floor is 0\.1; allowed is a number in \[0, 1\), with scope='global'"),
    ],
    ids=as_text,
)
def test_bad_values_are_answered_with_what_is_allowed(
    options: dict[str, Any], message: str
) -> None:
    run = run_of()
    options = {"total_steps": 4, "every": 2, **options}
    with pytest.raises(ValueError, match=message):
        MaskScheduler(run.masks, run.optimizer, **options)


@pytest.mark.parametrize("masks", [{}, [1], mlp()], ids=["empty", "list", "model"])
def test_masks_that_are_none_are_refused(masks: Any) -> None:
    message = r"masks is \w+; allowed is what itop_prune\.apply returned"
    with pytest.raises(ValueError, match=message):
        MaskScheduler(masks, torch.optim.SGD(mlp().parameters(), lr=0.1), total_steps=1, every=1)


def test_what_is_not_one_optimizer_is_refused_and_several_take_a_scheduler_each() -> None:
    model = mlp()
    masks = itop_prune.apply(model, 0.5)
    first = torch.optim.SGD(model[0].parameters(), lr=0.1)
    rest = torch.optim.Adam([*model[2].parameters(), *model[4].parameters()])

    schedule: Any = torch.optim.lr_scheduler.StepLR(first, 3)
    for wrong, name in (([first, rest], "list"), (schedule, "StepLR")):
        message = f"optimizer is {name}; allowed is one torch optimizer; of several each takes"
        with pytest.raises(ValueError, match=message):
            MaskScheduler(masks, wrong, total_steps=4, every=2)

    own = {"0.weight": masks.pop("0.weight")}
    schedulers = [
        MaskScheduler(part, optimizer, total_steps=2, every=2)
        for part, optimizer in ((own, first), (masks, rest))
    ]
    for step in range(2):
        model(torch.randn(8, 20)).square().sum().backward()
        first.step()
        rest.step()
        assert [scheduler.step() for scheduler in schedulers] == [step == 1] * 2


def test_numbers_of_numpy_are_those_of_python() -> None:
    run = run_of(rate=np.float32(0.25), stop=np.float64(1), every=np.int64(6))
    assert type(run.regrow.rate) is float
    assert list(run.regrow.update_steps()) == [6, 12]


def test_the_repr_tells_counts_rate_and_next_update() -> None:
    run = run_of(sparsity=0.75, every=4)
    run.train(range(6))
    start = "MaskScheduler(3 masks, 140 of 560 active, prune=magnitude, grow=random, rate="
    assert repr(run.regrow) == f"{start}0.2525, step 6 of 12, updates=1, next=8)"
    run.train(range(6, 12))
    assert repr(run.regrow) == f"{start}0.0050, step 12 of 12, updates=3, next=None)"
    assert "next=now" in repr(waiting().regrow)
