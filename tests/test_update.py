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
from itop_prune import MaskScheduler, topology, turnover


def test_a_criterion_that_fails_is_named_with_the_layer() -> None:
    def broken(weight: Tensor) -> Tensor:
        return weight + torch.ones(7)

    with pytest.raises(RuntimeError, match="broken failed for a: The size of tensor"):
        turnover.counts(rules(broken), layers(**TWO), {"a": 8, "b": 4}, {"a": 8, "b": 4}, 0.5, moves=False)


def test_a_criterion_that_writes_into_what_it_is_given_is_refused() -> None:
    def writing(mask: Tensor) -> Tensor:
        return mask.logical_not_()

    with pytest.raises(RuntimeError, match="writing wrote into mask of a; a criterion may only read"):
        turnover.counts(rules(writing), layers(**TWO), {"a": 8, "b": 4}, {"a": 8, "b": 4}, 0.5, moves=False)


# Without waiting for the device, as on a GPU


class Waits(TorchDispatchMode):
    """Counts operations whose result the host has to wait for."""

    WAITING = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "unique")
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name == "index" and any(part is not None and part.dtype == torch.bool for part in args[1])
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
    for call in (*once, functools.partial(itop_prune.mask.active_weights, masks), functools.partial(repr, regrow)):
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
        ({"prune": broken, "grow": broken}, r"broken gave NaN for 0\.weight; scores must be numbers"),
    ):
        monkeypatch.setattr(topology, "ANSWERS_AT_ONCE", set())
        with pytest.raises(ValueError, match=message):
            waits(monkeypatch, 2, method, **options)
        monkeypatch.undo()
