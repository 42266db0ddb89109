"""How many leave and enter each layer, and what criteria get and give, by hand."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import itop_prune
from itop_prune import MaskScheduler, topology, turnover
from itop_prune.gradients import DenseGradients
from itop_prune.update import Layer, Rules


def layers(**weights: list[float]) -> dict[str, Layer]:
    """Layers of one output each, active where a weight is not 0."""
    found = {}
    for name, values in weights.items():
        linear = nn.Linear(len(values), 1, bias=False)
        with torch.no_grad():
            linear.weight.copy_(torch.tensor([values]))
        itop = itop_prune.ITOP.apply(linear, "weight", torch.tensor([values]) != 0)
        found[name] = Layer(name, itop, itop.mask.clone(), DenseGradients({name: itop}, {"weight"}, 1, 1), (0, 0))
    return found


def rules(prune: Any = "magnitude", redistribute: str = "none", scope: str = "global", floor: float = 0.0) -> Rules:
    return Rules.of(prune, "random", redistribute, scope, floor)


TWO = {"a": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 0.0, 0.0], "b": [9.0, 10.0, 11.0, 12.0, 0.0, 0.0]}


def test_over_all_layers_the_worst_leave_and_each_grows_what_it_lost() -> None:
    active = {"a": 8, "b": 4}
    leaving, entering = turnover.counts(rules(), layers(**TWO), active, active, rate=0.5, moves=False)
    assert leaving == entering == {"a": 6, "b": 0}  # ceil(0.5 * 8) + ceil(0.5 * 4), all smaller than b's


def test_on_the_way_to_sparse_the_cut_is_over_all_layers_and_the_exchange_within_each() -> None:
    """GraNet: from 12 to 8 active the four smallest leave, all of a; then each exchanges a quarter of what is left."""
    active, target = {"a": 8, "b": 4}, {"a": 5, "b": 3}
    leaving, entering = turnover.counts(rules(), layers(**TWO), active, target, rate=0.25, moves=True)
    assert leaving == {"a": 4 + 1, "b": 1}
    assert entering == {"a": 1, "b": 1}


def test_a_floor_is_rounded_up() -> None:
    active, target = {"a": 8, "b": 4}, {"a": 4, "b": 3}
    leaving, _ = turnover.counts(rules(floor=0.35), layers(**TWO), active, target, rate=0.0, moves=True)
    assert leaving == {"a": 4, "b": 1}  # of the five smallest, all in a, one stays: at least 4 of its 10 (and 3 of 6)


@pytest.mark.parametrize("kind", [torch.uint8, torch.bool, torch.int32])
def test_scores_that_are_whole_numbers_are_ranked_as_numbers(kind: torch.dtype) -> None:
    def ranked(weight: Tensor) -> Tensor:
        return (weight > 8).to(kind)

    active, target = {"a": 8, "b": 4}, {"a": 5, "b": 3}
    leaving, _ = turnover.counts(rules(ranked), layers(**TWO), active, target, rate=0.0, moves=True)
    assert leaving == {"a": 4, "b": 0}


@pytest.mark.parametrize(("redistribute", "leaves"), [("none", 0), ("magnitude", 3)])
def test_a_dense_layer_gives_weights_away_only_where_layers_share(redistribute: str, leaves: int) -> None:
    two = layers(a=[1.0, 2.0, 0.0, 0.0], b=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    active = {"a": 2, "b": 6}
    leaving, entering = turnover.counts(
        rules("magnitude", redistribute, "layer"), two, active, active, 0.5, moves=False
    )
    assert leaving == {"a": 1, "b": leaves}
    assert sum(entering.values()) == sum(leaving.values())


def test_a_floor_above_what_shall_be_active_is_refused() -> None:
    model = nn.Sequential(nn.Linear(20, 16), nn.Linear(16, 4))
    masks, optimizer = itop_prune.apply(model, 0.0), torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"floor is 0\.2: it keeps 77 of 384 .* there shall be 38; lower it"):
        MaskScheduler(
            masks, optimizer, total_steps=9, every=3, scope="global", floor=0.2, density="cubic", final_sparsity=0.9
        )
    itop_prune.remove(model)
    with pytest.raises(ValueError, match=r"floor is 0\.5"):
        MaskScheduler(itop_prune.apply(model, 0.6), optimizer, total_steps=9, every=3, scope="global", floor=0.5)


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
    for layers in (3, 9):
        monkeypatch.setattr(topology, "ANSWERS_AT_ONCE", set())
        found.append(waits(monkeypatch, layers, method, grow=grow, survival=True))
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


@pytest.mark.parametrize("redistribute", ["none", "magnitude", "nonzeros"])
def test_a_floor_holds_also_where_what_is_exchanged_grows_elsewhere(redistribute: str) -> None:
    active, target, found = {"a": 8, "b": 4}, {"a": 4, "b": 3}, layers(**TWO)
    chosen = rules(redistribute=redistribute, floor=0.35)
    leaving, entering = turnover.counts(chosen, found, active, target, rate=0.5, moves=True)
    after = {name: active[name] - leaving[name] + entering[name] for name in active}
    assert sum(after.values()) == 7
    assert after["a"] >= 4
    assert after["b"] >= 3


def test_a_layer_that_began_below_the_floor_is_not_lifted_to_it() -> None:
    active, target, found = {"a": 2, "b": 4}, {"a": 2, "b": 3}, layers(**TWO)
    chosen = rules(redistribute="magnitude", floor=0.35)
    leaving, entering = turnover.counts(chosen, found, active, target, rate=0.5, moves=True)
    after = {name: active[name] - leaving[name] + entering[name] for name in active}
    assert sum(after.values()) == 5
    assert after["a"] >= 2
