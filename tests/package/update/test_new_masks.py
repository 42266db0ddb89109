"""What criteria get and give at an update, and that the host waits for no layer of its own."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_turnover import TWO, layers, rules
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import itop_prune
from itop_prune import MaskScheduler, topology
from itop_prune.update import new_masks as update
from itop_prune.update import turnover


def test_a_criterion_that_fails_is_named_with_the_layer() -> None:
    def broken(weight: Tensor) -> Tensor:
        return weight + torch.ones(7)

    with pytest.raises(RuntimeError, match="broken failed for a: The size of tensor"):
        turnover.counts(
            rules(broken), layers(**TWO), {"a": 8, "b": 4}, {"a": 8, "b": 4}, 0.5, moves=False
        )


def test_a_criterion_that_writes_into_what_it_is_given_is_refused() -> None:
    def writing(mask: Tensor) -> Tensor:
        return mask.logical_not_()

    with pytest.raises(
        RuntimeError, match="writing wrote into mask of a; a criterion may only read"
    ):
        turnover.counts(
            rules(writing), layers(**TWO), {"a": 8, "b": 4}, {"a": 8, "b": 4}, 0.5, moves=False
        )


# Without waiting for the device, as on a GPU


class Waits(TorchDispatchMode):
    """Counts operations whose result the host has to wait for."""

    WAITING = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "unique")
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name == "index" and any(
            part is not None and part.dtype == torch.bool for part in args[1]
        )
        self.count += by_mask or name in self.WAITING
        return func(*args, **kwargs or {})


def waits_of(monkeypatch: pytest.MonkeyPatch, call: Callable[[], object]) -> int:
    """How often a call waits for the device."""
    tolist, asked = Tensor.tolist, []
    with monkeypatch.context() as patch, Waits() as waiting:
        patch.setattr(Tensor, "tolist", lambda tensor: asked.append(tensor) or tolist(tensor))
        call()
    return waiting.count + len(asked)


def waits(monkeypatch: pytest.MonkeyPatch, layers: int, method: str = "ERK", **options: Any) -> int:
    """How often an update of so many layers waits for the device."""
    model = nn.Sequential(*(nn.Linear(12, 12, bias=False) for _ in range(layers)))
    masks = itop_prune.apply(model, 0.5, method)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    regrow = MaskScheduler(masks, optimizer, total_steps=10, every=2, **options)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(3, 12)).square().sum().backward()
        optimizer.step()
        found = waits_of(monkeypatch, regrow.step)
    monkeypatch.undo()
    assert regrow.updates == 1
    assert itop_prune.summarize(model).active == 72 * layers
    return found


@pytest.mark.parametrize("method", ["ERK", "2:4"])
@pytest.mark.parametrize("grow", ["gradient", "random", "momentum"])
def test_elsewhere_than_on_the_cpu_an_update_waits_as_often_for_many_layers_as_for_few(
    monkeypatch: pytest.MonkeyPatch, grow: str, method: str
) -> None:
    assert waits(monkeypatch, 9, method, grow=grow) > waits(monkeypatch, 3, method, grow=grow)
    found = []
    for many in (3, 9):
        monkeypatch.setattr(topology, "ANSWERS_AT_ONCE", set())
        found.append(waits(monkeypatch, many, method, grow=grow, survival=True))
    assert found[0] == found[1] <= 2


def test_the_numbers_of_a_run_are_fetched_at_once_however_many_layers_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Sequential(*(nn.Linear(12, 12, bias=False) for _ in range(9)))
    masks, optimizer = itop_prune.apply(model, 0.5), torch.optim.SGD(model.parameters(), lr=0.1)
    regrow = MaskScheduler(masks, optimizer, total_steps=10, every=2, survival=True)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(3, 12)).square().sum().backward()
        optimizer.step()
        regrow.step()
    once = (regrow.exploration_rate, regrow.entered, regrow.survival_rate, regrow.survival_rates)
    for call in (
        *once,
        functools.partial(itop_prune.layers.handle.active_weights, masks),
        functools.partial(repr, regrow),
    ):
        assert waits_of(monkeypatch, call) == 1
    assert waits_of(monkeypatch, lambda: itop_prune.summarize(model, regrow.explored)) == 2


@pytest.mark.parametrize("method", ["ERK", "2:4"])
def test_scores_that_are_nan_are_named_where_no_layer_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def broken(weight: Tensor) -> Tensor:
        return weight * torch.nan

    for options, message in (
        ({"grow": broken}, r"broken gave NaN for 0\.weight; scores must be numbers"),
        ({"prune": broken}, r"broken gave NaN for 0\.weight; scores must be numbers"),
        (
            {"prune": broken, "grow": broken},
            r"broken gave NaN for 0\.weight; scores must be numbers",
        ),
    ):
        monkeypatch.setattr(topology, "ANSWERS_AT_ONCE", set())
        with pytest.raises(ValueError, match=message):
            waits(monkeypatch, 2, method, **options)
        monkeypatch.undo()


# Layers of one size together, as on a GPU


def moved(**options: Any) -> tuple[nn.Module, torch.optim.Optimizer, MaskScheduler]:
    """A net with five equal layers and two others, after three updates."""
    torch.manual_seed(0)
    wide = [nn.Linear(16, 16) for _ in range(4)]
    model = nn.Sequential(
        nn.Conv2d(4, 16, 2, 2), nn.Flatten(), nn.Linear(64, 16), *wide, nn.Linear(16, 10)
    )
    masks = itop_prune.apply(model, 0.5, "uniform", seed=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    regrow = MaskScheduler(masks, optimizer, total_steps=7, every=2, survival=True, **options)
    draw = torch.Generator().manual_seed(2)
    for _ in range(6):
        optimizer.zero_grad()
        model(torch.randn(8, 4, 4, 4, generator=draw)).square().sum().backward()
        optimizer.step()
        regrow.step()
    assert regrow.updates == 3
    return model, optimizer, regrow


def flat(state: Any) -> list[Any]:
    """What is in nested dictionaries and lists, whatever their order."""
    if isinstance(state, dict):
        return [part for key in sorted(state, key=str) for part in (key, *flat(state[key]))]
    return [part for each in state for part in flat(each)] if isinstance(state, list) else [state]


@pytest.mark.parametrize(
    "options",
    [
        {"grow": "gradient"},
        {"grow": "random", "prune": "random"},
        {"grow": "momentum", "redistribute": "magnitude"},
        {"grow": "gradient", "density": "cubic", "final_sparsity": 0.8},
    ],
    ids=str,
)
def test_layers_taken_together_move_as_each_alone_does(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(topology, "ANSWERS_AT_ONCE", set())
    taken = []
    exchange = update.exchange

    def counted(rules: Any, layers: Any, *counts: int) -> Any:
        taken.append(len(layers))
        return exchange(rules, layers, *counts)

    monkeypatch.setattr("itop_prune.scheduler.exchange", counted)
    together = moved(**options)
    assert max(taken) > 1
    taken.clear()
    monkeypatch.setattr(update, "TOGETHER", 1)
    alone = moved(**options)
    assert max(taken) <= 4  # four layers of 256 weights in the room of the one of 1,024
    monkeypatch.setattr("itop_prune.scheduler.alike", each_alone)
    taken.clear()
    one_by_one = moved(**options)
    assert set(taken) == {1}
    for other in (alone, one_by_one):
        assert list(other[2].survival_rates()) == list(together[2].survival_rates())
        for ours, theirs in zip(together, other, strict=True):
            for one, another in zip(
                flat(ours.state_dict()), flat(theirs.state_dict()), strict=True
            ):
                assert torch.equal(one, another) if isinstance(one, Tensor) else one == another


def each_alone(layers: Any, leaving: Any, entering: Any) -> list[list[update.Layer]]:
    return [[layer] for name, layer in layers.items() if leaving[name] or entering[name]]


def names_of(groups: list[list[update.Layer]]) -> list[list[str]]:
    return [[layer.name for layer in group] for group in groups]


def test_together_go_layers_of_one_size_and_counts_as_far_as_there_is_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = layers(**{name: [1.0] * 8 for name in "abcde"}, large=[1.0] * 16, odd=[1.0] * 7)
    leaving = dict.fromkeys(given, 2) | {"c": 1, "e": 0}
    entering = dict.fromkeys(given, 2) | {"e": 0}
    assert names_of(update.alike(given, leaving, entering)) == [
        ["a"],
        ["b"],
        ["c"],
        ["d"],
        ["large"],
        ["odd"],
    ]
    monkeypatch.setattr(topology, "ANSWERS_AT_ONCE", set())
    assert names_of(update.alike(given, leaving, entering)) == [
        ["a", "b", "d"],
        ["c"],
        ["large"],
        ["odd"],
    ]
    monkeypatch.setattr(
        update, "TOGETHER", 1
    )  # then there is room for what the largest layer takes
    assert names_of(update.alike(given, leaving, entering)) == [
        ["a", "b"],
        ["d"],
        ["c"],
        ["large"],
        ["odd"],
    ]
    assert update.alike({}, {}, {}) == []


class Launches(TorchDispatchMode):
    """Counts operations that are no views."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not any(
            r.alias_info and not r.alias_info.is_write for r in func._schema.returns
        )
        return func(*args, **kwargs or {})


def launches(layers: int) -> int:
    """How many operations an update of so many equal layers takes."""
    model = nn.Sequential(*(nn.Linear(12, 12, bias=False) for _ in range(layers)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    regrow = MaskScheduler(
        itop_prune.apply(model, 0.5), optimizer, total_steps=9, every=1, grow="gradient"
    )
    model(torch.randn(3, 12)).square().sum().backward()
    optimizer.step()
    with Launches() as launched:
        assert regrow.step()
    return launched.count


def test_a_layer_more_of_a_size_costs_few_launches_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(topology, "ANSWERS_AT_ONCE", set())
    assert launches(9) - launches(8) <= 22
    monkeypatch.setattr("itop_prune.scheduler.alike", each_alone)
    assert launches(9) - launches(8) > 40
