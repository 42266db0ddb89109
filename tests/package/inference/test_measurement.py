"""Functions are timed in rounds, outputs compared whatever holds them; the report is a table."""

import dataclasses
import functools
import itertools

import pytest
import torch
from torch import Tensor, nn

from itop_prune.inference import measurement
from itop_prune.inference.measurement import (
    Choice,
    Report,
    clone_tensors,
    interleave,
    layer_seconds,
    relative_error,
    tensors_in,
)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that pass when a test says so, in a list of one."""
    now = [0.0]
    monkeypatch.setattr(measurement.time, "perf_counter", lambda: now[0])
    return now


def test_functions_take_turns_after_one_call_that_does_not_count() -> None:
    turns: list[str] = []

    def calling(name: str) -> str:
        turns.append(name)
        return f"{name}{len(turns)}"

    functions = {name: functools.partial(calling, name) for name in "ab"}
    assert interleave(functions, at_least=2) == {"a": ["a3", "a5"], "b": ["b4", "b6"]}
    assert turns == ["a", "b"] * 3


@pytest.mark.parametrize(
    ("at_least", "within", "rounds"), [(2, 0.0, 2), (2, 5.5, 6), (2, 1e9, 1000)]
)
def test_rounds_go_on_while_there_is_time_and_end_at_a_thousand(
    at_least: int, within: float, rounds: int, clock: list[float]
) -> None:
    def second() -> None:
        clock[0] += 1.0

    assert len(interleave({"second": second}, at_least, within)["second"]) == rounds


class Taking(nn.Module):
    """Takes so many seconds at each call, one after the other, again and again."""

    def __init__(self, clock: list[float], *seconds: float) -> None:
        super().__init__()
        self.clock, self.seconds = clock, itertools.cycle(seconds)

    def forward(self, x: Tensor) -> Tensor:
        self.clock[0] += next(self.seconds)
        return x.add_(1)


class Net(nn.Module):
    """Calls the first layer twice, and the last one never."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.unused = first, second, nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.first(self.second(self.first(x)))


def test_layers_are_timed_within_the_second_forward_of_each_turn(clock: list[float]) -> None:
    models = {
        "dense": Net(Taking(clock, 90.0, 90.0, 1.0, 2.0), Taking(clock, 70.0, 4.0)),
        "sparse": Net(Taking(clock, 90.0, 90.0, 0.5, 0.5), Taking(clock, 70.0, 6.0)),
    }
    x = torch.zeros(2)
    assert layer_seconds(models, ["first", "second", "unused", ""], (x,)) == {
        "first": {"dense": 3.0, "sparse": 1.0},
        "second": {"dense": 4.0, "sparse": 6.0},
        "": {"dense": 7.0, "sparse": 7.0},
    }
    assert not x.any()  # the models write into copies
    for layer in models["dense"].modules():
        assert not layer._forward_hooks  # noqa: SLF001
        assert not layer._forward_pre_hooks  # noqa: SLF001


def test_a_layer_that_is_not_called_in_each_forward_takes_no_time_in_others() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.always, self.rarely, self.calls = nn.Identity(), nn.Identity(), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.rarely(x) if self.calls == 4 else self.always(x)

    found = layer_seconds({"one": Routed()}, ["always", "rarely"], (torch.zeros(1),))
    assert found["rarely"] == {"one": 0.0}
    assert found["always"]["one"] > 0.0


def test_seconds_of_a_layer_are_the_median_of_turns(clock: list[float]) -> None:
    rising = itertools.chain.from_iterable((0.0, float(n)) for n in range(10**6))
    layer = Taking(clock)
    layer.seconds = rising
    # Turn 0 does not count, the next 11 do.
    assert layer_seconds({"one": nn.Sequential(layer)}, ["0"], (torch.zeros(1),)) == {
        "0": {"one": 6.0}
    }


def test_the_report_is_a_table() -> None:
    rows = (
        Choice("fc.weight", (10, 20), 0.05, "sparse", 0.004, 0.001),
        Choice("rnn.weight_ih", (4, 3), 0.5, "dense", 0.0, 0.0, "torch's LSTM is another"),
    )
    report = Report(rows, ((1, 20),), 2, 0.010, 0.005, 1.5e-7, "")
    assert report.speedup == 2.0
    assert str(report).splitlines() == [
        "weight         shape  density  choice      dense  deployed  speed-up",
        "fc.weight      10×20   0.0500  sparse   4.000 ms  1.000 ms      4.00",
        "rnn.weight_ih    4×3   0.5000   dense" + 33 * " " + "torch's LSTM is another",
        "whole model                            10.000 ms  5.000 ms      2.00",
        "measured with inputs of (1, 20), threads: 2; others give the same outputs. Difference of "
        "outputs: 1.5e-07",
    ]


def test_the_error_is_a_share_of_the_norm_of_all_tensors_together() -> None:
    three_four, zero = torch.tensor([3.0, 4.0]), torch.zeros(2)
    assert relative_error({"a": [three_four, 1]}, {"a": [three_four, 2]}) == 0.0
    assert relative_error(three_four + torch.tensor([0.0, 0.5]), three_four) == pytest.approx(0.1)
    assert relative_error((three_four, zero + 1), (three_four, zero)) == pytest.approx(2**0.5 / 5)
    assert relative_error(zero, zero) == 0.0


def test_the_error_of_what_can_t_be_compared_is_never_small_enough() -> None:
    one, nan = torch.ones(2), torch.tensor([1.0, float("nan")])
    for ours, theirs in [(1, 1), (one, one * 0), (nan, one), (nan, nan)]:
        assert not relative_error(ours, theirs) <= 1e9


@dataclasses.dataclass
class Output:
    y: torch.Tensor
    more: tuple[torch.Tensor, ...] = ()


def test_tensors_of_a_dataclass_are_compared() -> None:
    one, other = (Output(torch.tensor([3.0, y]), (torch.zeros(2),)) for y in (4.5, 4.0))
    assert relative_error(one, other) == pytest.approx(0.1)
    assert relative_error([other], [other]) == 0.0
    assert [tensor.tolist() for tensor in tensors_in({"a": other})] == [[3.0, 4.0], [0.0, 0.0]]


def test_an_infinity_in_both_is_no_difference_and_in_one_it_is() -> None:
    ours, theirs = torch.tensor([3.0, 4.5, -torch.inf]), torch.tensor([3.0, 4.0, -torch.inf])
    assert relative_error(ours, theirs) == pytest.approx(0.1)
    assert relative_error(-ours, theirs) == torch.inf
    assert relative_error(ours[:2], ours[1:]) == torch.inf


def test_copies_of_arguments_are_of_their_own() -> None:
    arguments = (torch.ones(2), {"x": torch.ones(3), "n": 3})
    copies = clone_tensors(arguments)
    copies[0].zero_()
    copies[1]["x"].zero_()
    assert arguments[0].all()
    assert arguments[1]["x"].all()
    assert copies[1]["n"] == 3
