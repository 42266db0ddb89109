"""When masks move, and the share of weights that an update exchanges, worked out by hand."""

import math
from typing import Any

import pytest

from itop_prune.methods.schedules import constant, linear
from itop_prune.update.timetable import Timetable


def table(**given: Any) -> Timetable:
    settings = {
        "total_steps": 100,
        "every": 10,
        "stop": 1.0,
        "rate": 0.5,
        "min_rate": 0.1,
        "schedule": linear,
    }
    return Timetable(**settings | given)


@pytest.mark.parametrize(
    ("total_steps", "every", "stop", "expected"),
    [
        (100, 25, 1.0, [25, 50, 75, 100]),
        (99, 25, 1.0, [25, 50, 75]),
        (100, 25, 0.75, [25, 50, 75]),
        (100, 1, 0.29, list(range(1, 30))),  # 0.29 * 100 is 28.999999999999996
        (10, 11, 1.0, []),
    ],
)
def test_updates_are_at_every_so_many_steps_up_to_the_stop_included(
    total_steps: int, every: int, stop: float, expected: list[int]
) -> None:
    assert list(table(total_steps=total_steps, every=every, stop=stop).updates()) == expected


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 10), (9, 10), (10, 20), (79, 80), (80, None), (500, None)]
)
def test_the_next_update_is_the_first_after_a_step(step: int, expected: int | None) -> None:
    assert table(stop=0.8).next_update(step) == expected


def test_the_rate_falls_and_reaches_its_last_value_at_the_stop() -> None:
    falling = table(stop=0.5)
    assert [round(falling.rate_at(step), 12) for step in (0, 25, 50, 100)] == [0.5, 0.3, 0.1, 0.1]
    assert table(schedule=constant).rate_at(100) == 0.5


def test_progress_is_1_at_the_last_update_and_after_it() -> None:
    assert [table(total_steps=99).progress(step) for step in (45, 90, 95)] == [0.5, 1.0, 1.0]
    assert table(every=1000).progress(7) == 1.0


def test_the_last_update_is_at_the_stop_whatever_the_float() -> None:
    for hundredths in range(1, 101):
        assert table(every=1, stop=hundredths / 100).updates()[-1] == hundredths


WHOLE = r"allowed are whole numbers from 1 to 2\^63 - 1: it counts optimizer steps"
SHARE = "allowed is a number in .0, 1."


@pytest.mark.parametrize(
    ("name", "values", "allowed"),
    [
        ("total_steps", [0, -1, 1.5, "3", True, None, 2**63, 10**400], WHOLE),
        ("every", [0, -1, 2.5, "3", True, None, 10**400], WHOLE),
        ("stop", [0.0, -0.5, 1.01, math.nan, "0.5", True], SHARE),
        ("rate", [0.0, -0.5, 1.01, math.nan, "0.5", True], f"{SHARE}, or 0 with final_sparsity"),
        ("min_rate", [-0.1, 0.6, math.nan, "0.1"], "allowed is a number in .0, rate., and rate is"),
    ],
)
def test_a_number_out_of_range_is_refused_with_what_is_allowed(
    name: str, values: list[object], allowed: str
) -> None:
    for value in values:
        with pytest.raises(ValueError, match=f"^{name} is {value!r}; {allowed}"):
            table(**{name: value})


def test_a_rate_of_zero_is_allowed_if_the_density_moves() -> None:
    assert table(rate=0.0, min_rate=0.0, rate_may_be_zero=True).rate_at(10) == 0.0
