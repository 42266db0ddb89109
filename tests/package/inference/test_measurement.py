"""Functions are timed in rounds, outputs compared whatever holds them; the report is a table."""

import dataclasses
from statistics import median

import pytest
import torch

from itop_prune.inference import measurement
from itop_prune.inference.measurement import (
    Choice,
    Report,
    clone_tensors,
    interleaved_times,
    relative_error,
    tensors_in,
)


def test_functions_take_turns_after_one_call_that_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    turns: list[str] = []
    now = [0.0]

    def taking(name: str, *seconds: float) -> None:
        now[0] += seconds[turns.count(name)]
        turns.append(name)

    monkeypatch.setattr(measurement.time, "perf_counter", lambda: now[0])
    functions = {
        "a": lambda: taking("a", 99.0, 3.0, 1.0, 8.0),
        "b": lambda: taking("b", 99.0, 5.0, 6.0, 4.0),
    }
    assert interleaved_times(functions, at_least=3, within=0.5, reduce=min) == {"a": 1.0, "b": 4.0}
    assert turns == ["a", "b"] * 4
    turns.clear()
    assert interleaved_times(functions, at_least=3, within=0.5, reduce=median) == {
        "a": 3.0,
        "b": 5.0,
    }


@pytest.mark.parametrize(
    ("at_least", "within", "rounds"), [(2, 0.0, 2), (2, 5.5, 6), (2, 1e9, 1000)]
)
def test_rounds_go_on_while_there_is_time_and_end_at_a_thousand(
    at_least: int, within: float, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, calls = [0.0], [0]

    def second() -> None:
        now[0] += 1.0
        calls[0] += 1

    monkeypatch.setattr(measurement.time, "perf_counter", lambda: now[0])
    assert interleaved_times({"second": second}, at_least, within, min) == {"second": 1.0}
    assert calls[0] == 1 + rounds


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
